"""Losses over next tokens straight from hidden states: logits exist for a chunk of rows at a time, never for all.

For 8192 tokens and 128256 logits each of student and teacher, float32 logits alone are 4.2 GB a model, and autograd
keeps several such tensors. Here a chunk's logits of both models are made, turned into losses and into the gradient of
the student's logits, and that into its parts of the gradients of hidden states and head, all in the forward pass
(Hsu et al. 2024, Liger Kernel, arXiv 2410.10989). The backward pass only multiplies by what arrives.

What is rounded: operands of products have the dtype of the hidden states (float32 on a CPU), logits, losses and sums
over chunks are float32, the gradient of logits is rounded once to the operands' dtype, the results once to their own.
In float16 a gradient below 6e-8 becomes 0.

Shapes: N rows (tokens with a loss), n rows of a chunk, V vocabulary, D width, K draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.errors import ModelError
from compress.kernels import usable
from compress.train.losses.cross_entropy import cross_entropy
from compress.train.losses.forward_kl import forward_kl, sampled_kl
from compress.train.losses.inputs import Head, Sampled
from compress.train.losses.jsd import jsd
from compress.train.losses.reverse_kl import reverse_kl

TERMS = ("kl", "reverse_kl", "jsd", "ce")

_CHUNK_BYTES = 1280 * 2**20  # of [n, V] tensors on a GPU: 1024 rows of 128256 logits; fewer leave it idle in products
_CPU_CHUNK_BYTES = 256 * 2**20
_CPU_COPIES = 10  # float32 [n, V] tensors alive at once in the twin
_TILE = 128  # rows of a matrix unit's tile


@dataclass(frozen=True)
class Weights:
    """What each term counts; 0 leaves it out.

    Args:
        kl: T^2 KL(teacher || student).
        reverse_kl: T^2 KL(student || teacher).
        jsd: T^2 times the generalised Jensen-Shannon divergence.
        ce: cross-entropy of the targets, always at T = 1.
        temperature: T > 0, divides the logits of both models.
        beta: the teacher's share in the mixture of `jsd`, between 0 and 1.
    """

    kl: float = 0.0
    reverse_kl: float = 0.0
    jsd: float = 0.0
    ce: float = 0.0
    temperature: float = 1.0
    beta: float = 0.5

    @property
    def factors(self) -> tuple[float, float, float, float]:
        """The weights, in the order of TERMS."""
        return self.kl, self.reverse_kl, self.jsd, self.ce


Teacher = tuple[Tensor, Head] | Sampled
_Draws = tuple[Tensor, Tensor, Tensor]
_Cap = tuple[float, float | None]


def logit_loss(
    hidden: Tensor,
    head: Head,
    weights: Weights,
    *,
    targets: Tensor | None,
    teacher: Teacher | None,
    vocabulary: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted terms, summed over rows. Under autocast, products are in its dtype, as a linear's are.

    Args:
        hidden: [N, D], the student's last hidden states; rows without a loss are left out by the caller.
        head: the student's; gradients reach its weight and bias.
        weights: where all are 0, nothing is computed, and the loss is a constant 0.
        targets: int64 [N], for `ce`; a row whose target lies outside the vocabulary has no cross-entropy.
        teacher: hidden states [N, any width] and head, which get no gradient, or draws from the predictions at T = 1,
            which `kl` and `ce` alone can use. None for `ce` alone.
        vocabulary: the first so many logits of both models exist, the rest is padding; None: all.

    Returns:
        The loss, a float32 scalar, differentiable once; and the sum of each used term without its weight, detached.

    Raises:
        ModelError: the two models have other numbers of logits.
    """
    factors = weights.factors
    width = _vocabulary(head, teacher, vocabulary)
    assert min(factors) >= 0 and weights.temperature > 0 and 0 < weights.beta < 1, weights
    assert not weights.ce or targets is not None, "ce needs targets"
    assert not any(factors[:3]) or teacher is not None, "all but ce need a teacher"
    if isinstance(teacher, Sampled):
        assert not weights.reverse_kl and not weights.jsd and weights.temperature == 1, "draws give kl at T = 1 alone"
    if not any(factors):
        return hidden.new_zeros((), dtype=torch.float32), {}
    if isinstance(teacher, tuple):
        teacher = _as_in_a_linear(teacher[0].detach()), teacher[1]
    inputs = (_as_in_a_linear(hidden), head.weight, head.bias)
    wanted = [torch.is_grad_enabled() and tensor is not None and tensor.requires_grad for tensor in inputs]
    problem = _Problem(head, weights, targets, teacher if any(factors[:3]) else None, width, wanted)
    loss, sums = _LogitLoss.apply(*inputs, problem)  # type: ignore[no-untyped-call]
    return loss, {name: sums[n] for n, name in enumerate(TERMS) if factors[n]}


def _as_in_a_linear(hidden: Tensor) -> Tensor:
    """In autocast's dtype, under autocast."""
    device = hidden.device.type
    return hidden.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden


def _vocabulary(head: Head, teacher: Teacher | None, vocabulary: int | None) -> int:
    """Logits that exist in both models."""
    ours = head.weight.shape[0]
    theirs = teacher[1].weight.shape[0] if isinstance(teacher, tuple) else ours
    if vocabulary is None and ours != theirs:
        raise ModelError(
            f"training: the teacher has {theirs} logits and the student {ours}; only models with the same vocabulary "
            "can be compared: choose a teacher that has the student's tokenizer"
        )
    if vocabulary is not None and not 0 < vocabulary <= min(ours, theirs):
        raise ModelError(
            f"training: a vocabulary of {vocabulary} tokens, where the student has {ours} logits and the teacher "
            f"{theirs}; both must have one for each token: choose a teacher that has the student's tokenizer"
        )
    return ours if vocabulary is None else vocabulary


@dataclass(frozen=True)
class _Problem:
    """What `logit_loss` is given, checked; `wanted` says whether hidden, weight and bias need a gradient."""

    head: Head
    weights: Weights
    targets: Tensor | None
    teacher: Teacher | None
    vocabulary: int
    wanted: Sequence[bool]


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            losses, gradients = _solve(hidden, weight, bias, problem)
        ctx.save_for_backward(*gradients)  # of these, as float32: rounded when they are multiplied, and only then
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        sums = losses.sum(dim=1)
        ctx.mark_non_differentiable(sums)
        return sums @ sums.new_tensor(problem.weights.factors), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, arriving: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *(
            None if gradient is None else torch.mul(gradient, arriving, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ), None


def _solve(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem
) -> tuple[Tensor, list[Tensor | None]]:
    """Each term of each row, float32 [4, N], and the wanted gradients of their weighted sum, float32, or None."""
    tokens, width = len(hidden), problem.vocabulary
    head, teacher, dtype = problem.head, problem.teacher, _operands_dtype(hidden)
    matrix, offset = weight[:width].to(dtype), None if bias is None else bias[:width]
    of_hidden, of_weight, of_bias = problem.wanted
    d_hidden = torch.empty_like(hidden, dtype=torch.float32) if of_hidden else None
    d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
    d_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and of_bias else None
    losses = hidden.new_zeros(len(TERMS), tokens, dtype=torch.float32)
    rows = min(tokens, _rows_at_once(width, hidden.device.type, dtype))
    student_buffer = hidden.new_empty(rows, width, dtype=torch.float32)
    gradient_buffer = hidden.new_empty(rows, width, dtype=dtype) if any(problem.wanted) else None
    predictions = _Predictions(teacher, rows, width) if isinstance(teacher, tuple) else None
    caps = ((head.scale, head.softcap), (1.0, None) if predictions is None else predictions.cap)
    for start in range(0, tokens, max(rows, 1)):
        part = slice(start, min(start + rows, tokens))
        count = part.stop - start
        inputs, logits = hidden[part].to(dtype), student_buffer[:count]
        _logits(inputs, matrix, offset, logits)
        gradient = None if gradient_buffer is None else gradient_buffer[:count]
        divergence(
            logits,
            None if predictions is None else predictions.logits(part),
            (teacher.ids[part], teacher.shares[part], teacher.entropy[part]) if isinstance(teacher, Sampled) else None,
            problem.targets[part] if problem.targets is not None and problem.weights.ce else None,
            problem.weights.factors, problem.weights.temperature, problem.weights.beta, caps,
            losses[:, part], gradient,
        )  # fmt: skip
        if gradient is None:
            continue
        if d_hidden is not None:
            _product(gradient, matrix, d_hidden[part])
        if d_weight is not None:
            _add_product(d_weight[:width], gradient.t(), inputs)
        if d_bias is not None:
            d_bias[:width] += gradient.sum(dim=0, dtype=torch.float32)
    return losses, [d_hidden, d_weight, d_bias]


class _Predictions:
    """A teacher's logits, a chunk at a time, always in the same memory."""

    def __init__(self, teacher: tuple[Tensor, Head], rows: int, width: int) -> None:
        self._hidden, head = teacher
        self.cap = head.scale, head.softcap
        self._dtype = _operands_dtype(self._hidden)
        self._matrix = head.weight[:width].to(self._dtype)
        self._bias = None if head.bias is None else head.bias[:width]
        self._buffer = self._hidden.new_empty(rows, width, dtype=torch.float32)

    def logits(self, part: slice) -> Tensor:
        inputs = self._hidden[part].to(self._dtype)
        logits = self._buffer[: len(inputs)]
        _logits(inputs, self._matrix, self._bias, logits)
        return logits


def _operands_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.device.type == "cpu" else hidden.dtype


def _rows_at_once(vocabulary: int, device: str, dtype: torch.dtype) -> int:
    """Rows of a chunk; many are a multiple of a tile's."""
    if device == "cpu":
        return max(1, _CPU_CHUNK_BYTES // (_CPU_COPIES * 4 * vocabulary))
    rows = _CHUNK_BYTES // ((8 + dtype.itemsize) * vocabulary)
    return rows // _TILE * _TILE or max(1, rows)


def _logits(inputs: Tensor, matrix: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Fill `out`, float32 [n, V], with inputs [n, D] matrix [V, D]^T + bias [V]."""
    _product(inputs, matrix.t(), out)
    if bias is not None:
        out += bias


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Fill `out`, float32, without rounding 16-bit factors further."""
    if left.dtype == torch.float32:
        torch.mm(left, right, out=out)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add to `total`, float32, inside the product."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def divergence(
    student: Tensor, teacher: Tensor | None, draws: _Draws | None, targets: Tensor | None,
    factors: Sequence[float], temperature: float, beta: float, caps: tuple[_Cap, _Cap],
    losses: Tensor, gradient: Tensor | None,
) -> None:  # fmt: skip
    """Every used term of a chunk of rows, and the gradient of their weighted sum with respect to the raw logits.

    Args:
        student: float32 [n, V], h W^T + b, before scale and softcap.
        teacher: float32 [n, V], the same of the teacher.
        draws: ids int64 [n, K], shares float32 [n, K] and entropy float32 [n], instead of `teacher`.
        targets: int64 [n], where `ce` is used.
        factors: weight of each term, in the order of TERMS; those at 0 are left out.
        temperature: T.
        beta: of the Jensen-Shannon divergence.
        caps: scale and softcap of the student's head, and of the teacher's.
        losses: float32 [4, n]; the rows of used terms are filled.
        gradient: [n, V], of the operands' dtype; filled. None leaves it out.
    """
    if usable(student):
        from compress.kernels.divergence import divergence as fused  # here, because it imports triton

        fused(student, teacher, draws, targets, factors, temperature, beta, caps, losses, gradient)
        return
    logits = _capped(student, caps[0])
    log_q = torch.log_softmax(logits / temperature, dim=1)
    log_p = log_q if teacher is None else torch.log_softmax(_capped(teacher, caps[1]) / temperature, dim=1)
    total = torch.zeros_like(logits)
    for n, factor in enumerate(factors):
        if not factor:
            continue
        if TERMS[n] == "kl":
            loss, slope = forward_kl(log_p, log_q, temperature) if draws is None else sampled_kl(log_q, *draws)
        elif TERMS[n] == "reverse_kl":
            loss, slope = reverse_kl(log_p, log_q, temperature)
        elif TERMS[n] == "jsd":
            loss, slope = jsd(log_p, log_q, temperature, beta)
        else:
            assert targets is not None
            warm = log_q if temperature == 1 else torch.log_softmax(logits, dim=1)
            loss, slope = cross_entropy(warm, targets)
        losses[n] = loss
        total.add_(slope, alpha=factor)
    if gradient is not None:
        scale, softcap = caps[0]
        gradient.copy_(total.mul_(scale) if softcap is None else total.mul_(scale * (1 - (logits / softcap).square())))


def _capped(raw: Tensor, cap: _Cap) -> Tensor:
    """softcap(scale * raw)."""
    scale, softcap = cap
    scaled = raw if scale == 1 else raw * scale
    return scaled if softcap is None else (scaled / softcap).tanh_().mul_(softcap)
