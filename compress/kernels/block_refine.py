"""Coordinate descent on ggml's block grids as two kernels; the twin is `compress.quant.block_refine`.

One sets a sub-block's codes, column by column, and then its multiples; the other a block's d and m. Between them what
they have changed is taken from H (w - w^) of other columns, as one product. In the column loop a thread owns a row, as
in `compress.kernels.columns`; all else are tiles. Each step is that of the twin, with sums in another order: where two
levels are as good as each other within that noise, the other one may be taken.

Shapes: R rows, the fast axis in memory; S blocks; s sub-blocks; w columns in one; n columns of a block, or of a span.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from compress.kernels.block_scales import _TINY, _divisor, _half, _level
from compress.model.gguf.block_types import BlockType

_ROWS = 32
_OF_SUB = ["hessian", "pull", "levels", "error", "moved", "fed", "d", "m", "scale", "minimum"]
_OF_BLOCK = ["levels", "pull", "costs", "against", "error", "moved", "d", "m", "scale", "minimum"]
_NUMBERS = ["rows", "stride", "lowest", "highest", "least", "most"]


class SpanNumbers(NamedTuple):
    """Some blocks of a matrix under way, all float32.

    Args:
        levels: [n, R].
        error: [n, R], w - w^.
        d: [S, R].
        m: [S, R].
        scale: what d is multiplied with, [s, R].
        minimum: what m is multiplied with, [s, R].
    """

    levels: Tensor
    error: Tensor
    d: Tensor
    m: Tensor
    scale: Tensor
    minimum: Tensor


class SpanPull(NamedTuple):
    """What moves them.

    Args:
        pull: float32 [n, R]: H (w - w^) of their columns; kept up to date.
        hessian: float32 [n, n]: H of their columns.
    """

    pull: Tensor
    hessian: Tensor


def refine_span(kind: BlockType, numbers: SpanNumbers, given: SpanPull) -> None:
    """Set all numbers of some blocks once, one after the other, each to the best beside all others.

    Args:
        kind: of the blocks; uniform.
        numbers: all contiguous; changed.
        given: contiguous; its `pull` is changed.
    """
    levels, error, d, m, scale, minimum = numbers
    pull, hessian = given
    sums = hessian.view(len(hessian), -1, kind.sub_width).sum(2)  # over the columns of sub-blocks
    for block, first in enumerate(range(0, len(pull), kind.width)):
        part, units = slice(first, first + kind.width), (d[block], m[block])
        subs = slice(block * kind.sub_blocks, (block + 1) * kind.sub_blocks)
        for sub in range(subs.start, subs.stop):
            own = slice(sub * kind.sub_width, (sub + 1) * kind.sub_width)
            multiples = scale[sub], minimum[sub]
            moved = set_sub_block(hessian[own, own], pull[own], levels[own], error[own], units, multiples, kind)
            pull.addmm_(hessian[:, own], moved, alpha=-1)
        times = scale[subs, None].expand(-1, kind.sub_width, -1).reshape(kind.width, -1)
        costs = hessian[part, part] @ (levels[part] * times)
        against = sums[part, subs] @ minimum[subs] if kind.has_min else costs
        moved = set_units(
            pull[part], levels[part], error[part], costs, against, units, (scale[subs], minimum[subs]), kind
        )
        if part.stop < len(pull):  # or the next span asks for it afresh
            pull.addmm_(hessian[:, part], moved, alpha=-1)


def set_sub_block(
    hessian: Tensor,
    pull: Tensor,
    levels: Tensor,
    error: Tensor,
    units: tuple[Tensor, Tensor],
    multiples: tuple[Tensor, Tensor],
    kind: BlockType,
) -> Tensor:
    """Set the codes of a sub-block, then its multiples where it has any, each to the best beside all others.

    Args:
        hessian: float32 [w, w], rows contiguous: H of its columns.
        pull: float32 [w, R], contiguous: H (w - w^) of its columns.
        levels: float32 [w, R], contiguous; changed.
        error: float32 [w, R], contiguous: w - w^; changed.
        units: d and m of its block, float32 [R].
        multiples: what d is multiplied with, and m: float32 [R]; changed.
        kind: of the block; uniform.

    Returns:
        By how much the values have grown, float32 [w, R].
    """
    width, rows = levels.shape
    moved, fed = levels.new_empty(2, width, rows).unbind()
    least, most = kind.scale_range or (1, 1)
    assert all(tensor.is_contiguous() for tensor in (hessian[0], pull, levels, error, *units, *multiples))
    _sub_block[(triton.cdiv(rows, _ROWS),)](
        hessian, pull, levels, error, moved, fed, *units, *multiples,
        rows, hessian.stride(0), float(kind.levels[0]), float(kind.levels[-1]), float(least), float(most),
        WIDTH=width, HALF=8, SCALED=kind.scale_range is not None, HAS_MIN=kind.has_min,
        ROWS=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return moved


def set_units(
    pull: Tensor,
    levels: Tensor,
    error: Tensor,
    costs: Tensor,
    against: Tensor,
    units: tuple[Tensor, Tensor],
    multiples: tuple[Tensor, Tensor],
    kind: BlockType,
) -> Tensor:
    """Set d and m of a block to the best beside all others.

    Args:
        pull: float32 [n, R], contiguous: H (w - w^) of its columns.
        levels: float32 [n, R], contiguous.
        error: float32 [n, R], contiguous: w - w^; changed.
        costs: float32 [n, R], contiguous: H times what d is multiplied with.
        against: float32 [n, R], contiguous: H times what m is multiplied with and subtracted; not read without minima.
        units: d and m, float32 [R]; changed.
        multiples: what d is multiplied with, and m: float32 [s, R], contiguous.
        kind: of the block.

    Returns:
        By how much the values have grown, float32 [n, R].
    """
    moved = levels.new_empty(levels.shape)
    assert all(tensor.is_contiguous() for tensor in (pull, levels, error, costs, against, *units, *multiples))
    _units[(triton.cdiv(levels.shape[1], _ROWS),)](
        levels, pull, costs, against, error, moved, *units, *multiples,
        levels.shape[1], WIDTH=kind.sub_width, SUBS=kind.sub_blocks, HAS_MIN=kind.has_min,
        ROWS=_ROWS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return moved


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_OF_SUB)
def _sub_block(
    hessian, pull, levels, error, moved, fed, d, m, scale, minimum,
    rows, stride, lowest, highest, least, most,
    WIDTH: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, HAS_MIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    unit = tl.load(d + row, mask=inside, other=1.0)
    times = tl.load(scale + row, mask=inside, other=1.0)
    _columns(hessian, pull, levels, moved, fed, unit * times, row, inside, rows, stride, lowest, highest, WIDTH, HALF)
    column = tl.arange(0, WIDTH)
    tile = row[None, :] + column[:, None] * rows
    mask = inside[None, :]
    grown = tl.load(moved + tile, mask=mask, other=0.0)
    if SCALED:
        level = tl.load(levels + tile, mask=mask, other=0.0)
        pulled = tl.load(pull + tile, mask=mask, other=0.0)
        along = tl.zeros([WIDTH, ROWS], tl.float32)
        total = tl.zeros([WIDTH], tl.float32)
        for k in range(WIDTH):
            factor = tl.load(hessian + k * stride + column)
            shift = tl.load(moved + row + k * rows, mask=inside, other=0.0)
            own = tl.load(levels + row + k * rows, mask=inside, other=0.0)
            pulled = tl.fma(-factor[:, None], shift[None, :], pulled)
            along = tl.fma(factor[:, None], own[None, :], along)
            total += factor
        cost = tl.maximum(tl.sum(along * level, axis=0), _TINY)
        wanted = tl.div_rn(tl.div_rn(tl.sum(pulled * level, axis=0), cost), _divisor(unit))
        found = _level(times + wanted, least, most)
        longer = (found - times) * unit
        grown += level * longer[None, :]
        tl.store(scale + row, found, mask=inside)
        if HAS_MIN:
            pulled = tl.fma(-along, longer[None, :], pulled)
            base = tl.load(m + row, mask=inside, other=1.0)
            old = tl.load(minimum + row, mask=inside, other=0.0)
            wanted = tl.div_rn(tl.div_rn(tl.sum(pulled, axis=0), tl.sum(total)), _divisor(base))
            found = _level(old - wanted, least, most)
            grown -= ((found - old) * base)[None, :]
            tl.store(minimum + row, found, mask=inside)
        tl.debug_barrier()  # all have read the shifts
        tl.store(moved + tile, grown, mask=mask)
    missed = tl.load(error + tile, mask=mask, other=0.0)
    tl.store(error + tile, missed - grown, mask=mask)


@triton.jit
def _columns(
    hessian, pull, levels, moved, fed, step, row, inside, rows, stride, lowest, highest,
    WIDTH: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Set the codes; `moved` is filled with what that adds to the values."""
    by = _divisor(step)
    of_half = tl.arange(0, HALF)
    for first in range(0, WIDTH, HALF):
        column = first + of_half
        tile = row[None, :] + column[:, None] * rows
        pulled = tl.load(pull + tile, mask=inside[None, :], other=0.0)
        for k in range(0, first):  # what earlier halves have moved
            shift = tl.load(moved + row + k * rows, mask=inside, other=0.0)
            factor = tl.load(hessian + k * stride + column)
            pulled = tl.fma(-factor[:, None], shift[None, :], pulled)
        tl.store(fed + tile, pulled, mask=inside[None, :])
        factors = ()  # all that the columns below load is loaded here: none of it waits behind a division
        curves = ()
        before = ()
        for c in tl.static_range(HALF):
            for k in tl.static_range(c):
                factors += (tl.load(hessian + (first + k) * stride + first + c),)
            curves += (tl.load(hessian + (first + c) * (stride + 1)),)
            before += (tl.load(levels + row + (first + c) * rows, mask=inside, other=0.0),)
        tl.debug_barrier()  # the tile is read back as columns
        pulls = ()
        for c in tl.static_range(HALF):
            pulls += (tl.load(fed + row + (first + c) * rows, mask=inside, other=0.0),)
        shifts = ()
        after = ()
        for c in tl.static_range(HALF):
            pulled = pulls[c]
            for k in tl.static_range(c):
                pulled = tl.fma(-factors[c * (c - 1) // 2 + k], shifts[k], pulled)
            level = _level(before[c] + tl.div_rn(pulled, by * curves[c]), lowest, highest)
            shifts += ((level - before[c]) * step,)
            after += (level,)
        for c in tl.static_range(HALF):
            at = row + (first + c) * rows
            tl.store(moved + at, shifts[c], mask=inside)
            tl.store(levels + at, after[c], mask=inside)
        tl.debug_barrier()  # so are the shifts


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_OF_BLOCK)
def _units(
    levels, pull, costs, against, error, moved, d, m, scale, minimum, rows,
    WIDTH: tl.constexpr, SUBS: tl.constexpr, HAS_MIN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    mask = inside[None, :]
    tile = row[None, :] + tl.arange(0, WIDTH)[:, None] * rows
    dd = tl.zeros([WIDTH, ROWS], tl.float32)
    towards_d = tl.zeros([WIDTH, ROWS], tl.float32)
    mm = tl.zeros([WIDTH, ROWS], tl.float32)
    dm = tl.zeros([WIDTH, ROWS], tl.float32)
    towards_m = tl.zeros([WIDTH, ROWS], tl.float32)
    for sub in range(SUBS):
        at = tile + sub * WIDTH * rows
        times = tl.load(scale + sub * rows + row, mask=inside, other=0.0)
        of_d = tl.load(levels + at, mask=mask, other=0.0) * times[None, :]
        pulled = tl.load(pull + at, mask=mask, other=0.0)
        cost = tl.load(costs + at, mask=mask, other=0.0)
        dd = tl.fma(cost, of_d, dd)
        towards_d = tl.fma(pulled, of_d, towards_d)
        if HAS_MIN:
            of_m = -tl.load(minimum + sub * rows + row, mask=inside, other=0.0)[None, :]
            mm = tl.fma(-tl.load(against + at, mask=mask, other=0.0), of_m, mm)
            dm = tl.fma(cost, of_m, dm)
            towards_m = tl.fma(pulled, of_m, towards_m)
    square = tl.sum(dd, axis=0)
    wanted = tl.sum(towards_d, axis=0)
    unit = tl.load(d + row, mask=inside, other=0.0)
    base = tl.load(m + row, mask=inside, other=0.0)
    if HAS_MIN:
        other = tl.sum(mm, axis=0)
        mixed = tl.sum(dm, axis=0)
        wanted_m = tl.sum(towards_m, axis=0)
        determinant = square * other - mixed * mixed
        good = determinant > 1e-6 * square * other
        inverse = tl.where(good, tl.div_rn(1.0, tl.where(good, determinant, 1.0)), 0.0)
        by_d = tl.where(good, (wanted * other - wanted_m * mixed) * inverse, 0.0)
        by_m = tl.where(good, (wanted_m * square - wanted * mixed) * inverse, 0.0)
        new_base = _half(base + by_m)
        tl.store(m + row, new_base, mask=inside)
        by_m = new_base - base
    else:
        by_d = tl.where(square > _TINY, tl.div_rn(wanted, tl.maximum(square, _TINY)), 0.0)
        by_m = base * 0.0
    new_unit = _half(unit + by_d)
    tl.store(d + row, new_unit, mask=inside)
    by_d = new_unit - unit
    for sub in range(SUBS):
        at = tile + sub * WIDTH * rows
        times = tl.load(scale + sub * rows + row, mask=inside, other=0.0)
        grown = tl.load(levels + at, mask=mask, other=0.0) * times[None, :] * by_d[None, :]
        if HAS_MIN:
            grown -= (tl.load(minimum + sub * rows + row, mask=inside, other=0.0) * by_m)[None, :]
        tl.store(moved + at, grown, mask=mask)
        tl.store(error + at, tl.load(error + at, mask=mask, other=0.0) - grown, mask=mask)
