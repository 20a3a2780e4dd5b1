"""Two checkpoints compared, a few tokens at a time: the figures of whole windows, without their logits in memory."""

from pathlib import Path

import pytest
import torch
from random_models import load_stock, make_model, random_tokens
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.evaluate import divergence
from compress.evaluate.compare import compare
from compress.evaluate.divergence import TokenDivergence, summarise, token_divergence
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.system.progress import Reporter

LENGTH, WINDOWS, VOCABULARY = 40, 3, 4096


@pytest.mark.parametrize("rows", [1, 7, 39, 1000])
def test_logits_are_bounded_and_the_figures_are_those_of_whole_windows(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", "llama", torch.float32)
    other = make_model(tmp_path / "other", "llama", torch.float32, rms_norm_eps=0.03)
    tokens = random_tokens(WINDOWS, LENGTH)
    models = [load_stock(folder, torch.float32) for folder in (base, other)]
    whole = [token_divergence(*(m(w[None]).logits[0, :-1] for m in models), w[1:]) for w in tokens]
    columns = zip(*(vars(window).values() for window in whole), strict=True)
    stacked = TokenDivergence(*(torch.stack(column) for column in columns))
    expected = summarise(stacked, dataset="random", sequence_length=LENGTH, dtype="float32")
    largest: list[int] = []
    usual = LayerStream.logits

    def spied(stream: LayerStream, hidden: Tensor, keep: int = 0) -> Tensor:
        logits = usual(stream, hidden, keep)
        largest.append(logits.numel())
        return logits

    monkeypatch.setattr(LayerStream, "logits", spied)
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 3 * 4 * VOCABULARY * rows)
    context = Context(
        torch.device("cpu"), torch.float32, None, tokens[:1, :2], Reporter(quiet=True), trust_remote_code=False
    )
    windows = TokenSet(tokens, "random", "random", None)
    views = [DequantizedCheckpoint(Checkpoint(folder)) for folder in (base, other)]
    found = compare(views[0], views[1], windows, context, tmp_path / "cache", "id")
    assert max(largest) == VOCABULARY * min(rows, LENGTH - 1)
    assert sum(largest) == 2 * VOCABULARY * WINDOWS * (LENGTH - 1)
    for part, names in (("perplexity", ("base", "compressed")), ("kl", ("mean", "p99")), ("top1_agreement", ("mean",))):
        for name in names:
            assert found[part][name] == pytest.approx(expected[part][name], rel=1e-5)
    assert found["kl_per_window"] == pytest.approx(expected["kl_per_window"], rel=1e-5)
    assert found["kl"]["mean"] > 1e-3


def test_damaged_logits_are_named_by_their_place_in_the_window() -> None:
    logits = torch.zeros(4, 8)
    logits[2, 3] = torch.inf
    with pytest.raises(divergence.NumericalError, match=r"first at token 12"):
        token_divergence(logits, torch.zeros(4, 8), torch.zeros(4, dtype=torch.long), first=10)
