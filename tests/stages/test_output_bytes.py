"""A plan's bytes are the bytes of the files, to the byte, in every format."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import quantize
from random_models import make_model, random_tokens
from trained import planned, spec, train, write_text

from compress.data.calibration import TokenSet
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, merge_parts
from compress.model.layout import merged_bytes
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.recipe.text import CalibrationSpec
from compress.stages import layerwise
from compress.stages.contract import Setting
from compress.stages.prune.plan import plan as plan_pruning
from compress.stages.prune.run import run as prune
from compress.stages.quantize import written
from compress.stages.quantize.plan import plan
from compress.system.progress import Reporter

TEXT = CalibrationSpec(source="text.txt", samples=4, sequence_length=24)
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eleven layers, so that numbers of layers and offsets differ in length; tied and untied, in three dtypes."""
    folder, made = tmp_path_factory.mktemp("bytes"), {}
    for name, tie in (("BF16", True), ("F16", False), ("F32", False)):
        sizes = {"num_hidden_layers": 11, "tie_word_embeddings": tie, "attention_bias": tie}
        made[name] = make_model(folder / name, dtype=DTYPES[name], **sizes)
    return made


def context() -> Context:
    tokens = TokenSet(random_tokens(4, 24, 1), "random", "random", None)
    return Context(torch.device("cpu"), torch.float32, tokens, random_tokens(1, 8, 2), Reporter(quiet=True), False)


def check(model: Path, stage: Any, work: Path) -> Checkpoint:
    base = Checkpoint(model)
    planned = plan(stage, base, Setting("stages.0", TEXT))
    assert not planned.problems and planned.shapes is not None and planned.forecast is not None
    quantize(stage, base, work, context())
    files = list((work / "checkpoint").glob("*.safetensors"))
    assert planned.forecast.output_bytes == sum(file.stat().st_size for file in files) == planned.shapes.bytes
    assert planned.forecast.about == (getattr(stage, "method", "") == "auto")
    return Checkpoint(work / "checkpoint")


WEIGHTS = [
    {"bits": bits, "symmetric": symmetric, "format": form, "group_size": size}
    for form in ("compressed-tensors", "gptq")
    for bits, symmetric, size in (
        (4, True, 32), (4, False, -1), (3, False, 32), (3, True, -1), (2, True, 32), (8, False, 32), (8, True, -1)
    )
]  # fmt: skip


@pytest.mark.parametrize("settings", WEIGHTS, ids=lambda each: "-".join(map(str, each.values())))
def test_weights_alone(models: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    model = ("BF16", "F16", "F32")[WEIGHTS.index(settings) % 3]
    check(models[model], WeightOnlyStage(kind="quantize", method="rtn", clip="none", **settings), tmp_path)


@pytest.mark.parametrize("model", ["BF16", "F32"])
def test_heads_embeddings_overrides_and_what_is_ignored(models: dict[str, Path], tmp_path: Path, model: str) -> None:
    stage = WeightOnlyStage.model_validate(
        {
            "kind": "quantize", "method": "rtn", "clip": "none", "group_size": 32, "lm_head": True,
            "embeddings": model == "BF16", "ignore": ["*.10.*"], "overrides": {"*.down_proj": {"bits": 8}},
        }
    )  # fmt: skip
    check(models[model], stage.model_copy(update={"overrides": {}} if model == "BF16" else {}), tmp_path)


INPUTS = [
    {"method": "dynamic"},
    {"method": "dynamic", "dtype": "fp8", "granularity": "tensor"},
    {"method": "static", "granularity": "tensor", "overrides": {"*.up_proj": {"method": "dynamic"}}},
    {"method": "static", "dtype": "fp8", "kv_cache": "fp8"},
    {"method": "dynamic", "kv_cache": "fp8_per_head", "smooth": 0.5},
    {"method": "dynamic", "format": "torchao"},
    {"method": "dynamic", "format": "torchao", "bits": 4, "group_size": 32},
    {"method": "dynamic", "format": "torchao", "bits": 4, "group_size": -1},
]


@pytest.mark.parametrize("settings", INPUTS, ids=lambda each: "-".join(map(str, each.values())))
def test_weights_and_inputs(models: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    if "torchao" in settings.values():
        pytest.importorskip("torchao")
    model = ("BF16", "F16", "F32")[INPUTS.index(settings) % 3]
    stage = WeightActivationStage.model_validate({"kind": "quantize", "weight_rounding": "rtn"} | settings)
    check(models[model], stage, tmp_path)


def test_blocks_with_rows_left_over(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", hidden_size=128, intermediate_size=384, head_dim=40)
    stage = WeightActivationStage(
        kind="quantize", method="dynamic", dtype="fp8", granularity="block", weight_rounding="rtn", ignore=["*.o_proj"]
    )
    check(model, stage, tmp_path / "work")


def test_what_is_chosen_as_it_runs_is_about(models: dict[str, Path]) -> None:
    stage = WeightActivationStage(kind="quantize", method="auto")
    found = plan(stage, Checkpoint(models["BF16"]), Setting("stages.0", TEXT)).forecast
    assert found is not None and found.about


@pytest.mark.parametrize("form", ["compressed-tensors", "torchao"])
def test_shards(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """A result that is too large for one file; torchao's files each say of all tensors what they are."""
    if form == "torchao":
        pytest.importorskip("torchao")
    monkeypatch.setattr(written, "merged_bytes", partial(merged_bytes, max_shard_bytes=1000))
    monkeypatch.setattr(layerwise, "merge_parts", partial(merge_parts, max_shard_bytes=1000))
    stage = WeightActivationStage.model_validate(
        {"kind": "quantize", "method": "dynamic", "weight_rounding": "rtn", "format": form}
    )
    found = check(models["F16"], stage, tmp_path)
    assert len(found.files) == 12


# ---- pruned and trained


def pruned(stage: Any, model: Path, work: Path) -> None:
    base = Checkpoint(model)
    planned = plan_pruning(stage, base, Setting("stages.0", TEXT))
    assert not planned.problems and planned.forecast is not None and not planned.forecast.about
    prune(planned.spec or stage, base, work, context())  # type: ignore[arg-type]
    assert planned.forecast.output_bytes == Checkpoint(work / "checkpoint").bytes


@pytest.mark.parametrize("model", ["BF16", "F32"])
def test_pruned_along_every_axis(models: dict[str, Path], tmp_path: Path, model: str) -> None:
    shape = {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 10}
    settings = {"importance": "magnitude", "compensate": False, "multiple_of": 8}
    pruned(PruneStage.model_validate({"kind": "prune", "shape": shape} | settings), models[model], tmp_path)


def test_of_several_shapes_one_is_chosen_as_it_runs(models: dict[str, Path]) -> None:
    stage = PruneStage.model_validate(
        {"kind": "prune", "shape": [{"intermediate_size": 64}, {"num_hidden_layers": 10}]}
    )
    found = plan_pruning(stage, Checkpoint(models["BF16"]), Setting("stages.0", TEXT)).forecast
    assert found is not None and found.about


def test_sparse(models: dict[str, Path], tmp_path: Path) -> None:
    pruned(PatternStage(kind="prune", pattern="2:4", method="magnitude"), models["F16"], tmp_path)


@pytest.mark.parametrize("settings", [{}, {"kind": "distill", "shape": {"tie_word_embeddings": True}}])
def test_trained(models: dict[str, Path], tmp_path: Path, settings: dict[str, Any]) -> None:
    base = Checkpoint(models["F16"])
    stage = spec(write_text(tmp_path / "text.jsonl"), steps=1, **settings)
    foreseen = planned(base, stage).forecast
    train(base, tmp_path / "out", stage)
    assert foreseen is not None and foreseen.output_bytes == Checkpoint(tmp_path / "out" / "checkpoint").bytes
