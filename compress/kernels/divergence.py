"""Losses over next tokens from a chunk's logits, and their gradient, as one kernel: a program takes a row.

The twin is `compress.train.losses.fused.divergence`, where each term's formula stands in a file of its own. The row
passes by two or three times: for the normalisers of both models (each thread keeps its own maximum and sum), for the
means that the slopes of the reverse KL and the Jensen-Shannon divergence need, and for the slopes. All is float32
and rounded once, when the gradient is stored. Entries with a draw are written again at the end, with what the draws
take off.

Shapes: n rows, V vocabulary (the width), K draws.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048  # logits of a model that a program has in registers


def divergence(
    student: Tensor, teacher: Tensor | None, draws: tuple[Tensor, Tensor, Tensor] | None, targets: Tensor | None,
    factors: Sequence[float], temperature: float, beta: float,
    caps: tuple[tuple[float, float | None], tuple[float, float | None]], losses: Tensor, gradient: Tensor | None,
) -> None:  # fmt: skip
    """As the twin. All tensors are contiguous along their last dimension."""
    rows, width = student.shape
    kl, reverse, jsd, ce = factors
    (scale, cap), (teacher_scale, teacher_cap) = caps
    ids, shares, entropy = (student, student, student) if draws is None else [part.contiguous() for part in draws]
    drawn = 0 if draws is None else ids.shape[1]
    assert draws is None or drawn > 0
    assert student.stride(1) == losses.stride(1) == 1
    assert teacher is None or (teacher.shape == student.shape and teacher.stride(1) == 1)
    assert gradient is None or (gradient.shape == student.shape and gradient.stride(1) == 1)
    _rows[(rows,)](
        student, student if teacher is None else teacher, student if gradient is None else gradient, losses,
        student if targets is None else targets.contiguous(), ids, shares, entropy,
        student.stride(0), student.stride(0) if teacher is None else teacher.stride(0),
        student.stride(0) if gradient is None else gradient.stride(0), losses.stride(0),
        float(kl), float(reverse), float(jsd), float(ce), float(temperature), 1.0 / temperature, float(beta),
        float(scale), float(cap or 1.0), float(teacher_scale), float(teacher_cap or 1.0),
        WIDTH=width, KL=kl > 0 and draws is None, REVERSE=reverse > 0, JSD=jsd > 0, CE=ce > 0,
        COLD=ce > 0 and temperature != 1, DRAWN=drawn, DRAWS=triton.next_power_of_2(drawn) if drawn else 0,
        CAPPED=cap is not None, TEACHER_CAPPED=teacher_cap is not None, GRADIENT=gradient is not None,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)), num_warps=16 if reverse or jsd else 8,
    )  # fmt: skip


@triton.jit
def _rows(
    student, teacher, gradient, losses, targets, ids, shares, entropy,
    student_stride, teacher_stride, gradient_stride, losses_stride,
    kl, reverse_kl, jsd, ce, temperature, inverse, beta, scale, cap, teacher_scale, teacher_cap,
    WIDTH: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, CE: tl.constexpr,
    COLD: tl.constexpr, DRAWN: tl.constexpr, DRAWS: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    gradient += row * gradient_stride
    losses += row
    TAUGHT: tl.constexpr = KL or REVERSE or JSD
    log_q, log_p, log_warm = _normalisers(
        student, teacher, inverse, scale, cap, teacher_scale, teacher_cap,
        WIDTH, TAUGHT, COLD, CAPPED, TEACHER_CAPPED, BLOCK,
    )  # fmt: skip
    target = -1
    factor = 0.0  # of q in the slope of the cross-entropy
    if CE:
        asked = tl.load(targets + row)
        there = (asked >= 0) & (asked < WIDTH)
        target = tl.where(there, asked, -1).to(tl.int32)
        factor = tl.where(there, ce, 0.0)
        found = _capped(tl.load(student + target, mask=target >= 0, other=0.0), scale, cap, CAPPED)
        tl.store(losses + 3 * losses_stride, tl.where(target >= 0, log_warm - found, 0.0))
    drawn = 0.0  # of q in the slope of the draws
    if DRAWS:
        total, loss = _draws(student, ids, shares, row, log_q, scale, cap, WIDTH, DRAWN, DRAWS, CAPPED)
        tl.store(losses, loss - tl.load(entropy + row))
        drawn = kl * total
    mean_ratio = 0.0
    mean_mixed = 0.0
    if REVERSE or JSD:
        reverse_loss, mean_ratio, jsd_loss, mean_mixed = _means(
            student, teacher, log_q, log_p, inverse, beta, scale, cap, teacher_scale, teacher_cap,
            WIDTH, CAPPED, TEACHER_CAPPED, BLOCK,
        )  # fmt: skip
        if REVERSE:
            tl.store(losses + losses_stride, temperature * temperature * tl.maximum(reverse_loss, 0.0))
        if JSD:
            tl.store(losses + 2 * losses_stride, temperature * temperature * tl.maximum(jsd_loss, 0.0))
    if KL or GRADIENT:
        kl_loss = _slopes(
            student, teacher, gradient, log_q, log_p, log_warm, mean_ratio, mean_mixed, target, factor, drawn,
            kl * temperature, reverse_kl * temperature, jsd * temperature * (1 - beta), inverse, beta,
            scale, cap, teacher_scale, teacher_cap,
            WIDTH, KL, REVERSE, JSD, CE, COLD, DRAWS, CAPPED, TEACHER_CAPPED, GRADIENT, BLOCK,
        )  # fmt: skip
        if KL:
            tl.store(losses, temperature * temperature * tl.maximum(kl_loss, 0.0))
    if DRAWS and GRADIENT:
        tl.debug_barrier()  # what is written again was written by other threads
        _slopes_of_draws(
            student, gradient, ids, shares, row, log_q, target, factor, factor + drawn, kl,
            scale, cap, WIDTH, DRAWN, DRAWS, CAPPED,
        )  # fmt: skip


@triton.jit
def _expm1(u):
    """e^u - 1 of u <= 0, a series near 0."""
    series = u * (1 + u / 2 * (1 + u / 3 * (1 + u / 4 * (1 + u / 5 * (1 + u / 6 * (1 + u / 7))))))
    return tl.where(u > -0.25, series, tl.exp(u) - 1)


@triton.jit
def _log1p(x):
    """ln(1 + x) of -1 < x <= 0: near 0 the series of 2 artanh(x / (2 + x))."""
    s = x / (2 + x)
    square = s * s
    series = 2 * s * (1 + square * (1.0 / 3 + square * (1.0 / 5 + square * (1.0 / 7 + square * (1.0 / 9)))))
    return tl.where(x > -0.3, series, tl.log(1 + x))


@triton.jit
def _tanh(x):
    e = _expm1(-2 * tl.abs(x))
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def _capped(raw, scale, cap, CAPPED: tl.constexpr):
    logits = raw * scale
    if CAPPED:
        logits = cap * _tanh(logits / cap)
    return logits


@triton.jit
def _add(top, total, logits):
    """The largest logit so far and the sum of exponentials below it, for each lane."""
    difference = logits - top
    smaller = tl.exp(-tl.abs(difference))
    return tl.maximum(top, logits), tl.where(difference > 0, total * smaller + 1, total + smaller)


@triton.jit
def _log_sum(top, total):
    highest = tl.max(top, axis=0)
    return highest + tl.log(tl.sum(total * tl.exp(top - highest), axis=0))


@triton.jit
def _normalisers(
    student, teacher, inverse, scale, cap, teacher_scale, teacher_cap,
    WIDTH: tl.constexpr, TAUGHT: tl.constexpr, COLD: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logarithms of the normalisers: the student's and the teacher's at T, the student's at 1."""
    column = tl.arange(0, BLOCK)
    top_q = tl.full([BLOCK], -1e30, tl.float32)
    top_p = tl.full([BLOCK], -1e30, tl.float32)
    top_warm = tl.full([BLOCK], -1e30, tl.float32)
    sum_q = tl.zeros([BLOCK], tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_warm = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + column
        inside = at < WIDTH
        logits = _capped(tl.load(student + at, mask=inside, other=0.0), scale, cap, CAPPED)
        top_q, sum_q = _add(top_q, sum_q, tl.where(inside, logits * inverse, float("-inf")))
        if COLD:
            top_warm, sum_warm = _add(top_warm, sum_warm, tl.where(inside, logits, float("-inf")))
        if TAUGHT:
            logits = _capped(tl.load(teacher + at, mask=inside, other=0.0), teacher_scale, teacher_cap, TEACHER_CAPPED)
            top_p, sum_p = _add(top_p, sum_p, tl.where(inside, logits * inverse, float("-inf")))
    log_q = _log_sum(top_q, sum_q)
    log_p = log_q
    if TAUGHT:
        log_p = _log_sum(top_p, sum_p)
    log_warm = log_q
    if COLD:
        log_warm = _log_sum(top_warm, sum_warm)
    return log_q, log_p, log_warm


@triton.jit
def _mixed(d, beta):
    """Both ln p - ln m and ln q - ln m from d = ln p - ln q."""
    above = _log1p(_expm1(-tl.abs(d)) * tl.where(d > 0, 1 - beta, beta))
    return tl.minimum(d, 0.0) - above, tl.minimum(-d, 0.0) - above


@triton.jit
def _means(
    student, teacher, log_q, log_p, inverse, beta, scale, cap, teacher_scale, teacher_cap,
    WIDTH: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Reverse KL and the student's mean of ln q - ln p; Jensen-Shannon divergence and the mean of ln q - ln m."""
    column = tl.arange(0, BLOCK)
    excess = tl.zeros([BLOCK], tl.float32)
    ratios = tl.zeros([BLOCK], tl.float32)
    divergences = tl.zeros([BLOCK], tl.float32)
    mixes = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + column
        inside = at < WIDTH
        logits = _capped(tl.load(student + at, mask=inside, other=0.0), scale, cap, CAPPED)
        taught = _capped(tl.load(teacher + at, mask=inside, other=0.0), teacher_scale, teacher_cap, TEACHER_CAPPED)
        of_q = tl.fma(logits, inverse, -log_q)
        of_p = tl.fma(taught, inverse, -log_p)
        q = tl.where(inside, tl.exp(of_q), 0.0)
        p = tl.where(inside, tl.exp(of_p), 0.0)
        weighted = q * (of_q - of_p)
        ratios += weighted
        excess += weighted + (p - q)
        p_mixed, q_mixed = _mixed(of_p - of_q, beta)
        divergences += beta * p * p_mixed + (1 - beta) * q * q_mixed
        mixes += q * q_mixed
    return tl.sum(excess, axis=0), tl.sum(ratios, axis=0), tl.sum(divergences, axis=0), tl.sum(mixes, axis=0)


@triton.jit
def _slopes(
    student, teacher, gradient, log_q, log_p, log_warm, mean_ratio, mean_mixed, target, factor, drawn,
    kl, reverse_kl, jsd, inverse, beta, scale, cap, teacher_scale, teacher_cap,
    WIDTH: tl.constexpr, KL: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, CE: tl.constexpr,
    COLD: tl.constexpr, DRAWS: tl.constexpr, CAPPED: tl.constexpr, TEACHER_CAPPED: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Stores the gradient, but for what draws take off; returns the forward KL."""
    column = tl.arange(0, BLOCK)
    loss = tl.zeros([BLOCK], tl.float32)
    for first in range(0, WIDTH, BLOCK):
        at = first + column
        inside = at < WIDTH
        logits = _capped(tl.load(student + at, mask=inside, other=0.0), scale, cap, CAPPED)
        of_q = tl.fma(logits, inverse, -log_q)
        q = tl.where(inside, tl.exp(of_q), 0.0)
        slope = tl.zeros([BLOCK], tl.float32)
        if KL or REVERSE or JSD:
            taught = _capped(tl.load(teacher + at, mask=inside, other=0.0), teacher_scale, teacher_cap, TEACHER_CAPPED)
            of_p = tl.fma(taught, inverse, -log_p)
            if KL:
                p = tl.where(inside, tl.exp(of_p), 0.0)
                loss += p * (of_p - of_q) + (q - p)
                slope += kl * (q - p)
            if REVERSE:
                slope += reverse_kl * q * ((of_q - of_p) - mean_ratio)
            if JSD:
                p_mixed, q_mixed = _mixed(of_p - of_q, beta)
                slope += jsd * q * (q_mixed - mean_mixed)
        if DRAWS:
            slope += drawn * q
        if CE:
            warm = q
            if COLD:
                warm = tl.exp(logits - log_warm)
            slope += factor * (warm - tl.where(at == target, 1.0, 0.0))
        if GRADIENT:
            if CAPPED:
                share = logits / cap
                slope *= 1 - share * share
            tl.store(gradient + at, (slope * scale).to(gradient.dtype.element_ty), mask=inside)
    return tl.sum(loss, axis=0)


@triton.jit
def _draws(
    student, ids, shares, row, log_q, scale, cap,
    WIDTH: tl.constexpr, DRAWN: tl.constexpr, DRAWS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The shares' sum, which is 1, and the cross-entropy of the draws."""
    k = tl.arange(0, DRAWS)
    drawn = tl.load(ids + row * DRAWN + k, mask=k < DRAWN, other=-1)
    inside = (drawn >= 0) & (drawn < WIDTH)
    share = tl.load(shares + row * DRAWN + k, mask=inside, other=0.0)
    logits = _capped(tl.load(student + drawn, mask=inside, other=0.0), scale, cap, CAPPED)
    return tl.sum(share, axis=0), tl.sum(share * (log_q - logits), axis=0)


@triton.jit
def _slopes_of_draws(
    student, gradient, ids, shares, row, log_q, target, factor, of_q, kl, scale, cap,
    WIDTH: tl.constexpr, DRAWN: tl.constexpr, DRAWS: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """The whole gradient of entries that were drawn. One that was drawn twice is written twice, with the same value."""
    k = tl.arange(0, DRAWS)
    drawn = tl.load(ids + row * DRAWN + k, mask=k < DRAWN, other=-1)
    inside = (drawn >= 0) & (drawn < WIDTH)
    share = tl.zeros([DRAWS], tl.float32)
    for other in range(0, DRAWN):
        same = drawn == tl.load(ids + row * DRAWN + other)
        share += tl.where(same, tl.load(shares + row * DRAWN + other), 0.0)
    logits = _capped(tl.load(student + drawn, mask=inside, other=0.0), scale, cap, CAPPED)
    slope = of_q * tl.exp(logits - log_q) - kl * share - tl.where(drawn == target, factor, 0.0)
    if CAPPED:
        part = logits / cap
        slope *= 1 - part * part
    tl.store(gradient + drawn, (slope * scale).to(gradient.dtype.element_ty), mask=inside)
