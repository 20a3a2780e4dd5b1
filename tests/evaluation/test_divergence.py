"""Divergence metrics against dense float64 references written here, and the bootstrap against its normal limit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import ModelError, NumericalError
from compress.evaluation.divergence import TokenDivergence, bootstrap_interval, summarise, token_divergence
from compress.records import Quality

ROW_BYTES = 3 * 4  # per vocabulary entry


def _reference(base: np.ndarray, candidate: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Textbook definitions in float64, with no shared code: softmax, -ln p(target), sum p ln(p / q)."""

    def softmax(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    p, q = softmax(base.astype(np.float64)), softmax(candidate.astype(np.float64))
    rows = np.arange(len(targets))
    kl = np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(np.maximum(q, 1e-300))), 0).sum(axis=1)
    return [-np.log(p[rows, targets]), -np.log(q[rows, targets]), kl, base.argmax(axis=1) == candidate.argmax(axis=1)]


def _logits(tokens: int, vocabulary: int, spread: float, noise: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    base = spread * torch.randn(tokens, vocabulary, generator=generator)
    candidate = base + noise * torch.randn(tokens, vocabulary, generator=generator)
    return base, candidate, torch.randint(vocabulary, (tokens,), generator=generator)


@pytest.mark.parametrize("noise", [1e-3, 0.05, 1.0, 8.0])
def test_every_figure_equals_the_float64_reference(noise: float) -> None:
    base, candidate, targets = _logits(37, 1009, 4.0, noise)
    got = token_divergence(base, candidate, targets)
    nll_base, nll_candidate, kl, agree = _reference(base.numpy(), candidate.numpy(), targets.numpy())
    np.testing.assert_allclose(got.nll_base, nll_base, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got.nll_candidate, nll_candidate, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got.kl, kl, rtol=1e-5, atol=1.2e-7)
    np.testing.assert_array_equal(got.agree, agree)
    assert [t.dtype for t in (got.nll_base, got.nll_candidate, got.kl)] == [torch.float32] * 3


def test_a_small_divergence_is_not_lost_in_rounding() -> None:
    base, candidate, targets = _logits(256, 4096, 4.0, 1e-3)
    _, _, kl, _ = _reference(base.numpy(), candidate.numpy(), targets.numpy())
    got = token_divergence(base, candidate, targets).kl.double().numpy()
    log_p, log_q = base.log_softmax(dim=1), candidate.log_softmax(dim=1)
    textbook = (log_p.exp() * (log_p - log_q)).sum(dim=1).double().numpy()  # in float32: some are below zero
    assert textbook.min() < 0 <= got.min()
    assert abs(got - kl).max() < 0.2 * abs(textbook - kl).max()
    np.testing.assert_allclose(got.mean(), kl.mean(), rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 10, 1000])
def test_chunks_give_what_one_piece_gives(dtype: torch.dtype, rows: int) -> None:
    base, candidate, targets = _logits(20, 301, 3.0, 0.5)
    base, candidate = base.to(dtype), candidate.to(dtype)
    before = base.clone(), candidate.clone()
    whole = token_divergence(base, candidate, targets, chunk_bytes=ROW_BYTES * 301 * 20)
    parts = token_divergence(base, candidate, targets, chunk_bytes=ROW_BYTES * 301 * rows)
    for name in ("nll_base", "nll_candidate", "kl", "agree"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-6, atol=1e-7)
    assert torch.equal(base, before[0]) and torch.equal(candidate, before[1])


def test_working_memory_is_the_budget_whatever_the_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    softmax = torch.log_softmax

    def watched(logits: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, logits.numel())
        return softmax(logits, **options)

    monkeypatch.setattr(torch, "log_softmax", watched)
    token_divergence(*_logits(500, 64, 1.0, 1.0), chunk_bytes=ROW_BYTES * 64 * 7)
    assert largest == 7 * 64


@given(seed=st.integers(0, 10_000), spread=st.floats(0, 60), noise=st.floats(0, 60))
@settings(max_examples=60, deadline=None)
def test_kl_is_never_negative_and_zero_at_identity(seed: int, spread: float, noise: float) -> None:
    base, candidate, targets = _logits(8, 129, spread, noise, seed)
    moved = token_divergence(base, candidate, targets)
    assert torch.isfinite(moved.kl).all() and (moved.kl >= 0).all()
    same = token_divergence(base, base.clone(), targets)
    assert (same.kl == 0).all() and same.agree.all() and torch.equal(same.nll_base, same.nll_candidate)


def test_adding_a_constant_to_the_logits_changes_nothing() -> None:
    base, _, targets = _logits(16, 512, 4.0, 0.0)
    assert token_divergence(base, base + 3.0, targets).kl.max() < 1.2e-7


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_non_finite_logits_name_the_model_and_the_token(value: float, which: int) -> None:
    logits = [tensor.clone() for tensor in _logits(9, 33, 1.0, 1.0)]
    logits[which][5, 7] = value
    with pytest.raises(NumericalError, match=rf"the {['base', 'compressed'][which]} model's .*token 5") as caught:
        token_divergence(*logits, chunk_bytes=ROW_BYTES * 33 * 2)
    assert "\n" not in str(caught.value)


def test_other_vocabulary_is_the_users_mistake() -> None:
    with pytest.raises(ModelError, match="33 logits and the candidate 34"):
        token_divergence(torch.zeros(2, 33), torch.zeros(2, 34), torch.zeros(2, dtype=torch.long))


def _windows(windows: int, tokens: int) -> TokenDivergence:
    base, candidate, targets = _logits(windows * tokens, 97, 3.0, 0.7)
    flat = token_divergence(base, candidate, targets)
    return TokenDivergence(
        *(getattr(flat, n).view(windows, tokens) for n in ("nll_base", "nll_candidate", "kl", "agree"))
    )


def test_summary_equals_its_definitions() -> None:
    stacked = _windows(12, 31)
    quality = summarise(stacked, dataset="wiki", sequence_length=32, dtype="float32")
    parsed = Quality.model_validate(quality)  # the field names are the report's
    assert parsed.perplexity.base == pytest.approx(math.exp(stacked.nll_base.double().mean()))
    assert parsed.perplexity.compressed == pytest.approx(math.exp(stacked.nll_candidate.double().mean()))
    assert (parsed.perplexity.tokens, parsed.perplexity.windows, parsed.perplexity.sequence_length) == (12 * 31, 12, 32)
    assert parsed.kl.mean == pytest.approx(float(stacked.kl.double().mean()))
    assert parsed.kl.p99 == pytest.approx(float(torch.quantile(stacked.kl.double(), 0.99)))
    assert parsed.kl_per_window == pytest.approx(stacked.kl.double().mean(dim=1).tolist())
    assert parsed.top1_agreement.mean == pytest.approx(float(stacked.agree.double().mean()))
    assert parsed.kl.ci95 is not None and parsed.kl.ci95[0] < parsed.kl.mean < parsed.kl.ci95[1]
    assert "12 windows of 32 tokens from wiki" in quality["protocol"]
    assert quality == summarise(stacked, dataset="wiki", sequence_length=32, dtype="float32")


def test_the_protocol_says_what_a_window_starts_with() -> None:
    bare = summarise(_windows(2, 31), dataset="wiki", sequence_length=32, dtype="float32")["protocol"]
    assert bare.startswith(
        "2 windows of 32 tokens from wiki, without overlap; the first token of a window is context only, the other 31 "
        "are predicted. "
    )
    quality = summarise(_windows(2, 31), dataset="wiki", sequence_length=32, dtype="float32", prefix=("<bos>",))
    assert quality["protocol"].startswith(
        "2 windows of 32 tokens from wiki, without overlap; each starts with <bos>, as the tokenizer starts a text, "
        "which is context only, the other 31 are predicted. "
    )
    two = summarise(_windows(2, 30), dataset="wiki", sequence_length=32, dtype="float32", prefix=("[gMASK]", "<sop>"))
    assert "each starts with [gMASK] <sop>, as the" in two["protocol"] and two["perplexity"]["tokens"] == 2 * 30


def test_one_window_has_no_interval() -> None:
    quality = summarise(_windows(1, 31), dataset="wiki", sequence_length=32, dtype="float32")
    assert quality["kl"]["ci95"] is None and quality["top1_agreement"]["ci95"] is None
    assert "One window gives no interval" in quality["protocol"]


def test_a_ruined_model_still_has_a_finite_perplexity() -> None:
    lost = torch.full((2, 3), 5000.0)
    quality = summarise(
        TokenDivergence(lost / 5000, lost, lost, lost < 0), dataset="wiki", sequence_length=4, dtype="float32"
    )
    assert 1e300 < quality["perplexity"]["compressed"] < math.inf


def test_bootstrap_tends_to_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(2.0, 0.5, size=400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval == pytest.approx([values.mean() - half, values.mean() + half], abs=0.12 * half)


def test_bootstrap_covers_the_true_mean_about_95_times_of_100() -> None:
    draws = np.random.default_rng(2).gamma(4.0, 0.02, size=(300, 64))  # skewed, as KL per window is
    intervals = [bootstrap_interval(draw) for draw in draws]
    hits = sum(interval is not None and interval[0] <= 0.08 <= interval[1] for interval in intervals)
    assert 0.90 <= hits / len(draws) <= 0.98
