"""GPTQ of one matrix on ggml's block grids on a GPU: kernels, and between them products.

The twin is the walk in `compress.quant.block_gptq`. As in `compress.kernels.solver`, weights as the errors move them
come from a product with the inverse of their block of F; the column loop is that of other grids, since levels times
step are what weights should be once the offset is taken from them.

Shapes: O output rows, I input columns, S blocks, s sub-blocks, w columns in one, n columns of a span.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from compress.kernels.columns import quantize_columns
from compress.kernels.replayed import DIRECTLY, Replays
from compress.kernels.solver import group_blocks
from compress.model.gguf.block_types import BlockType

_SPAN = 256  # columns of a large product; every block's width divides it

Units = TypeVar("Units", bound=tuple[Tensor, Tensor])
Multiples = TypeVar("Multiples", bound=tuple[Tensor, Tensor])


@dataclass(frozen=True)
class Search(Generic[Units, Multiples]):
    """How a block gets its scales.

    Args:
        kind: of the block; uniform.
        block_units: of `compress.quant.block_scales`.
        sub_multiples: of `compress.quant.block_scales`.
    """

    kind: BlockType
    block_units: Callable[[Tensor, Tensor, BlockType], Units]
    sub_multiples: Callable[[Tensor, Tensor, Units, BlockType], Multiples]


class Solution(NamedTuple):
    """A matrix, or a span of its columns, in the visiting order.

    Args:
        error: float32 [I, O], w - w^; the weights before.
        codes: uint8 [I, O].
        d: of each block, float32 [S, O].
        m: of each block, float32 [S, O].
        scale: what d is multiplied with in each sub-block, float32 [s, O].
        minimum: likewise of m.
        loss: of each row, float32 [O].
    """

    error: Tensor
    codes: Tensor
    d: Tensor
    m: Tensor
    scale: Tensor
    minimum: Tensor
    loss: Tensor


class _Given(NamedTuple):
    """What a span is solved with, all float32.

    Args:
        fed: [n, O], feedback of all columns before the span; overwritten.
        feedback: [n, n], F of the span.
        pivot: [n].
        importance: [n].
        inverse: [s, w, w], (F^T)^-1 of each sub-block.
        own: [s, w, w], F of each sub-block.
        whole: (F^T)^-1 of each block.
    """

    fed: Tensor
    feedback: Tensor
    pivot: Tensor
    importance: Tensor
    inverse: Tensor
    own: Tensor
    whole: Tensor


def solve_blocks(
    work: Tensor,
    feedback: Tensor,
    pivot: Tensor,
    importance: Tensor,
    search: Search[Units, Multiples],
    replays: Replays = DIRECTLY,
) -> Solution:
    """Quantize one matrix with error feedback, columns in the visiting order.

    Args:
        work: float32 [I, O], contiguous, the weights; becomes the errors.
        feedback: float32 [I, I], F.
        pivot: float32 [I].
        importance: float32 [I], weighs the search for scales.
        search: for scales.
        replays: runs what is done in a span.
    """
    kind, (columns, rows) = search.kind, work.shape
    d, m = work.new_empty(2, columns // kind.width, rows).unbind()
    scale, minimum = work.new_empty(2, columns // kind.sub_width, rows).unbind()
    solution = Solution(
        work, torch.empty_like(work, dtype=torch.uint8), d, m, scale, minimum, loss=work.new_zeros(rows)
    )
    inverse, own = (torch.stack(each) for each in group_blocks(feedback, kind.sub_width))
    whole = inverse if kind.sub_blocks == 1 else torch.stack(group_blocks(feedback, kind.width)[0])
    fed = work.new_empty(min(_SPAN, columns), rows)
    for start in range(0, columns, _SPAN):
        span = slice(start, min(start + _SPAN, columns))
        blocks, subs = (slice(start // width, span.stop // width) for width in (kind.width, kind.sub_width))
        into = fed[: span.stop - start]
        torch.mm(feedback[:start, span].t(), work[:start], out=into)
        changed = Solution(
            work[span], solution.codes[span], d[blocks], m[blocks], scale[subs], minimum[subs], solution.loss
        )
        given = _Given(
            into, feedback[span, span].contiguous(), pivot[span], importance[span],
            inverse[subs], own[subs], whole[blocks],
        )  # fmt: skip
        replays(_solve_span, search, changed, given)
    return solution


def _solve_span(search: Search[Units, Multiples], found: Solution, given: _Given) -> None:
    """Quantize the columns of a span, which is one block if blocks have sub-blocks."""
    kind, work, fed = search.kind, found.error, given.fed
    (columns, rows), width = work.shape, kind.sub_width
    zero, largest = work.new_full((rows,), -float(kind.levels[0])), kind.levels[-1] - kind.levels[0]
    units: list[Units] = []
    multiples: list[Multiples] = []
    if kind.scale_range is not None:
        moved = torch.addmm(work, given.whole[0], fed).view(-1, width, rows)
        units.append(search.block_units(moved, given.importance.view(-1, width), kind))
    for sub, first in enumerate(range(0, columns, width)):
        part = slice(first, first + width)
        weight, inside, weighs = work[part], fed[part], given.importance[None, part]
        if first > 0:
            inside.addmm_(given.feedback[:first, part].t(), work[:first])
        moved = torch.addmm(weight, given.inverse[sub], inside)[None]
        if kind.scale_range is None:
            units.append(search.block_units(moved, weighs, kind))
        (d, m), times = units[-1], search.sub_multiples(moved, weighs, units[-1], kind)
        multiples.append(times)
        if kind.has_min:
            weight.addcmul_(m, times[1][0])  # less the offset
        step, own = d * times[0][0], given.own[sub]
        quantize_columns(weight, inside, own, given.pivot[part], step, zero, largest, found.codes[part], found.loss)
    for n, numbers in enumerate((found.d, found.m)):
        torch.stack([each[n] for each in units], out=numbers)
    for n, numbers in enumerate((found.scale, found.minimum)):
        torch.cat([each[n] for each in multiples], out=numbers)
