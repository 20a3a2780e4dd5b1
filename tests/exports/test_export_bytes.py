"""The bytes that a dry run says an export will take, beside those that are written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from onnx_files import builder, quantized
from random_models import make_model
from safetensors.torch import load_file

from compress.exports.gguf.write import export_gguf
from compress.exports.onnx.build import export_onnx
from compress.exports.plan import disk_bytes, export_bytes
from compress.recipe.export import ExportSpec
from compress.recipe.schema import Recipe
from compress.runs.foreseen import foreseen_result
from compress.runs.plan import plan_run
from compress.system.progress import Reporter

W4 = {"method": "rtn", "bits": 4, "group_size": 32}
STAGES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "4 bits": W4,
    "4 bits, gptq": W4 | {"format": "gptq"},
    "zero points": W4 | {"symmetric": False},
    "3 bits": W4 | {"bits": 3},
    "8 bits, whole rows": W4 | {"bits": 8, "group_size": -1},
    "mixed": W4 | {"overrides": {"*.down_proj": {"bits": 8}, "*.q_proj": {"group_size": 64}}},
    "head": W4 | {"lm_head": True},
    "rounded inputs": {"method": "dynamic"},
}
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[bool, Path]:
    """By whether the head is the embeddings."""
    folder = tmp_path_factory.mktemp("models")
    return {
        tied: make_model(folder / str(tied), intermediate_size=128, tie_word_embeddings=tied) for tied in (True, False)
    }


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("tied", [True, False])
def test_planned_bytes_are_those_that_are_written(
    name: str, tied: bool, models: Mapping[bool, Path], tmp_path: Path
) -> None:
    spec, model = STAGES[name], models[tied]
    stage = {"kind": "quantize", **spec} if spec else {"kind": "prune", "shape": {"intermediate_size": 128}}
    recipe = Recipe.model_validate({"name": "a", "model": str(model), "output": "o", "stages": [stage]})
    planned = foreseen_result(plan_run(recipe, model))
    made = quantized(model, tmp_path / "work", **spec) if spec else model

    for kind in ("auto", "q8_0"):
        file = export_gguf(made, tmp_path / f"{kind}.gguf", kind, reporter=QUIET).files[0]
        stored = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
        to_gguf = ExportSpec(to="gguf", type=kind)
        assert export_bytes(to_gguf, planned) == disk_bytes(to_gguf, planned) == stored, kind
    for kind in ("auto", "f32"):
        written = export_onnx(made, tmp_path / kind, builder(tmp_path / "python"), kind, reporter=QUIET)
        tensors = {}
        for part in (written.folder / "read").glob("*.safetensors"):
            tensors |= load_file(part)
        read = sum(4 * each.numel() if each.is_floating_point() else each.nbytes for each in tensors.values())
        to_onnx = ExportSpec(to="onnx", type=kind)
        assert export_bytes(to_onnx, planned) == read, kind
        assert disk_bytes(to_onnx, planned) == (2 * read if spec else read)
