"""The integer grid: the ONE definition of rounding. Solvers, writers and verification all use it.

A weight `w_OI` is stored as unsigned codes with one scale and one zero point per row and group of columns:

    w^ = (code - zero) * scale        code, zero in [0, 2**bits - 1]

Symmetric grids fix `zero = 2**(bits - 1)` and let the scale be negative, so that the extreme weight of a
group may sit on the longer side of the range (-8 of -8..7) whichever its sign: the full range is used, and
the checkpoint formats store a signed number anyway.

Shapes: O output rows, I input columns, G groups of columns, g columns in a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """What the codes of one matrix may be.

    Args:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; -1 means the whole row.
        symmetric: zero point fixed in the middle and a signed scale, or a zero point per group.
        scale_dtype: the dtype in which scales are stored; scales are rounded to it before any code is computed.
        zero_minimum: smallest zero point that the checkpoint format can hold (auto-gptq v1 stores zero - 1).
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.bfloat16
    zero_minimum: int = 0

    @property
    def largest_code(self) -> int:
        """2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid, 2**(bits - 1)."""
        return 1 << (self.bits - 1)

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a matrix of this width (its whole width for -1)."""
        return columns if self.group_size == -1 else self.group_size


@dataclass(frozen=True)
class Quantized:
    """A quantized matrix, in the original column order.

    Args:
        codes: uint8 [O, I].
        scale: [O, G] in the grid's `scale_dtype`; may be negative where the grid is symmetric.
        zero: uint8 [O, G].
        grid: the grid that the codes belong to.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    grid: Grid

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [O, I] that a loader rebuilds: (code - zero) * scale, rounded once to `dtype`."""
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, self.scale.shape[1], -1)
        return dequantize(codes, self.scale[..., None], self.zero[..., None]).view(rows, columns).to(dtype)


def quantize(weight: Tensor, scale: Tensor, zero: Tensor, largest_code: int) -> Tensor:
    """Codes (float32, whole numbers) nearest to `weight`, ties to even; the arguments broadcast."""
    return (torch.round(weight / scale) + zero).clamp_(0, largest_code)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 values of codes; the arguments broadcast."""
    return (codes.float() - zero.float()) * scale.float()


def store_scale(scale: Tensor, grid: Grid) -> Tensor:
    """`scale` as a loader will read it: rounded to the stored dtype, then float32 again, and never zero.

    What would round to zero gets the smallest number that is safe to multiply with everywhere, with its sign:
    float16's smallest subnormal, the smallest normal of the wider dtypes (processors may flush subnormals there). A
    group of zeros then has its zero point for codes and exact zeros for values.
    """
    limits = torch.finfo(grid.scale_dtype)
    smallest = limits.tiny * (limits.eps if grid.scale_dtype == torch.float16 else 1.0)
    stored = scale.to(grid.scale_dtype).float()
    return torch.where(stored.abs() < smallest, torch.full_like(stored, smallest).copysign(scale), stored)
