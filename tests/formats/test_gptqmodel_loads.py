"""The script that compares GPTQModel with a dequantized twin: the twin itself, which needs no GPTQModel."""

import runpy
from pathlib import Path

import pytest
import torch
from quantized import quantize
from random_models import make_model, random_tokens

from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightOnlyStage
from compress.system.progress import Reporter


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_twin_has_the_weights_of_the_file(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gpt_neox keeps its head in the files under another name than in the model."""
    folder = make_model(tmp_path / "model", family, intermediate_size=128)
    stage = WeightOnlyStage(kind="quantize", method="rtn", group_size=32, format="gptq")
    context = Context(torch.device("cpu"), torch.float32, None, random_tokens(1, 8), Reporter(quiet=True), False)
    quantize(stage, Checkpoint(folder), tmp_path / "work", context)
    written = tmp_path / "work" / "checkpoint"
    for name in ("GPTQMODEL_CPU_WORKERS", "TORCHDYNAMO_DISABLE"):
        monkeypatch.setenv(name, "1")  # which the script sets, for its own process
    script = runpy.run_path(str(Path(__file__).with_name("gptqmodel_loads.py")))
    twin, quantized = script["dequantized_twin"](written)
    view, weights = DequantizedCheckpoint(Checkpoint(written)), twin.state_dict()
    assert quantized == len(view.grids) == (14 if family == "llama" else 8)
    for name, tensor in view.load(view.tensors).items():
        assert torch.equal(weights[name.replace("embed_out.", "lm_head.")], tensor.half()), name
