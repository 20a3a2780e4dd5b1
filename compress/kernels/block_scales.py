"""The search for scales of ggml's blocks as two kernels; the twins are in `compress.quant.block_scales`.

One kernel searches for a sub-block by itself, all ranges at once as rows of a tile, and ends with its multiples, or
with the units of a block without sub-blocks. The other has the sub-blocks of a block as rows of a tile, tries one range
after another, and ends with the block's units. Weights stream past column by column, from the cache after the first
time. The steps are those of the twin, but its sums run in another order, and where the twin on a GPU divides by a
Python number, torch multiplies by its inverse: of two ranges, or two whole numbers, that are as good as each other
within that noise, the other one may be taken.

Shapes: R rows, the fast axis in memory; s sub-blocks; w columns in one; K ranges tried.
"""

from functools import cache
from math import inf

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.columns import _nearest
from compress.model.gguf.block_types import BlockType

_ROWS = 32
_TINY = tl.constexpr(1e-30)
_OF_SUB = ["weight", "cost", "tried", "unit", "base", "found", "other"]
_OF_BLOCK = ["weight", "cost", "tried", "shares", "unit", "base"]
_NUMBERS = ["rows", "lowest", "highest", "least", "most"]


def sub_multiples(
    weight: Tensor, importance: Tensor, units: tuple[Tensor, Tensor], kind: BlockType, tried: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiples of sub-blocks beside units that are fixed.

    Args:
        weight: float32 [s, w, R], contiguous.
        importance: float32 [s, w].
        units: d and m of their block, float32 [R].
        kind: of the block, which has sub-blocks; uniform.
        tried: from `ranges`.

    Returns:
        What d is multiplied with, and m: float32 [s, R].
    """
    return _of_subs(weight, importance, units, kind, tried)


def plain_units(weight: Tensor, importance: Tensor, kind: BlockType, tried: Tensor) -> tuple[Tensor, Tensor]:
    """The units, float32 [R], of a block [1, w, R] of a kind without sub-blocks; arguments as for `sub_multiples`."""
    step, offset = _of_subs(weight, importance, None, kind, tried)
    return step[0], offset[0]


def _of_subs(
    weight: Tensor, importance: Tensor, units: tuple[Tensor, Tensor] | None, kind: BlockType, tried: Tensor
) -> tuple[Tensor, Tensor]:
    subs, width, rows = weight.shape
    found, other = weight.new_empty(2, subs, rows).unbind()
    unit, base = units or (found, found)  # not read without sub-blocks
    assert weight.is_contiguous()
    _of_sub[(triton.cdiv(rows, _ROWS), subs)](
        weight, importance.contiguous(), tried, unit.contiguous(), base.contiguous(), found, other,
        rows, *_numbers(kind), WIDTH=width, TRIES=tried.shape[1], SCALED=kind.scale_range is not None,
        HAS_MIN=kind.has_min, ROWS=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return found, other


def block_units(
    weight: Tensor, importance: Tensor, kind: BlockType, tried: Tensor, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """The units d and m of a block with sub-blocks.

    Args:
        weight: float32 [s, w, R], contiguous.
        importance: float32 [s, w].
        kind: of the block; uniform.
        tried: from `ranges`.
        shares: float32: what the extreme step and offset are divided by to get units that are tried.

    Returns:
        float32 [R] each, exact in float16; m is 0 in types without minima.
    """
    subs, width, rows = weight.shape
    unit, base = weight.new_empty(2, rows).unbind()
    assert weight.is_contiguous()
    _of_block[(triton.cdiv(rows, _ROWS),)](
        weight, importance.contiguous(), tried, shares, unit, base,
        rows, *_numbers(kind),
        WIDTH=width, SUBS=subs, TRIES=tried.shape[1], SHARES=shares.numel(), HAS_MIN=kind.has_min,
        ROWS=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return unit, base


@cache
def ranges(kind: BlockType, ends: tuple[float, ...], longer: tuple[float, ...], device: torch.device) -> Tensor:
    """What is tried, in the twin's order; as many as a power of two, the last one again at the end.

    Args:
        kind: of the block; uniform.
        ends: with minima: how many steps either end is moved inwards.
        longer: without: how many steps the range is longer than the extreme weight.
        device: where to.

    Returns:
        float32 [2, K]: with minima the shares of a step that steps are, and `ends` of the lower end; without, what the
        extreme weight is divided by.
    """
    steps = kind.levels[-1] - kind.levels[0]
    if kind.has_min:
        found = [((steps - a - b) / steps, a) for a in ends for b in ends]
    else:
        found = [(sign * (more - kind.levels[0]), 0.0) for more in longer for sign in (1, -1)]
    found += found[-1:] * (triton.next_power_of_2(len(found)) - len(found))
    return torch.tensor(found, dtype=torch.float32, device=device).t().contiguous()


def _numbers(kind: BlockType) -> tuple[float, ...]:
    """Lowest and highest level, least and most that a multiple may be."""
    least, most = kind.scale_range or (-inf, inf)
    return float(kind.levels[0]), float(kind.levels[-1]), float(least), float(most)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_OF_SUB)
def _of_sub(
    weight, cost, tried, unit, base, found, other,
    rows, lowest, highest, least, most,
    WIDTH: tl.constexpr, TRIES: tl.constexpr, SCALED: tl.constexpr, HAS_MIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :]
    inside = row < rows
    sub = tl.program_id(1)
    at = weight + sub * WIDTH * rows + row
    costs = cost + sub * WIDTH
    total = tl.sum(tl.load(costs + tl.arange(0, WIDTH)))
    alike = total <= 0  # columns that cost nothing all count the same
    one = tl.where(alike, 1.0 * WIDTH, total)
    low, high, x, xx = _extremes_and_sums(at, costs, alike, inside, rows, WIDTH)
    index = tl.arange(0, TRIES)[:, None]
    step, offset = _range(
        low, high, tl.load(tried + index), tl.load(tried + TRIES + index), lowest, highest, SCALED, HAS_MIN
    )
    q, xq, qq = _moments(at, costs, alike, inside, step, offset, rows, lowest, highest, WIDTH, HAS_MIN)
    step, offset = _fit(one, x, q, xq, qq, SCALED, HAS_MIN)
    loss = _loss(step, offset, one, x, xx, q, xq, qq, HAS_MIN)
    smallest = tl.min(loss, axis=0)[None, :]
    chosen = index == tl.min(tl.where(loss == smallest, index, TRIES), axis=0)[None, :]  # the first of equals
    q = tl.sum(tl.where(chosen, q, 0.0), axis=0)[None, :]
    xq = tl.sum(tl.where(chosen, xq, 0.0), axis=0)[None, :]
    qq = tl.sum(tl.where(chosen, qq, 0.0), axis=0)[None, :]
    q, xq, qq = _again(
        at, costs, alike, inside, smallest, one, x, xx, q, xq, qq, rows, lowest, highest, WIDTH, SCALED, HAS_MIN
    )
    to = sub * rows + row
    if SCALED:
        d = tl.load(unit + row, mask=inside, other=1.0)
        m = tl.load(base + row, mask=inside, other=1.0)
        scale, minimum = _fit_multiples(d, m, one, x, q, xq, qq, least, most, HAS_MIN)
        tl.store(found + to, scale, mask=inside)
        tl.store(other + to, minimum, mask=inside)
    else:
        step, offset = _fit(one, x, q, xq, qq, SCALED, HAS_MIN)
        tl.store(found + to, _half(step), mask=inside)
        tl.store(other + to, _half(offset), mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_OF_BLOCK)
def _of_block(
    weight, cost, tried, shares, unit, base,
    rows, lowest, highest, least, most,
    WIDTH: tl.constexpr, SUBS: tl.constexpr, TRIES: tl.constexpr, SHARES: tl.constexpr, HAS_MIN: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[None, :]
    sub = tl.arange(0, SUBS)[:, None]
    at = weight + sub * WIDTH * rows + row[None, :]
    costs = cost + sub * WIDTH
    total = tl.sum(tl.load(costs + tl.arange(0, WIDTH)[None, :]), axis=1)[:, None]
    alike = total <= 0
    one = tl.where(alike, 1.0 * WIDTH, total)
    low, high, x, xx = _extremes_and_sums(at, costs, alike, inside, rows, WIDTH)
    smallest = tl.full([SUBS, ROWS], float("inf"), tl.float32)
    q = tl.zeros([SUBS, ROWS], tl.float32)
    xq = tl.zeros([SUBS, ROWS], tl.float32)
    qq = tl.zeros([SUBS, ROWS], tl.float32)
    for n in range(TRIES):
        step, offset = _range(low, high, tl.load(tried + n), tl.load(tried + TRIES + n), lowest, highest, True, HAS_MIN)
        new_q, new_xq, new_qq = _moments(at, costs, alike, inside, step, offset, rows, lowest, highest, WIDTH, HAS_MIN)
        step, offset = _fit(one, x, new_q, new_xq, new_qq, True, HAS_MIN)
        loss = _loss(step, offset, one, x, xx, new_q, new_xq, new_qq, HAS_MIN)
        better = loss < smallest
        q = tl.where(better, new_q, q)
        xq = tl.where(better, new_xq, xq)
        qq = tl.where(better, new_qq, qq)
        smallest = tl.where(better, loss, smallest)
    q, xq, qq = _again(
        at, costs, alike, inside, smallest, one, x, xx, q, xq, qq, rows, lowest, highest, WIDTH, True, HAS_MIN
    )
    step, offset = _fit(one, x, q, xq, qq, True, HAS_MIN)
    spread = qq - tl.div_rn(q * q, one) if HAS_MIN else qq
    d, scale = _common_unit(step, spread, sub, shares, least, most, SHARES, SUBS, ROWS)
    m = tl.zeros([ROWS], tl.float32)
    minimum = tl.zeros([SUBS, ROWS], tl.float32)
    if HAS_MIN:
        wanted = -tl.minimum(tl.div_rn(x - d[None, :] * scale * q, one), 0.0)
        m, minimum = _common_unit(wanted, one + minimum, sub, shares, least, most, SHARES, SUBS, ROWS)
    step = d[None, :] * scale
    offset = -m[None, :] * minimum
    q, xq, qq = _moments(at, costs, alike, inside, step, offset, rows, lowest, highest, WIDTH, HAS_MIN)
    d, m = _fit_units(d, m, scale, minimum, one, x, q, xq, qq, HAS_MIN)
    scale, minimum = _fit_multiples(d[None, :], m[None, :], one, x, q, xq, qq, least, most, HAS_MIN)
    d, m = _fit_units(d, m, scale, minimum, one, x, q, xq, qq, HAS_MIN)
    tl.store(unit + row, d, mask=row < rows)
    tl.store(base + row, m, mask=row < rows)


@triton.jit
def _extremes_and_sums(at, costs, alike, inside, stride, WIDTH: tl.constexpr):
    """Lowest and highest weight, and the weighted sums of weights and of their squares."""
    low = tl.load(at, mask=inside, other=0.0)
    high = low
    x = tl.zeros_like(low)
    xx = x
    for c in range(WIDTH):
        value = tl.load(at + c * stride, mask=inside, other=0.0)
        weighted = value * tl.where(alike, 1.0, tl.load(costs + c))
        low = tl.minimum(low, value)
        high = tl.maximum(high, value)
        x += weighted
        xx = tl.fma(weighted, value, xx)
    return low, high, x, xx


@triton.jit
def _range(low, high, first, second, lowest, highest, SCALED: tl.constexpr, HAS_MIN: tl.constexpr):
    """Step and offset of a range that is tried."""
    if HAS_MIN:
        if SCALED:
            low = tl.minimum(low, 0.0)
            high = tl.maximum(high, 0.0)
        inch = tl.div_rn(high - low, highest - lowest)
        step = inch * first
        offset = low + second * inch
    else:
        step = tl.div_rn(tl.maximum(high, -low), first)
        offset = tl.zeros_like(step)
    return step, offset


@triton.jit
def _moments(
    at, costs, alike, inside, step, offset, stride, lowest, highest, WIDTH: tl.constexpr, HAS_MIN: tl.constexpr
):
    """Weighted sums of the nearest levels, of these times the weights, and of their squares."""
    by = _divisor(step)
    q = tl.zeros_like(step)
    xq = q
    qq = q
    for first in range(0, WIDTH, 4):
        for c in tl.static_range(4):  # unrolled, so that several loads and divisions are under way
            value = tl.load(at + (first + c) * stride, mask=inside, other=0.0)
            weighs = tl.where(alike, 1.0, tl.load(costs + first + c))
            moved = value - offset if HAS_MIN else value
            level = _level(tl.div_rn(moved, by), lowest, highest)
            xq = tl.fma(value * weighs, level, xq)
            qq = tl.fma(level * level, weighs, qq)
            if HAS_MIN:
                q = tl.fma(level, weighs, q)
    return q, xq, qq


@triton.jit
def _again(
    at, costs, alike, inside, smallest, one, x, xx, q, xq, qq, stride, lowest, highest,
    WIDTH: tl.constexpr, SCALED: tl.constexpr, HAS_MIN: tl.constexpr,
):  # fmt: skip
    """The moments, or those of the codes nearest to the steps that fit them best, where these lose less."""
    step, offset = _fit(one, x, q, xq, qq, SCALED, HAS_MIN)
    new_q, new_xq, new_qq = _moments(at, costs, alike, inside, step, offset, stride, lowest, highest, WIDTH, HAS_MIN)
    step, offset = _fit(one, x, new_q, new_xq, new_qq, SCALED, HAS_MIN)
    better = _loss(step, offset, one, x, xx, new_q, new_xq, new_qq, HAS_MIN) < smallest
    return tl.where(better, new_q, q), tl.where(better, new_xq, xq), tl.where(better, new_qq, qq)


@triton.jit
def _fit(one, x, q, xq, qq, SCALED: tl.constexpr, HAS_MIN: tl.constexpr):
    """The best steps for codes; where minima are multiples of m, no offset is above zero."""
    step = tl.div_rn(xq, tl.maximum(qq, _TINY))
    offset = tl.zeros_like(step)
    if HAS_MIN:
        alone = step
        spread = qq - tl.div_rn(q * q, one)
        decides = spread > 1e-6 * qq
        covariance = xq - tl.div_rn(x * q, one)
        step = tl.where(decides, tl.div_rn(covariance, tl.where(decides, spread, 1.0)), alone)
        offset = tl.div_rn(x - step * q, one)
        if SCALED:
            above = (offset > 0) | (step < 0)
            step = tl.where(above, tl.maximum(alone, 0.0), step)
            offset = tl.where(above, 0.0, offset)
    return step, offset


@triton.jit
def _loss(step, offset, one, x, xx, q, xq, qq, HAS_MIN: tl.constexpr):
    loss = xx - 2 * step * xq + step * step * qq
    if HAS_MIN:
        loss += offset * (offset * one + 2 * step * q - 2 * x)
    return loss


@triton.jit
def _fit_multiples(d, m, one, x, q, xq, qq, least, most, HAS_MIN: tl.constexpr):
    step, _ = _fit(one, x, q, xq, qq, True, HAS_MIN)
    scale = _level(tl.div_rn(step, _divisor(d)), least, most)
    minimum = tl.zeros_like(scale)
    if HAS_MIN:
        minimum = _level(tl.div_rn(-tl.div_rn(x - d * scale * q, one), _divisor(m)), least, most)
    return scale, minimum


@triton.jit
def _fit_units(d, m, scale, minimum, one, x, q, xq, qq, HAS_MIN: tl.constexpr):
    square = tl.sum(scale * scale * qq, axis=0)
    cross = tl.sum(scale * xq, axis=0)
    alone = tl.where(square > _TINY, tl.div_rn(cross, tl.maximum(square, _TINY)), d)
    if HAS_MIN:
        ones = tl.sum(minimum * minimum * one, axis=0)
        sums = -tl.sum(minimum * x, axis=0)
        mixed = -tl.sum(scale * minimum * q, axis=0)
        determinant = square * ones - mixed * mixed
        both = determinant > 1e-6 * square * ones
        inverse = tl.div_rn(1.0, tl.where(both, determinant, 1.0))
        d = tl.where(both, (cross * ones - sums * mixed) * inverse, alone)
        m = _half(tl.where(both, (sums * square - cross * mixed) * inverse, m))
    else:
        d = alone
    return _half(d), m


@triton.jit
def _common_unit(wanted, cost, sub, shares, least, most, SHARES: tl.constexpr, SUBS: tl.constexpr, ROWS: tl.constexpr):
    """A float16 number and its whole multiples that lie nearest to what is wanted."""
    size = tl.abs(wanted)
    first = tl.min(tl.where(size == tl.max(size, axis=0)[None, :], sub, SUBS), axis=0)
    extreme = tl.sum(tl.where(sub == first[None, :], wanted, 0.0), axis=0)
    extreme = tl.where(least < 0, -extreme, extreme)
    unit = tl.zeros([ROWS], tl.float32)
    times = tl.zeros([SUBS, ROWS], tl.float32)
    smallest = tl.full([ROWS], float("inf"), tl.float32)
    for n in range(SHARES):
        tried = _half(tl.div_rn(extreme, tl.load(shares + n)))
        rounded = _level(tl.div_rn(wanted, _divisor(tried)[None, :]), least, most)
        missed = wanted - tried[None, :] * rounded
        loss = tl.sum(cost * (missed * missed), axis=0)
        better = loss < smallest
        unit = tl.where(better, tried, unit)
        times = tl.where(better[None, :], rounded, times)
        smallest = tl.where(better, loss, smallest)
    return unit, times


@triton.jit
def _level(number, lowest, highest):
    """The nearest whole number between two."""
    return _nearest(tl.minimum(tl.maximum(number, lowest), highest))


@triton.jit
def _divisor(step):
    """A step that can be divided by."""
    return tl.where(tl.abs(step) < _TINY, _TINY, step)


@triton.jit
def _half(number):
    """Float32 numbers as float16 has them, inside its range."""
    return tl.minimum(tl.maximum(number, -65504.0), 65504.0).to(tl.float16).to(tl.float32)
