"""Calibration with fewer tokens than a matrix has inputs: said aloud, and never worse than plain rounding."""

import json
from pathlib import Path

import pytest
import torch
from command import invoke
from quant_problems import second_moment
from quantized import quantize
from random_models import load_stock, make_model
from transformers import AutoTokenizer

from compress.data.calibration import TokenSet, load_calibration, load_windows
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.quant.gptq import factorize, gptq, round_to_nearest, visiting_order
from compress.quant.grid import Grid
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.recipe.schema import bundled_dir
from compress.recipe.text import CalibrationSpec
from compress.stages.quantize.few_tokens import AMPLE, damping, few_tokens, trust
from compress.stages.quantize.plan import Matrix
from compress.stages.quantize.solve import Solver
from compress.system.progress import Reporter

CPU = torch.device("cpu")
TRAINED = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
WIDEST = Matrix("model.layers.0.mlp.down_proj", (256, 704), 4, 64, True)
MATRICES = [Matrix("model.layers.0.mlp.up_proj", (704, 256), 4, 64, True), WIDEST]


@pytest.mark.parametrize(("bits", "tokens"), [(3, 64), (4, 1024)])
def test_few_tokens_are_never_worse_than_rounding_on_other_text(tmp_path: Path, bits: int, tokens: int) -> None:
    """KL in stock transformers. Without shrinkage it is 1.5 and 1.1 times that of rounding."""
    tokenizer = AutoTokenizer.from_pretrained(TRAINED)
    held_out = load_windows("wikitext2", tokenizer, sequence_length=256, windows=4).tokens
    source = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
    base = load_stock(TRAINED, torch.float32)
    expected = base(held_out, use_cache=False).logits.log_softmax(-1)

    def kl(tokens: int) -> float:
        """Of GPTQ with so many tokens; 0 rounds to nearest."""
        length = min(tokens, 64) or 64
        spec = CalibrationSpec(source=str(source), samples=max(1, tokens // length), sequence_length=length)
        text = TokenSet(load_calibration(spec, tokenizer).tokens, "t", "t", None)
        stage = WeightOnlyStage(kind="quantize", method="gptq" if tokens else "rtn", bits=bits, group_size=64)
        context = Context(CPU, torch.float32, text, held_out[:1, :32], Reporter(quiet=True), False)
        quantize(stage, Checkpoint(TRAINED), tmp_path / str(tokens), context)
        found = load_stock(tmp_path / str(tokens) / "checkpoint", torch.float32)
        missed = expected - found(held_out, use_cache=False).logits.log_softmax(-1)
        return float((expected.exp() * missed).sum(-1).mean())

    assert kl(tokens) < kl(0)


def test_a_matrix_alone_with_few_tokens_is_never_worse_than_rounding_on_other_inputs() -> None:
    """Correlated inputs, from one token to as many as there are inputs; GPTQ as it is loses up to 64."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=generator) + 6 * torch.eye(128)
    weight = 0.05 * torch.randn(48, 128, generator=generator)
    grid, spec = Grid(3, 64, True), WeightOnlyStage(kind="quantize", bits=3, group_size=64)
    other = second_moment(torch.randn(4096, 128, generator=generator) @ mix)

    def lost(stored: torch.Tensor) -> float:
        return float((((weight - stored) @ other) * (weight - stored)).sum())

    rounded = lost(round_to_nearest(weight, torch.ones(128), grid).dequantize())
    for tokens in (1, 8, 32, 64, 128):
        hessian = second_moment(torch.randn(tokens, 128, generator=generator) @ mix)
        order = visiting_order(hessian.diagonal(), 64, True)
        plain = lost(gptq(weight, factorize(hessian, order, 0.01), grid, "hessian")[0].dequantize())
        solved = Solver(spec, {"m": grid}, tokens).solve({"m": weight}, hessian)["m"]
        assert lost(solved.quantized.dequantize()) < (1.01 if tokens < 32 else 0.98) * rounded  # 1.005 to 0.83
        assert tokens == 128 or plain > 1.05 * rounded  # 1.05 to 1.9
        assert solved.module.damp == pytest.approx(256 / tokens)


def test_ample_tokens_change_nothing() -> None:
    assert damping(int(AMPLE * 704), 704, 0.01) == 0.01
    assert trust(int(AMPLE * 704), 704) == 1.0
    assert damping(704, 704, 0.01) == 2.0
    assert trust(704, 704) == pytest.approx(1 / 3)
    assert damping(704, 704, 4.0) == 4.0  # what the recipe says, where it is more


def test_few_tokens_are_named_with_what_would_be_enough() -> None:
    gptq_stage = WeightOnlyStage(kind="quantize")
    rest = "so they count for less and rounding stays less accurate than it could be; use samples"
    assert few_tokens(gptq_stage, MATRICES, 64, 64) == [
        f"calibration: 64 tokens are fewer than the 704 inputs of model.layers.*.mlp.down_proj, {rest}: 88 or more"
    ]
    assert few_tokens(gptq_stage, MATRICES, 1024, 128) == [
        "calibration: 1024 tokens are fewer than 8 for each of the 704 inputs of model.layers.*.mlp.down_proj, "
        f"{rest}: 44 or more"
    ]
    assert few_tokens(gptq_stage, MATRICES, 44 * 128, 128) == []
    static = {"kind": "quantize", "method": "static"}
    assert few_tokens(WeightActivationStage(**static), MATRICES, 64, 64) != []
    assert few_tokens(WeightActivationStage(**static, weight_rounding="rtn"), MATRICES, 64, 64) == []
    assert few_tokens(WeightOnlyStage(kind="quantize", method="rtn"), MATRICES, 64, 64) == []


def test_a_run_says_that_its_text_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tokens that there were, not by those that were asked for; a dry run by the latter."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    Path("text.txt").write_text("The old library stood at the corner of two quiet streets. " * 9)
    recipe = {
        "name": "r", "model": "model", "output": "out", "evaluate": False,
        "calibration": {"source": "text.txt", "samples": 4, "sequence_length": 16},
        "stages": [{"kind": "quantize", "group_size": 32, "format": "gptq"}],
    }  # fmt: skip
    Path("r.yaml").write_text(json.dumps(recipe))
    line = (
        "calibration: 64 tokens are fewer than the 96 inputs of model.layers.*.mlp.down_proj, so they count for less "
        "and rounding stays less accurate than it could be; use samples: 48 or more"
    )
    dry, done = invoke("run", "r.yaml", "--dry-run"), invoke("run", "r.yaml", "--device", "cpu")
    assert (dry.exit_code, done.exit_code) == (0, 0)
    assert f"warning: {line}\n" in dry.stderr
    assert f"warning: {line}\n" in done.stderr
    assert json.loads(Path("out/report.json").read_text())["warnings"] == [line]
    short = invoke("run", "r.yaml", "--device", "cpu", "--set", "calibration.samples=40")
    assert "warning: calibration: 160 tokens are fewer than 8 for each of the 96 inputs" in short.stderr
