"""Two checkpoints compared, a few tokens at a time: the figures of whole windows, without their logits in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from random_models import load_stock, make_model, random_tokens
from torch import Tensor
from transformers import AutoTokenizer

from compress.data.calibration import TokenSet
from compress.evaluation import divergence
from compress.evaluation.compare import compare
from compress.evaluation.divergence import TokenDivergence, summarise, token_divergence
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.system.compute import pick_dtype
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
    places = 2 * WINDOWS  # that are looked at once more
    assert sum(largest) == 2 * VOCABULARY * (WINDOWS * (LENGTH - 1) + places)
    _check_worst(found["worst"], stacked, [m(tokens).logits.softmax(-1) for m in models], tokens, base)
    for part, names in (("perplexity", ("base", "compressed")), ("kl", ("mean", "p99")), ("top1_agreement", ("mean",))):
        for name in names:
            assert found[part][name] == pytest.approx(expected[part][name], rel=1e-5)
    assert found["kl_per_window"] == pytest.approx(expected["kl_per_window"], rel=1e-5)
    assert found["kl"]["mean"] > 1e-3


def _check_worst(
    worst: list[dict[str, Any]], expected: TokenDivergence, shares: list[Tensor], tokens: Tensor, folder: Path
) -> None:
    """The two largest of each window, largest first, and what both models expect there."""
    largest = expected.kl.topk(2, dim=1)
    there = sorted(
        ((kl, w, at + 1) for w in range(WINDOWS) for kl, at in zip(*(x[w].tolist() for x in largest), strict=True)),
        reverse=True,
    )
    assert [(place["window"], place["position"]) for place in worst] == [(w, at) for _, w, at in there]
    assert [place["kl"] for place in worst] == pytest.approx([kl for kl, _, _ in there], rel=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for place in worst:
        window, at = place["window"], place["position"]
        assert place["came"] == tokenizer.decode(tokens[window, at : at + 1])
        assert place["before"] == tokenizer.decode(tokens[window, max(0, at - 24) : at])
        for name, share in zip(("base", "compressed"), shares, strict=True):
            values, ids = share[window, at - 1].topk(3)
            assert [token for token, _ in place[name]] == [tokenizer.decode([token]) for token in ids.tolist()]
            assert [p for _, p in place[name]] == pytest.approx(values.tolist(), rel=1e-4)


@pytest.mark.parametrize("front", [1, 2])
def test_what_the_tokenizer_puts_in_front_is_seen_and_not_scored(front: int, tmp_path: Path) -> None:
    """The command's figures are those of stock transformers, on windows that are cut here."""
    base = make_model(tmp_path / "base", "llama", torch.float32)
    names, text = ["<|endoftext|>", "the"][:front], "The fox ran over the hills, and nobody saw it. " * 30
    file = json.loads((base / "tokenizer.json").read_text())
    ids = {name: file["model"]["vocab"][name] for name in names}
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": n, "type_id": 0}} for n in names),
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in ids.items()},
    }
    (base / "tokenizer.json").write_text(json.dumps(file))
    (tmp_path / "t.txt").write_text(text)
    bare = torch.tensor(AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False)["input_ids"])
    lost, computed = torch.empty(0), pick_dtype(torch.device("cpu"), torch.bfloat16)
    for window in bare[: 3 * (32 - front)].view(3, -1):
        tokens = torch.cat([torch.tensor([*ids.values()]), window])
        with torch.no_grad():
            logits = load_stock(base, computed)(tokens[None]).logits[0, front - 1 : -1].float()
        lost = torch.cat([lost, torch.nn.functional.cross_entropy(logits, window, reduction="none")])
    options = ["--text", tmp_path / "t.txt", "--sequence-length", 32, "--windows", 3, "--device", "cpu"]
    done = invoke("eval", base, base, *options, "--work-dir", tmp_path / "work")
    assert done.exit_code == 0, done.stderr
    quality = json.loads(done.stdout)
    assert quality["perplexity"]["base"] == pytest.approx(float(lost.mean().exp()), rel=1e-5)
    assert quality["perplexity"]["tokens"] == lost.numel() == 3 * (32 - front)
    assert f"each starts with {' '.join(names)}, as the tokenizer starts a text" in quality["protocol"]


def test_damaged_logits_are_named_by_their_place_in_the_window() -> None:
    logits = torch.zeros(4, 8)
    logits[2, 3] = torch.inf
    with pytest.raises(divergence.NumericalError, match=r"first at token 12"):
        token_divergence(logits, torch.zeros(4, 8), torch.zeros(4, dtype=torch.long), first=10)
