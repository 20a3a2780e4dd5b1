"""Codes of a checkpoint on the grids of ggml: the same codes and scales in another place, nothing rounded anew.

ggml has a scale for each 32 columns of a row, float16; a group of more columns repeats its own. Where codes have a zero
point, ggml wants the value of code 0 instead, -zero * scale: in float16, that is rounded in its last bit.

Shapes: O output rows, I input columns, G groups, B blocks.
"""

import torch
from torch import Tensor

from compress.exports.gguf.fits import WIDTH, block_of
from compress.formats.base import AnyQuantized
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.quant.blocks import Blocked


def as_blocks(matrix: AnyQuantized, order: Tensor | None = None) -> Blocked | None:
    """The matrix on a grid of ggml; None where its codes or its scales lie on none.

    Args:
        matrix: codes [O, I], scales and zero points [O, G].
        order: its rows, as indices [O].
    """
    assert not isinstance(matrix, Blocked), "its bytes are there as they are"
    grid, (rows, columns) = matrix.grid, matrix.codes.shape
    middle = grid.symmetric or bool((matrix.zero == grid.middle).all())  # gptq stores zero points either way
    groups = matrix.scale.shape[1]
    name = None if grid.float8 or columns % groups else block_of(grid.bits, middle, columns // groups)
    if name is None:
        return None
    kind, repeat = BLOCK_TYPES[name], columns // groups // WIDTH
    codes, scale, zero = matrix.codes, matrix.scale.float(), matrix.zero
    # a group of zeros has a scale that need not be kept
    levels = codes.view(rows, groups, -1).int() - zero[..., None].int()
    scale = torch.where((levels == 0).all(-1), torch.zeros_like(scale), scale)
    d = scale.half()
    if not torch.equal(d.float(), scale):
        return None
    offset = None if middle else (-zero.float() * d.float()).half()
    if middle:
        codes = (levels - kind.levels[0]).to(torch.uint8).view(rows, columns)
    elif not offset.isfinite().all():  # type: ignore[union-attr]
        return None
    spread = None if offset is None else offset.repeat_interleave(repeat, 1)
    found = Blocked(kind, codes, d.repeat_interleave(repeat, 1), spread)
    return found if order is None else _ordered(found, order)


def _ordered(matrix: Blocked, order: Tensor) -> Blocked:
    parts = (matrix.codes, matrix.d, matrix.m, matrix.scales, matrix.mins)
    codes, d, *others = (None if part is None else part[order] for part in parts)
    assert codes is not None and d is not None
    return Blocked(matrix.type, codes, d, *others)
