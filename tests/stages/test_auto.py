"""`method: auto` judged by what the finished model says, on weights that were trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantized import quantize
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.calibration import load_calibration, load_windows
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightActivationStage
from compress.recipe.text import CalibrationSpec
from compress.system.progress import Reporter

CPU, DTYPE = torch.device("cpu"), torch.float32
CALIBRATION = Path(__file__).parent.parent.parent / "calibration" / "text" / "general_en.jsonl.gz"


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def log_probabilities(folder: Path, tokens: Tensor) -> Tensor:
    """What stock transformers says after each token, its inputs rounded where the checkpoint's are: [W, S, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE)
    return torch.log_softmax(model(tokens, use_cache=False).logits, -1)


@pytest.mark.parametrize(("dtype", "budget"), [("int8", 2.0), ("fp8", 0.05)])
def test_the_finished_model_is_never_worse_than_both(
    tmp_path: Path, tiny_model: Path, dtype: str, budget: float
) -> None:
    """KL to the original on WikiText-2, with scales from web pages; with these budgets auto takes some of each."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    spec = CalibrationSpec(source=str(CALIBRATION), samples=4, sequence_length=256)
    text = load_windows("wikitext2", tokenizer, sequence_length=256, windows=4).tokens
    context = Context(CPU, DTYPE, load_calibration(spec, tokenizer), text[:1], Reporter(quiet=True), False)
    base = log_probabilities(tiny_model, text)
    divergence: dict[str, float] = {}
    static: dict[str, int] = {}
    for method in ("static", "dynamic", "auto"):
        settings = {"method": method, "dtype": dtype, "weight_rounding": "rtn", "budget": budget}
        stage = WeightActivationStage.model_validate({"kind": "quantize"} | settings)
        record = quantize(stage, Checkpoint(tiny_model), tmp_path / method, context)
        found = log_probabilities(tmp_path / method / "checkpoint", text)
        divergence[method] = float((base.exp() * (base - found)).sum(-1).mean())
        static[method] = sum(module.inputs == "static" for layer in record.layers for module in layer.modules)
    assert static["dynamic"] == 0 and 5 < static["auto"] < static["static"] - 5 and static["static"] == 42
    assert 0 < divergence["auto"] <= max(divergence["static"], divergence["dynamic"]) * 1.001, divergence
