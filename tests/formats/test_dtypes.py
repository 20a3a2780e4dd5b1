"""Models stored in other dtypes than bf16, whole or in part: the stock loader computes what was computed exactly."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from quantized import PROBE, quantize
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.evaluation import verify
from compress.formats.facts import bytes_on_disk, measured_bits, scale_dtype
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, read_part
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.stages.quantize.plan import plan_matrices
from compress.stages.quantize.written import output_bytes
from compress.system.progress import Reporter

CPU = torch.device("cpu")
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
STORED: dict[str, tuple[torch.dtype, Callable[[str], bool]]] = {  # and which tensors are float32
    "fp16": (torch.float16, lambda name: False),
    "fp32": (torch.float32, lambda name: True),
    "fp32 norms": (torch.bfloat16, lambda name: "norm" in name),
    "one fp32 linear": (torch.bfloat16, lambda name: name.endswith("layers.0.self_attn.q_proj.weight")),
    "fp32 embeddings": (torch.bfloat16, lambda name: "embed" in name),
}
WEIGHTS, INPUTS = {"group_size": 32, "method": "rtn"}, {"weight_rounding": "rtn"}
STAGES: dict[str, dict[str, Any]] = {
    "W4": WEIGHTS,
    "W4 asymmetric": WEIGHTS | {"symmetric": False},
    "W4 head embeddings": WEIGHTS | {"lm_head": True, "embeddings": True},
    "int8": {"method": "dynamic"} | INPUTS,
    "int8 static": {"method": "static"} | INPUTS,
    "fp8 static kv": {"method": "static", "dtype": "fp8", "kv_cache": "fp8"} | INPUTS,
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes models, one of a kind; what is float32 has values that 16 bits can't hold."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(kind: str) -> Path:
        if kind not in made:
            dtype, wide = STORED[kind]
            made[kind] = make_model(folder / kind.replace(" ", "_"), dtype=dtype, intermediate_size=128)
            file, generator = made[kind] / "model.safetensors", torch.Generator().manual_seed(5)
            finer = {
                n: t.float() * (1 + torch.rand(t.shape, generator=generator) * 2**-9) if wide(n) else t
                for n, t in load_file(file).items()
            }
            save_file(finer, file, {"format": "pt"})
        return made[kind]

    return model


def spec(**settings: Any) -> WeightOnlyStage | WeightActivationStage:
    kind = WeightOnlyStage if settings.get("method") in ("rtn", "gptq") else WeightActivationStage
    return kind(kind="quantize", **settings)


def quantized(model: Path, work: Path, run_in: torch.dtype, settings: dict[str, Any]) -> tuple[Path, Tensor]:
    """The checkpoint, and what was computed for the probe."""
    tokens = TokenSet(random_tokens(4, 24, 1), "random", "random", None)
    context = Context(CPU, run_in, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)
    quantize(spec(**settings), Checkpoint(model), work, context)
    return work / "checkpoint", read_part(work / PROBE)[0]["logits"]


@pytest.mark.parametrize(
    ("kind", "stage", "dtype"),
    [  # each of the pairs in one of the two, in turns
        (kind, stage, (torch.float32, torch.bfloat16)[(row + column) % 2])
        for row, kind in enumerate(STORED)
        for column, stage in enumerate(STAGES)
    ],
)
def test_stock_loaders_compute_what_was_computed(
    models: Callable[[str], Path], tmp_path: Path, kind: str, stage: str, dtype: torch.dtype
) -> None:
    folder, computed = quantized(models(kind), tmp_path, dtype, STAGES[stage])
    probe = random_tokens(1, 24, 2)
    assert float(computed.std()) > 0.1
    assert torch.equal(verify.own_logits(Checkpoint(folder), probe[0], CPU, dtype, False), computed)
    assert torch.equal(load_stock(folder, dtype)(probe, use_cache=False).logits[0].float(), computed)


@pytest.mark.parametrize("kind", STORED)
def test_scales_are_16_bits_wide_in_the_models_own_dtype(
    models: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    """So that whoever opens the model has the scales that the codes were computed with."""
    for stage in ("W4", "fp8 static kv"):
        folder, _ = quantized(models(kind), tmp_path / stage, torch.float32, STAGES[stage])
        tensors = load_file(folder / "model.safetensors")
        scales = {t.dtype for n, t in tensors.items() if n.endswith("_scale")}
        assert scales == {torch.float16 if kind == "fp16" else torch.bfloat16}
        kept = {
            n: t
            for n, t in load_file(models(kind) / "model.safetensors").items()
            if n in tensors and f"{n}_scale" not in tensors
        }
        assert len(kept) > 3 and all(
            torch.equal(t, tensors[n]) and t.dtype == tensors[n].dtype for n, t in kept.items()
        )
        config, before = (json.loads((f / "config.json").read_text()) for f in (folder, models(kind)))
        assert config["dtype"] == before["dtype"]


@pytest.mark.parametrize(("stored", "written"), [("fp32", "float32"), ("fp16", "float16")])
def test_a_config_without_a_dtype_gets_the_one_that_loaders_would_have_found(
    models: Callable[[str], Path], tmp_path: Path, stored: str, written: str
) -> None:
    """The first float tensor of a quantized file may be a scale."""
    model = tmp_path / "model"
    model.mkdir()
    for file in models(stored).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    folder, _ = quantized(model, tmp_path / "work", torch.float32, WEIGHTS)
    assert json.loads((folder / "config.json").read_text()) == config | {
        "dtype": written,
        "quantization_config": json.loads((folder / "config.json").read_text())["quantization_config"],
    }


def test_a_run_passes_and_counts_real_bytes(models: Callable[[str], Path], tmp_path: Path) -> None:
    """In float32 on a CPU without bf16: zero points make loaders multiply in the dtype of the scales."""
    (tmp_path / "text.txt").write_text("The library stood at the corner of two quiet streets. " * 160)
    recipe = {
        "name": "small", "model": str(models("fp32")), "output": str(tmp_path / "out"), "evaluate": False,
        "stages": [{"kind": "quantize", "group_size": 32, "symmetric": False}],
        "calibration": {"source": str(tmp_path / "text.txt"), "samples": 40, "sequence_length": 32},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = invoke("run", tmp_path / "recipe.yaml", "--device", "cpu", "-q")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verified"]["passed"] and report["verified"]["max_logit_difference"] == 0
    assert report["verified"]["loader"] == verify.STOCK
    # a code of 4 bits, a scale of 16 and a zero point of 4 for 32 of them, a shape of two int64
    matrices = [(64, 128)] * 2 + [(128, 64)] * 4 + [(64, 64)] * 4 + [(32, 64)] * 4
    bits = sum(o * i * (4 + 20 / 32) + 128 for o, i in matrices)
    assert report["compressed"]["quantized_bits_per_weight"] == bits / sum(o * i for o, i in matrices)


# ---- bytes


@pytest.mark.parametrize("stage", [*STAGES, "gptq", "torchao", "torchao 4"])
@pytest.mark.parametrize("kind", ["fp16", "fp32", "one fp32 linear"])
def test_bytes_are_foreseen_and_measured(models: Callable[[str], Path], tmp_path: Path, kind: str, stage: str) -> None:
    more: dict[str, dict[str, Any]] = {
        "gptq": WEIGHTS | {"format": "gptq"},
        "torchao": {"method": "dynamic", "format": "torchao"} | INPUTS,
        "torchao 4": {"method": "dynamic", "format": "torchao", "bits": 4} | INPUTS,
    }
    if stage.startswith("torchao"):
        pytest.importorskip("torchao")
    settings = (STAGES | more)[stage]
    folder, _ = quantized(models(kind), tmp_path, torch.float32, settings)
    parent, written = Checkpoint(models(kind)), Checkpoint(folder)
    matrices = plan_matrices(spec(**settings), parent, "stages.0")
    shapes = {matrix.name: matrix.shape for matrix in matrices}
    layout = spec(**settings).layout
    foreseen = sum(bytes_on_disk(layout, matrix, NAMES[STORED[kind][0]]) for matrix in matrices)
    tensors = load_file(folder / "model.safetensors")
    there = sum(t.nbytes for n, t in tensors.items() if n.rpartition(".")[0] in shapes and not n.endswith("bias"))
    weights = sum(rows * columns for rows, columns in shapes.values())
    assert foreseen == there
    assert measured_bits(written.tensors, shapes) == 8 * there / weights
    scales = {t.dtype for n, t in tensors.items() if n.endswith((".scales", "_scale"))}
    assert {NAMES[dtype] for dtype in scales} == {scale_dtype(layout, NAMES[STORED[kind][0]])}
    assert output_bytes(spec(**settings), matrices, parent) == written.bytes
