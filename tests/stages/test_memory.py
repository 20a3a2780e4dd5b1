"""The memory that a plan says, against what runs on GPUs have measured (tests/benchmarks/RESULTS.md)."""

from typing import Any

import pytest
from made_up import Headers, headers

from compress.forecast_records import Forecast
from compress.prune.axes import Dims
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.text import CalibrationSpec
from compress.stages.contract import Place, Setting
from compress.stages.prune.plan import plan as plan_pruning
from compress.stages.quantize.plan import plan as plan_quantization

LLAMA = headers("llama", Dims(4096, 14336, 32, 8, 128, 32), vocabulary=49152)
SMOL = headers("llama", Dims(576, 1536, 9, 3, 64, 30), vocabulary=49152)
CORRECTED: dict[str, Any] = {"kind": "quantize", "group_size": 64}
ALONE = CORRECTED | {"drift_correction": 0}
PRUNED: dict[str, Any] = {"kind": "prune", "multiple_of": 1}
SPARSE: dict[str, Any] = {"kind": "prune", "pattern": "2:4"}
SIX = headers("llama", Dims(4096, 14336, 32, 8, 128, 6))
GREEDY = PRUNED | {"shape": {"intermediate_size": 11520}, "importance": "greedy"}
MEASURED = [
    (LLAMA, CORRECTED, 128, None, 34.0e9),
    (LLAMA, ALONE, 128, None, 19.8e9),
    (LLAMA, CORRECTED, 512, None, 117.8e9),
    (LLAMA, ALONE, 512, None, 61.7e9),
    (LLAMA, ALONE, 128, 8_000_000_000, 6.3e9),
    (SMOL, CORRECTED, 128, None, 3.6e9),
    (SMOL, ALONE, 128, None, 1.9e9),
    (SMOL, PRUNED | {"shape": {"intermediate_size": 1152}}, 112, None, 3.01e9),
    (SMOL, PRUNED | {"shape": {"num_attention_heads": 6, "num_key_value_heads": 2}}, 112, None, 3.23e9),
    (SMOL, PRUNED | {"shape": {"hidden_size": 504}}, 112, None, 3.14e9),
    (SMOL, PRUNED | {"shape": {"num_hidden_layers": 25}}, 112, None, 3.49e9),
    (SIX, GREEDY, 128, 24_000_000_000, 14.2e9),
    (SMOL, SPARSE | {"method": "wanda"}, 112, None, 1.70e9),
    (SMOL, SPARSE | {"method": "sparsegpt"}, 112, None, 3.22e9),
]


def forecast(model: Headers, spec: dict[str, Any], samples: int, place: Place) -> Forecast:
    text = CalibrationSpec(source="text.txt", samples=samples, sequence_length=2048)
    setting = Setting("stages.0", text, place=place)
    if spec["kind"] == "quantize":
        found = plan_quantization(WeightOnlyStage.model_validate(spec), model, setting)
    elif "pattern" in spec:
        found = plan_pruning(PatternStage.model_validate(spec), model, setting)
    else:
        found = plan_pruning(PruneStage.model_validate(spec), model, setting)
    assert not found.problems and found.forecast is not None, found.problems
    return found.forecast


@pytest.mark.parametrize(
    ("model", "held", "measured"),
    [(LLAMA, None, 3.87e9), (SMOL, None, 2.19e9), (SMOL, 1_230_000_000, 2.21e9), (SMOL, 1_760_000_000, 2.31e9)],
)
def test_the_hosts_memory_beside_a_gpu_is_foreseen_within_15_percent(
    model: Headers, held: int | None, measured: float
) -> None:
    """What CUDA's libraries take comes with the first kernels, and is not held by a process that has just begun."""
    found = forecast(model, CORRECTED, 128, Place("cuda", 2, None, held)).memory_bytes
    assert found is not None and abs(found / measured - 1) <= 0.15


@pytest.mark.parametrize(("model", "spec", "samples", "free", "measured"), MEASURED)
def test_a_gpus_memory_is_foreseen_within_15_percent(
    model: Headers, spec: dict[str, Any], samples: int, free: int | None, measured: float
) -> None:
    found = forecast(model, spec, samples, Place("cuda", 2, free))
    assert found.gpu_memory_bytes == pytest.approx(measured, rel=0.15)


def test_a_processor_has_no_gpu_and_keeps_wide_numbers_in_more_memory() -> None:
    two, four = (forecast(SMOL, CORRECTED, 16, Place("cpu", width, None, 0)) for width in (2, 4))
    assert two.gpu_memory_bytes is None and four.memory_bytes is not None and two.memory_bytes is not None
    assert two.memory_bytes < four.memory_bytes < 2.5 * two.memory_bytes
