"""How far a compressed model moved from its base, token by token, and the figures that a report states.

Perplexity alone can stay still while the answers change, so the distance of the two next-token distributions is
measured too: KL(base || candidate) and whether both rank the same token first (Dutta et al. 2024, "Accuracy is Not
All You Need", arXiv:2407.09141; `llama-perplexity --kl-divergence` of llama.cpp prints the same kinds of figures).

Left out: running the models (the caller has the logits), and benchmark tasks.

Shapes: N tokens, V vocabulary, W windows, T scored tokens of a window (S - 1; fewer behind a longer prefix).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ModelError, NumericalError
from compress.loop.finite import all_finite

CHUNK_BYTES = 256 * 2**20
"""Working memory of a comparison, beside the logits of as many rows of both models."""

RESAMPLES = 2000
SEED = 0

_FLOAT32_COPIES = 3  # [rows, V] tensors alive at once in `_divergence`
_LARGEST_EXPONENT = 700.0  # exp of it is still finite: JSON has no infinity


@dataclass(frozen=True)
class TokenDivergence:
    """Figures per scored token; every tensor has the same shape, [N] or [W, T].

    Args:
        nll_base: float32, -ln p(target) of the base model, nats.
        nll_candidate: float32, the same of the candidate.
        kl: float32, KL(base || candidate) over the whole vocabulary, nats, >= 0.
        agree: bool, the two models rank the same token first.
    """

    nll_base: Tensor
    nll_candidate: Tensor
    kl: Tensor
    agree: Tensor


def rows_at_once(vocabulary: int, chunk_bytes: int | None = None) -> int:
    """Rows of [rows, V] that a comparison takes at once (one at least), in `chunk_bytes` (CHUNK_BYTES by default)."""
    return max(1, (chunk_bytes or CHUNK_BYTES) // (_FLOAT32_COPIES * 4 * vocabulary))


def token_divergence(
    base_logits: Tensor, candidate_logits: Tensor, targets: Tensor, chunk_bytes: int | None = None, first: int = 0
) -> TokenDivergence:
    """Compares two models at every token, a few rows at a time.

    Args:
        base_logits: [N, V], any float dtype; row n predicts `targets[n]`. Left as it is.
        candidate_logits: [N, V], on the same device.
        targets: int64 [N], the tokens that came next.
        chunk_bytes: as in `rows_at_once`.
        first: place of the first row in its window, for errors.

    Returns:
        Tensors [N] on the device of the logits.

    Raises:
        ModelError: the two vocabularies differ in size.
        NumericalError: NaN or inf in the logits of the base or of the candidate.
    """
    tokens, vocabulary = base_logits.shape
    if candidate_logits.shape[1] != vocabulary:
        raise ModelError(
            f"evaluation: the base model has {vocabulary} logits and the candidate {candidate_logits.shape[1]}; "
            "only models with the same vocabulary can be compared"
        )
    assert candidate_logits.shape[0] == tokens and targets.shape == (tokens,)
    rows = rows_at_once(vocabulary, chunk_bytes)
    with torch.no_grad():
        chunks = [
            _divergence(base_logits[n : n + rows], candidate_logits[n : n + rows], targets[n : n + rows], first + n)
            for n in range(0, max(tokens, 1), rows)
        ]
    return TokenDivergence(*(torch.cat(column) for column in zip(*chunks, strict=True)))


def _divergence(base_NV: Tensor, candidate_NV: Tensor, targets_N: Tensor, first: int) -> tuple[Tensor, ...]:
    """The fields of TokenDivergence for a chunk that starts at token `first`.

    KL is summed as p (ln p - ln q) + q - p, the divergence of two positive measures that need not sum to one
    (Csiszár 1975): every term is >= 0 and has no slope at p = q, so the rounding of the two normalisers enters
    squared. What is left is the rounding of exp, 6e-8 nats a token; sum p (ln p - ln q) errs by 1e-6 and goes below 0.
    """
    for name, logits in (("base", base_NV), ("compressed", candidate_NV)):
        if not all_finite(logits):
            token = first + int((~torch.isfinite(logits).all(dim=1)).nonzero()[0])
            raise NumericalError(
                f"evaluation: the {name} model's logits hold NaN or inf (first at token {token}); "
                "its weights are damaged, or its numbers overflow this dtype: evaluate it in float32"
            )
    agree = base_NV.argmax(dim=1) == candidate_NV.argmax(dim=1)
    log_p = torch.log_softmax(base_NV, dim=1, dtype=torch.float32)
    log_q = torch.log_softmax(candidate_NV, dim=1, dtype=torch.float32)
    nll_base = -log_p.gather(1, targets_N[:, None])[:, 0]
    nll_candidate = -log_q.gather(1, targets_N[:, None])[:, 0]
    terms = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    kl = terms.mul_(p).add_(q.sub_(p)).sum(dim=1).clamp_min_(0)
    return nll_base, nll_candidate, kl, agree


def summarise(
    per_window: TokenDivergence, *, dataset: str, sequence_length: int, dtype: str, prefix: Sequence[str] = ()
) -> dict[str, Any]:
    """The `quality` part of a report.

    Perplexity is exp of the mean negative log-likelihood over all scored tokens (Jelinek et al. 1977), in windows that
    don't overlap. The intervals are 95 % percentile bootstraps (Efron and Tibshirani 1993) that resample whole windows,
    since the tokens of one are not independent; the seed is fixed. One window shows no spread between windows:
    its intervals are None.

    Args:
        per_window: tensors [W, T], W >= 1.
        dataset: name of the evaluation text.
        sequence_length: tokens of a window, S; the prefix of each, or else its first token, is context only.
        dtype: what the models computed in, for the record.
        prefix: the tokens, by name, that the tokenizer starts every text with, and that every window starts with.

    Returns:
        A dict with the fields of `compress.records.Quality`, plain Python numbers.
    """
    windows, scored = per_window.kl.shape
    assert windows >= 1 and scored == sequence_length - max(1, len(prefix))
    kl = _float64(per_window.kl)
    kl_per_window = kl.mean(axis=1)
    agreement_per_window = _float64(per_window.agree).mean(axis=1)
    text = "1 window" if windows == 1 else f"{windows} windows"
    first = "the first token of a window is context only"
    if prefix:
        first = f"each starts with {' '.join(prefix)}, as the tokenizer starts a text, which is context only"
    protocol = (
        f"{text} of {sequence_length} tokens from {dataset}, without overlap; {first}, the other {scored} are "
        "predicted. KL(base || compressed) is taken over the whole vocabulary, in nats per token. "
    )
    if windows == 1:
        protocol += "One window gives no interval."
    else:
        protocol += f"Intervals: 95 % percentile bootstrap over windows, {RESAMPLES} resamples."
    return {
        "perplexity": {
            "base": _perplexity(per_window.nll_base),
            "compressed": _perplexity(per_window.nll_candidate),
            "dataset": dataset,
            "sequence_length": sequence_length,
            "windows": windows,
            "tokens": windows * scored,
        },
        "kl": {
            "mean": float(kl_per_window.mean()),
            "ci95": bootstrap_interval(kl_per_window),
            "p99": float(np.quantile(kl, 0.99)),
        },
        "top1_agreement": {
            "mean": float(agreement_per_window.mean()),
            "ci95": bootstrap_interval(agreement_per_window),
        },
        "tasks": {},
        "kl_per_window": kl_per_window.tolist(),
        "dtype": dtype,
        "protocol": protocol,
    }


def bootstrap_interval(values: NDArray[np.float64]) -> list[float] | None:
    """The 95 % percentile bootstrap interval [low, high] of the mean of `values` [W]; None for fewer than two."""
    if len(values) < 2:
        return None
    picks = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]


def _perplexity(nll: Tensor) -> float:
    return math.exp(min(float(_float64(nll).mean()), _LARGEST_EXPONENT))


def _float64(values: Tensor) -> NDArray[np.float64]:
    array: NDArray[np.float64] = values.cpu().double().numpy()
    return array
