"""GPTQ and round-to-nearest on ggml's block grids.

The walk is that of `compress.quant.gptq`: a column is rounded to the level nearest to what the errors before have made
of its weight. When a block is entered its d and m are chosen for its weights as they have moved by then, and when a
sub-block is entered its multiples of d and m are chosen afresh. The activation order moves whole blocks, sub-blocks
inside them and columns inside those, so that the file keeps the stored order.

Rows are independent. On a CPU each core walks with some of them, in parts that do not depend on the number of cores.

Shapes: O output rows, I input columns, R rows of a part, S blocks, s sub-blocks, w columns in one.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels import usable
from compress.kernels.replayed import DIRECTLY, Replays
from compress.model.gguf.block_types import BlockType
from compress.quant.block_scales import (
    Multiples,
    Steps,
    Units,
    block_units,
    divisor,
    nearest_levels,
    refit_units,
    steps_of,
    sub_multiples,
    to_levels_,
)
from compress.quant.blocks import Blocked, to_codes
from compress.quant.gptq import Factor, importance, moved_weights
from compress.quant.scales import Clip
from compress.system.parallel import on_cores

_SPAN = 256  # columns between two products with all errors before them; a multiple of every block's width
_INNER = 16  # columns between two products inside a sub-block
_ROWS = 1024  # of a part


class _Found(NamedTuple):
    """A part of the rows, in the visiting order.

    Args:
        codes: uint8 [I, R].
        units: of each block, [S, R].
        multiples: of each sub-block, [s, R].
        loss: of each row, float32 [R].
    """

    codes: Tensor
    units: Units
    multiples: Multiples
    loss: Tensor


def block_order(importance: Tensor, kind: BlockType, act_order: bool) -> Tensor:
    """Order of the columns, int64 [I]: blocks by their largest importance, sub-blocks in them, columns in these.

    Args:
        importance: [I], the Hessian's diagonal.
        kind: of the blocks, whose width divides I.
        act_order: False keeps the stored order.
    """
    order = torch.arange(importance.numel(), device=importance.device)
    if not act_order:
        return order
    columns = importance.view(-1, kind.sub_blocks, kind.sub_width)
    order = order.view_as(columns).gather(2, columns.argsort(dim=2, descending=True, stable=True))
    subs = columns.amax(2).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, subs[..., None].expand_as(order))
    return order[columns.amax((1, 2)).argsort(descending=True, stable=True)].flatten()


def block_gptq(
    weight: Tensor, factor: Factor, kind: BlockType, clip: Clip, replays: Replays = DIRECTLY
) -> tuple[Blocked, Tensor]:
    """Quantize one matrix with error feedback.

    Args:
        weight: [O, I].
        factor: of the Hessian of the matrix's inputs, in an order from `block_order`.
        kind: of the blocks, whose width divides I.
        clip: what the search for scales weighs columns by ("none" as "mse": there are no scales without a search).
        replays: runs the steps of the kernels on a GPU.

    Returns:
        The matrix, and each row's loss (w - w^) H (w - w^)^T under the damped Hessian, float32 [O].
    """
    weighs = importance(factor.pivot, clip)
    weighs = torch.ones_like(factor.pivot) if weighs is None else weighs
    found = _by_rows(weight.float().t()[factor.order], lambda part: _walk(part, factor, kind, weighs, replays))
    return _in_stored_order(found, factor.order, kind), found.loss


def block_rtn(weight: Tensor, importance: Tensor, kind: BlockType) -> Blocked:
    """Quantize one matrix [O, I] without error feedback.

    Args:
        weight: [O, I].
        importance: [I], weighs the search for scales.
        kind: of the blocks, whose width divides I.
    """
    weighs = importance.float().view(-1, kind.sub_blocks, kind.sub_width)

    def rounded(part: Tensor) -> _Found:
        codes, units, multiples = [], [], []
        for block, cost in zip(part.view(*weighs.shape, -1), weighs, strict=True):
            found = block_units(block, cost, kind)
            times = sub_multiples(block, cost, found, kind, thorough=True)
            found = refit_units(block, cost, found, times, kind)
            codes.append(to_codes(nearest_levels(block, steps_of(found, times), kind).flatten(0, 1), kind))
            units.append(found)
            multiples.append(times)
        return _Found(torch.cat(codes), *_joined(units, multiples), part.new_zeros(part.shape[1]))

    order = torch.arange(weight.shape[1], device=weight.device)
    return _in_stored_order(_by_rows(weight.float().t().contiguous(), rounded), order, kind)


def _by_rows(work: Tensor, solve: Callable[[Tensor], _Found]) -> _Found:
    """What `solve` makes of weights [I, O], on a CPU in parts of some rows, [I, R] each."""
    if work.device.type != "cpu":
        return solve(work)
    parts = on_cores(lambda part: solve(part.contiguous()), work.chunk(-(-work.shape[1] // _ROWS), 1))
    units = Units(*(torch.cat(each, 1) for each in zip(*(p.units for p in parts), strict=True)))
    multiples = Multiples(*(torch.cat(each, 1) for each in zip(*(p.multiples for p in parts), strict=True)))
    return _Found(torch.cat([p.codes for p in parts], 1), units, multiples, torch.cat([p.loss for p in parts]))


def _joined(units: Sequence[Units], multiples: Sequence[Multiples]) -> tuple[Units, Multiples]:
    """Units of several blocks, and multiples of their sub-blocks, as one."""
    return (
        Units(*(torch.stack(each) for each in zip(*units, strict=True))),
        Multiples(*(torch.cat(each) for each in zip(*multiples, strict=True))),
    )


def _walk(work: Tensor, factor: Factor, kind: BlockType, importance: Tensor, replays: Replays) -> _Found:
    """Quantize weights [I, R], in the visiting order."""
    if usable(work) and kind.uniform:
        from compress.kernels.block_solver import Search, solve_blocks  # here, because it imports triton

        search = Search(kind, block_units, sub_multiples)
        found = solve_blocks(work.contiguous(), factor.feedback, factor.pivot, importance, search, replays)
        return _Found(found.codes, Units(found.d, found.m), Multiples(found.scale, found.minimum), found.loss)
    feedback, width = factor.feedback, kind.sub_width
    error, levels = torch.empty_like(work), torch.empty_like(work)
    loss = work.new_zeros(work.shape[1])
    units, multiples = [], []
    for start in range(0, len(work), _SPAN):
        span = slice(start, min(start + _SPAN, len(work)))
        targets = torch.addmm(work[span], feedback[:start, span].t(), error[:start])
        if kind.scale_range is not None:
            moved = moved_weights(work[span], targets, feedback[span, span]).contiguous()
            parts = moved.view(-1, width, moved.shape[1])
            units.append(block_units(parts, importance[span].view(-1, width), kind))
        for first in range(start, span.stop, width):
            sub = slice(first, first + width)
            target, inside = targets[first - start :][:width], feedback[sub, sub]
            if first > start:
                target.addmm_(feedback[start:first, sub].t(), error[start:first])
            moved = moved_weights(work[sub], target, inside).contiguous()[None]
            if kind.scale_range is None:
                units.append(block_units(moved, importance[None, sub], kind))
            times = sub_multiples(moved, importance[None, sub], units[-1], kind)
            multiples.append(times)
            steps = steps_of(units[-1], times)
            loss += _quantize_columns(
                work[sub], target, inside, factor.pivot[sub], steps, kind, levels[sub], error[sub]
            )
    return _Found(to_codes(levels, kind), *_joined(units, multiples), loss)


def _quantize_columns(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    pivot: Tensor,
    steps: Steps,
    kind: BlockType,
    levels: Tensor,
    error: Tensor,
) -> Tensor:
    """Column loop of one sub-block [w, R], in place, as in `compress.quant.gptq`.

    `target` holds the weights plus the feedback of everything before; `levels` and `error` (w - w^) are filled. Both
    sides are taken less the offset, so that levels times step are what they should be.

    Returns:
        The loss of each row, float32 [R].
    """
    step, by = steps.step[0], divisor(steps.step[0])
    if kind.has_min:
        weight, target = weight - steps.offset, target.sub_(steps.offset)
    columns = len(target)
    for first in range(0, columns, _INNER):
        last = min(first + _INNER, columns)
        for column in range(first, last):
            level = to_levels_(torch.div(target[column], by, out=levels[column]), kind)
            missed = torch.addcmul(weight[column], level, step, value=-1, out=error[column])
            if column + 1 < last:
                target[column + 1 : last].addr_(feedback[column, column + 1 : last], missed)
        if last < columns:
            target[last:].addmm_(feedback[first:last, last:].t(), error[first:last])
    return pivot @ torch.addcmul(target, levels, steps.step, value=-1).square_()


def _in_stored_order(found: _Found, order: Tensor, kind: BlockType) -> Blocked:
    """Undo the visiting order."""
    codes = torch.empty_like(found.codes)
    codes[order] = found.codes
    blocks, subs = (
        order[::width].div(width, rounding_mode="floor").argsort() for width in (kind.width, kind.sub_width)
    )
    d, m = (each[blocks].t().contiguous().half() for each in found.units)
    scales, mins = (each[subs].t().contiguous().to(torch.int16) for each in found.multiples)
    scaled = kind.scale_range is not None
    return Blocked(
        type=kind,
        codes=codes.t().contiguous(),
        d=d,
        m=m if kind.has_min else None,
        scales=scales if scaled else None,
        mins=mins if scaled and kind.has_min else None,
    )
