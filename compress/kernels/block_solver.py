"""GPTQ of one matrix on ggml's block grids on a GPU: kernels, and between them products.

The twin is the walk in `compress.quant.block_gptq`. As in `compress.kernels.solver`, weights as the errors move them
come from a product with the inverse of their block of F; the column loop is that of other grids, since levels times
step are what weights should be once the offset is taken from them.

Shapes: O output rows, I input columns, s sub-blocks, w columns in one.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from compress.kernels.columns import quantize_columns
from compress.kernels.solver import group_blocks
from compress.model.gguf.block_types import BlockType

_SPAN = 256  # columns of a large product; every block's width divides it

Units = TypeVar("Units", bound=tuple[Tensor, Tensor])
Multiples = TypeVar("Multiples", bound=tuple[Tensor, Tensor])


def solve_blocks(
    work: Tensor,
    feedback: Tensor,
    pivot: Tensor,
    importance: Tensor,
    kind: BlockType,
    block_units: Callable[[Tensor, Tensor, BlockType], Units],
    sub_multiples: Callable[[Tensor, Tensor, Units, BlockType], Multiples],
) -> tuple[Tensor, list[Units], list[Multiples], Tensor]:
    """Quantize one matrix with error feedback, columns in the visiting order.

    Args:
        work: float32 [I, O], contiguous, the weights; overwritten with the errors w - w^.
        feedback: float32 [I, I], F.
        pivot: float32 [I].
        importance: float32 [I], weighs the search for scales.
        kind: of the blocks; uniform.
        block_units: of `compress.quant.block_scales`.
        sub_multiples: of `compress.quant.block_scales`.

    Returns:
        codes uint8 [I, O]; units of each block, [O]; multiples of each sub-block, [1, O]; loss of each row, float32.
    """
    columns, rows = work.shape
    width, scaled = kind.sub_width, kind.scale_range is not None
    codes, loss = torch.empty_like(work, dtype=torch.uint8), work.new_zeros(rows)
    zero, largest = work.new_full((rows,), -float(kind.levels[0])), kind.levels[-1] - kind.levels[0]
    inverse, own = group_blocks(feedback, width)
    of_block = group_blocks(feedback, kind.width)[0] if scaled else []
    units: list[Units] = []
    multiples: list[Multiples] = []
    fed = work.new_empty(min(_SPAN, columns), rows)
    for start in range(0, columns, _SPAN):
        span = slice(start, min(start + _SPAN, columns))
        into = fed[: span.stop - start]
        torch.mm(feedback[:start, span].t(), work[:start], out=into)
        if scaled:
            moved = torch.addmm(work[span], of_block[len(units)], into).view(-1, width, rows)
            units.append(block_units(moved, importance[span].view(-1, width), kind))
        for first in range(start, span.stop, width):
            part, sub = slice(first, first + width), first // width
            weight, inside = work[part], into[first - start :][:width]
            if first > start:
                inside.addmm_(feedback[start:first, part].t(), work[start:first])
            moved = torch.addmm(weight, inverse[sub], inside)[None]
            if not scaled:
                units.append(block_units(moved, importance[None, part], kind))
            (d, m), times = units[-1], sub_multiples(moved, importance[None, part], units[-1], kind)
            multiples.append(times)
            if kind.has_min:
                weight.addcmul_(m, times[1][0])  # less the offset
            quantize_columns(weight, inside, own[sub], pivot[part], d * times[0][0], zero, largest, codes[part], loss)
    return codes, units, multiples, loss
