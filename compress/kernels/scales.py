"""The search for scales and zero points of groups as one kernel; its twin is `compress.quant.scales.group_scales`.

All ranges are tried at once, as rows of a tile; the weights stream past, column by column, so that a group may be as
wide as the matrix. Its sums run in another order than the twin's, and where the twin on a GPU divides by a Python
number, torch multiplies by its inverse: a scale whose float32 value lies within that noise of the middle between two
stored ones may come out as its neighbour.

Shapes: R groups (rows), g columns in a group, K ranges tried.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.columns import _nearest
from compress.quant.grid import Grid

_ROWS = 32
_POINTERS = ["weight", "cost", "shares", "scale", "zero"]
_NUMBERS = ["rows", "column_stride", "middle", "largest", "zero_minimum"]


def group_scales(
    weight: Tensor, importance: Tensor | None, shares: tuple[float, ...], grid: Grid
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group.

    Args:
        weight: float32 [R, g], any strides; columns that are contiguous along R are read fastest.
        importance: float32 [g], contiguous, the cost of a squared error in each column; None for the plain range.
        shares: the ranges to try, as shares of the extreme weight.
        grid: the grid; scales come back rounded to its stored dtype.

    Returns:
        scale float32 [R] and zero float32 [R], as the twin's.
    """
    rows, width = weight.shape
    scale, zero = weight.new_empty(rows), weight.new_empty(rows)
    cost = scale if importance is None else importance  # not read without a search
    tried = _tried(shares, grid.symmetric, weight.device)
    kernel = _symmetric if grid.symmetric else _asymmetric
    kernel[(triton.cdiv(rows, _ROWS),)](
        weight, cost, tried, scale, zero,
        rows, weight.stride(0), weight.stride(1),
        float(grid.middle), float(grid.largest_code), float(grid.zero_minimum),
        WIDTH=width, SEARCH=importance is not None, STORED=str(grid.scale_dtype), EVEN=width % 16 == 0,
        TRIES=tried.numel(), TILE=16, ROWS=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return scale, zero


@cache
def _tried(shares: tuple[float, ...], symmetric: bool, device: torch.device) -> Tensor:
    """Factors of the extreme weight in the twin's order, as many as a power of two: the last one again at the end."""
    factors = [0.0, *(sign * share for share in shares for sign in (1, -1))] if symmetric else list(shares)
    padding = triton.next_power_of_2(len(factors)) - len(factors)
    return torch.tensor(factors + factors[-1:] * padding, dtype=torch.float32, device=device)


@triton.jit
def _stored(scale, STORED: tl.constexpr):
    """`compress.quant.grid.store_scale`; bfloat16 is rounded by hand because Triton's interpreter cuts it off."""
    bits = scale.to(tl.int32, bitcast=True)
    if STORED == "torch.bfloat16":
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) & -65536).to(tl.float32, bitcast=True)
        smallest = 1.1754943508222875e-38
    elif STORED == "torch.float16":
        stored = scale.to(tl.float16).to(tl.float32)
        smallest = 5.960464477539063e-08
    else:
        stored = scale
        smallest = 1.1754943508222875e-38
    return tl.where(tl.abs(stored) < smallest, tl.where(bits < 0, -smallest, smallest), stored)


@triton.jit
def _extremes(
    weight, row, inside, row_stride, column_stride, WIDTH: tl.constexpr, EVEN: tl.constexpr, TILE: tl.constexpr
):
    """Smallest and largest weight of each row; zeros where there is none."""
    column = tl.arange(0, TILE)[:, None]
    at = weight + row[None, :] * row_stride + column * column_stride
    low = tl.load(at, mask=inside[None, :] & ((column < WIDTH) | EVEN), other=float("inf"))
    high = tl.where(low == float("inf"), float("-inf"), low)
    for first in range(TILE, WIDTH, TILE):
        at += TILE * column_stride
        there = inside[None, :] & ((first + column < WIDTH) | EVEN)
        low = tl.minimum(low, tl.load(at, mask=there, other=float("inf")))
        high = tl.maximum(high, tl.load(at, mask=there, other=float("-inf")))
    return tl.where(inside, tl.min(low, axis=0), 0.0), tl.where(inside, tl.max(high, axis=0), 0.0)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _symmetric(
    weight, cost, shares, scale, zero,
    rows, row_stride, column_stride, middle, largest, zero_minimum,
    WIDTH: tl.constexpr, SEARCH: tl.constexpr, STORED: tl.constexpr, EVEN: tl.constexpr,
    TRIES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    low, high = _extremes(weight, row, inside, row_stride, column_stride, WIDTH, EVEN, TILE)
    top = middle - 1.0
    positive = tl.maximum(tl.div_rn(high, top), tl.div_rn(-low, middle))
    negative = tl.maximum(tl.div_rn(high, middle), tl.div_rn(-low, top))
    found = _stored(tl.where(positive <= negative, positive, -negative), STORED)
    if SEARCH:
        full = found
        index = tl.arange(0, TRIES)[:, None]
        extreme = tl.div_rn(tl.maximum(tl.maximum(-low, high), 1.1754943508222875e-38), middle)
        tried = tl.where(index == 0, full[None, :], extreme[None, :] * tl.load(shares + index))
        cross = tl.zeros([TRIES, ROWS], tl.float32)
        square = tl.zeros([TRIES, ROWS], tl.float32)
        at = weight + row * row_stride
        for first in range(0, WIDTH, 4):
            for c in tl.static_range(4):  # unrolled, so that several loads are under way
                there = EVEN or first + c < WIDTH
                value = tl.load(at, mask=inside & there, other=0.0)
                weighs = tl.load(cost + first + c, mask=there, other=0.0)
                code = _nearest(tl.minimum(tl.maximum(tl.div_rn(value[None, :], tried), -middle), top))
                cross = tl.fma((value * weighs)[None, :], code, cross)
                square = tl.fma(code * code, weighs, square)
                at += column_stride
        gain = tl.div_rn(cross * cross, tl.maximum(square, 1e-30))
        chosen = tl.min(tl.where(gain == tl.max(gain, axis=0)[None, :], index, TRIES), axis=0)  # the first of equals
        fitted = tl.where(square > 1e-30, tl.div_rn(cross, tl.maximum(square, 1e-30)), full[None, :])
        found = _stored(tl.sum(tl.where(index == chosen[None, :], fitted, 0.0), axis=0), STORED)
        found_loss = tl.zeros([TILE, ROWS], tl.float32)
        full_loss = tl.zeros([TILE, ROWS], tl.float32)
        column = tl.arange(0, TILE)[:, None]
        tile = weight + row[None, :] * row_stride + column * column_stride
        for first in range(0, WIDTH, TILE):
            there = (first + column < WIDTH) | EVEN
            value = tl.load(tile, mask=inside[None, :] & there, other=0.0)
            weighs = tl.load(cost + first + column, mask=there, other=0.0)
            code = _nearest(tl.minimum(tl.maximum(tl.div_rn(value, found[None, :]), -middle), top))
            missed = tl.fma(-code, found[None, :], value)
            found_loss += weighs * (missed * missed)
            code = _nearest(tl.minimum(tl.maximum(tl.div_rn(value, full[None, :]), -middle), top))
            missed = tl.fma(-code, full[None, :], value)
            full_loss += weighs * (missed * missed)
            tile += TILE * column_stride
        found = tl.where(tl.sum(found_loss, axis=0) <= tl.sum(full_loss, axis=0), found, full)
    tl.store(scale + row, found, mask=inside)
    tl.store(zero + row, tl.zeros([ROWS], tl.float32) + middle, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _asymmetric(
    weight, cost, shares, scale, zero,
    rows, row_stride, column_stride, middle, largest, zero_minimum,
    WIDTH: tl.constexpr, SEARCH: tl.constexpr, STORED: tl.constexpr, EVEN: tl.constexpr,
    TRIES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = row < rows
    low, high = _extremes(weight, row, inside, row_stride, column_stride, WIDTH, EVEN, TILE)
    low = tl.minimum(low, 0.0)[None, :]
    high = tl.maximum(high, 0.0)[None, :]
    if SEARCH:
        index = tl.arange(0, TRIES)[:, None]
        share = tl.load(shares + index)
        plain, offset = _asymmetric_range(low * share, high * share, largest, zero_minimum, STORED)
        at = weight + row * row_stride
        plain_loss, cross, square = _losses(
            at, cost, plain, offset, inside, column_stride, largest, WIDTH, EVEN, TRIES, ROWS
        )
        fitted = tl.where(square > 0, tl.div_rn(cross, tl.maximum(square, 1e-30)), plain)
        fitted = _stored(fitted, STORED)
        fitted_loss, cross, square = _losses(
            at, cost, fitted, offset, inside, column_stride, largest, WIDTH, EVEN, TRIES, ROWS
        )
        least = tl.minimum(tl.min(plain_loss, axis=0), tl.min(fitted_loss, axis=0))[None, :]
        first = tl.where(plain_loss == least, 2 * index, tl.where(fitted_loss == least, 2 * index + 1, 2 * TRIES))
        chosen = tl.min(first, axis=0)[None, :]  # the first of equals, in the twin's order
        better = tl.where(chosen == 2 * index, plain, tl.where(chosen == 2 * index + 1, fitted, 0.0))
        found = tl.sum(better, axis=0)
        found_zero = tl.sum(tl.where(chosen // 2 == index, offset, 0.0), axis=0)
    else:
        found, found_zero = _asymmetric_range(low, high, largest, zero_minimum, STORED)
        found = tl.reshape(found, [ROWS])
        found_zero = tl.reshape(found_zero, [ROWS])
    tl.store(scale + row, found, mask=inside)
    tl.store(zero + row, found_zero, mask=inside)


@triton.jit
def _asymmetric_range(low, high, largest, zero_minimum, STORED: tl.constexpr):
    steps = tl.div_rn(high - low, largest)
    if zero_minimum > 0:
        steps = tl.maximum(steps, tl.div_rn(high, largest - zero_minimum))
    scale = _stored(steps, STORED)
    zero = tl.minimum(tl.maximum(tl.div_rn(-low, scale), zero_minimum), largest)
    return scale, _nearest(zero)


@triton.jit
def _losses(
    at, cost, tried, offset, inside, column_stride, largest,
    WIDTH: tl.constexpr, EVEN: tl.constexpr, TRIES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Loss of every range tried, and the two sums of which the scale that fits its codes is the quotient."""
    loss = tl.zeros([TRIES, ROWS], tl.float32)
    cross = tl.zeros([TRIES, ROWS], tl.float32)
    square = tl.zeros([TRIES, ROWS], tl.float32)
    for first in range(0, WIDTH, 4):
        for c in tl.static_range(4):
            there = EVEN or first + c < WIDTH
            value = tl.load(at, mask=inside & there, other=0.0)[None, :]
            weighs = tl.load(cost + first + c, mask=there, other=0.0)
            level = _nearest(tl.minimum(tl.maximum(tl.div_rn(value, tried), -offset), largest - offset))
            missed = value - level * tried
            loss = tl.fma(missed * missed, weighs, loss)
            cross = tl.fma(value * level, weighs, cross)
            square = tl.fma(level * level, weighs, square)
            at += column_stride
    return loss, cross, square
