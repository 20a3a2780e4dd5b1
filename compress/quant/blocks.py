"""Matrices on ggml's block grids, whose groups have scales of scales (`compress.model.gguf.block_types`).

Shapes: O output rows, I input columns, S blocks of a row, s sub-blocks of a row.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from compress.model.gguf.block_types import BlockType


@dataclass(frozen=True, eq=False)
class Blocked:
    """A quantized matrix, in the stored column order.

    Args:
        type: of its blocks.
        codes: uint8 [O, I].
        d: float16 [O, S].
        m: float16 [O, S]: what the minima are multiples of, or the offset itself in types without sub-blocks; None in
            types without minima.
        scales: int16 [O, s], whole numbers that d is multiplied with; None in types without sub-blocks.
        mins: int16 [O, s], likewise of m; None in types without sub-blocks or minima.
    """

    type: BlockType
    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None
    mins: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The matrix, float32 [O, I], with every bit as ggml computes it."""
        rows, columns = self.codes.shape
        levels = level_table(self.type, self.codes.device)[self.codes.int()]
        step, offset = self.steps()
        values = levels.view(rows, step.shape[1], -1) * step[..., None]
        if offset is not None:
            values += offset[..., None]
        return values.view(rows, columns)

    def steps(self) -> tuple[Tensor, Tensor | None]:
        """What a sub-block's levels are multiplied with, and what is added then: float32 [O, s]."""
        step, offset = self.d.float(), None if self.m is None else self.m.float()
        if self.scales is not None:
            step = step.repeat_interleave(self.type.sub_blocks, 1) * self.scales
        if offset is not None and self.mins is not None:
            offset = -(offset.repeat_interleave(self.type.sub_blocks, 1) * self.mins)
        return step, offset


@cache
def level_table(kind: BlockType, device: torch.device) -> Tensor:
    """The levels of all codes, float32; not to be changed."""
    return torch.tensor(kind.levels, dtype=torch.float32, device=device)


@cache
def level_middles(kind: BlockType, device: torch.device) -> Tensor:
    """The middles between neighbouring levels, float32; not to be changed."""
    table = level_table(kind, device)
    return (table[1:] + table[:-1]) / 2


def to_codes(levels: Tensor, kind: BlockType) -> Tensor:
    """uint8 codes of levels (float32)."""
    if kind.uniform:
        return (levels - kind.levels[0]).to(torch.uint8)
    return torch.searchsorted(level_table(kind, levels.device), levels.contiguous()).to(torch.uint8)
