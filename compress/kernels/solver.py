"""GPTQ of one matrix on a GPU: the kernels, and between them products that are large enough to run at full rate.

The twin, `compress.quant.gptq.gptq`, fetches the errors of all columns so far when it enters a group. A product with
128 columns on one side leaves most of a GPU idle, so columns come in spans here: the errors of all spans before are
fetched once for a whole span, those inside it when a group is entered. A group's weights as the errors move them come
from a product with the inverse of its block of F, which is made for all groups at once. All of it is float32; the codes
are those of the twin but for what the order of the additions decides.

Shapes: O output rows, I input columns, G groups, g columns in a group.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.kernels.columns import quantize_columns
from compress.quant.grid import Grid

_SPAN = 512  # columns of a large product; a multiple of every block
_BLOCK = 128  # columns of a launch where a scale belongs to the whole row


Search = Callable[[Tensor, Tensor | None, Grid], tuple[Tensor, Tensor]]


def solve(
    work: Tensor, feedback: Tensor, pivot: Tensor, importance: Tensor | None, grid: Grid, search: Search
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Quantize one matrix with error feedback, columns in the visiting order.

    Args:
        work: float32 [I, O], contiguous, the weights; overwritten with the errors w - w^.
        feedback: float32 [I, I], F.
        pivot: float32 [I].
        importance: float32 [I], weighs the scale search; None takes the full range.
        grid: where the codes lie, whole numbers.
        search: `compress.quant.scales.group_scales`.

    Returns:
        codes uint8 [I, O]; scale and zero of each group, float32 [O]; loss of each row, float32 [O].
    """
    columns, rows = work.shape
    width = grid.columns_per_group(columns)
    block = _BLOCK if grid.group_size == -1 else width
    codes = torch.empty_like(work, dtype=torch.uint8)
    loss = work.new_zeros(rows)
    found: list[tuple[Tensor, Tensor]] = []
    inverse, diagonal = ([], []) if grid.group_size == -1 else group_blocks(feedback, width)
    weighs = [None] * (columns // width) if importance is None else importance.split(width)
    parts = list(zip(work.split(block), pivot.split(block), codes.split(block), strict=True))
    fed = work.new_empty(min(_SPAN, columns), rows)
    for start in range(0, columns, _SPAN):
        stop = min(start + _SPAN, columns)
        torch.mm(feedback[:start, start:stop].t(), work[:start], out=fed[: stop - start])
        for first, inside in zip(range(start, stop, block), fed[: stop - start].split(block), strict=True):
            part, group = slice(first, first + len(inside)), first // width
            weights, pivots, levels = parts[first // block]
            if first > start:
                inside.addmm_(feedback[start:first, part].t(), work[start:first])
            if len(found) == group:
                moved = torch.addmm(weights, inverse[group], inside) if inverse else work
                found.append(search(moved.t(), weighs[group], grid))
            own = diagonal[group] if diagonal else feedback[part, part].contiguous()
            quantize_columns(weights, inside, own, pivots, *found[group], grid.largest_code, levels, loss)
    return codes, [scale for scale, _ in found], [zero for _, zero in found], loss


def group_blocks(feedback: Tensor, width: int) -> tuple[list[Tensor], list[Tensor]]:
    """(F_gg^T)^-1 of every group, which moves its weights by what feeds into it, and F_gg itself, [g, g] each."""
    groups = feedback.shape[0] // width
    diagonal = feedback.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
    one = torch.eye(width, dtype=feedback.dtype, device=feedback.device).expand_as(diagonal)
    inverse = torch.linalg.solve_triangular(diagonal.mT, one, upper=False, unitriangular=True)
    return list(inverse.unbind()), list(diagonal.unbind())
