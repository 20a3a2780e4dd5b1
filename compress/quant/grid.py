"""The integer grid: the ONE definition of rounding. Solvers, writers and verification all use it.

A weight `w_OI` is stored as unsigned codes with one scale and one zero point per row and group of columns:

    w^ = (code - zero) * scale        code, zero in [0, 2**bits - 1]

Symmetric grids fix `zero = 2**(bits - 1)` and let the scale be negative, so that the extreme weight of a
group may sit on the longer side of the range (-8 of -8..7) whichever its sign: the full range is used, and
the checkpoint formats store a signed number anyway. Where activations are quantized too, kernels want positive scales
(`signed_scale=False`).

A float8 grid has the finite numbers of e4m3 (4 bits of exponent, 3 of mantissa, up to 448) for levels: w^ = level *
scale, the code is the number's byte and there is no zero point.

The inputs of linears are rounded by `FakeQuantize`, with the arithmetic of the stock loader.

Shapes: O output rows, I input columns, G groups of columns, g columns in a group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0


@dataclass(frozen=True)
class Grid:
    """What the codes of one matrix may be.

    Args:
        bits: width of a code, 2 to 8.
        group_size: columns that share a scale; -1 means the whole row.
        symmetric: zero point fixed in the middle and a signed scale, or a zero point per group.
        scale_dtype: the dtype in which scales are stored; scales are rounded to it before any code is computed.
        zero_minimum: smallest zero point that the checkpoint format can hold (auto-gptq v1 stores zero - 1).
        signed_scale: whether a symmetric grid's scale may be negative.
        float8: levels are the numbers of e4m3 instead of whole ones.
        rows: rows that share a scale beside the columns of a group; -1 means all of them.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.bfloat16
    zero_minimum: int = 0
    signed_scale: bool = True
    float8: bool = False
    rows: int = 1

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
        scale: [O, G] in the grid's `scale_dtype`; may be negative where the grid is symmetric. Rows that share a
            scale repeat it.
        zero: uint8 [O, G]; 0 on a float8 grid.
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
        if self.grid.float8:
            return (codes.view(FLOAT8).float() * self.scale[..., None].float()).view(rows, columns).to(dtype)
        return dequantize(codes, self.scale[..., None], self.zero[..., None]).view(rows, columns).to(dtype)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """float32 values of codes; the arguments broadcast."""
    return (codes.float() - zero.float()) * scale.float()


def round_levels_(scaled: Tensor, low: Any, high: Any, grid: Grid) -> Tensor:
    """Weights divided by their scale become the nearest levels, ties to even, in place.

    Args:
        scaled: float32, any shape.
        low: smallest level (-zero), a number or a tensor; for whole numbers only, float8 has its own.
        high: largest level, likewise.
        grid: which levels there are.
    """
    if grid.float8:
        return scaled.copy_(scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8))
    return scaled.round_().clamp_(low, high)


def to_codes(levels: Tensor, zero: Tensor | int, grid: Grid) -> Tensor:
    """uint8 codes of levels (float32): level + zero, or the bytes of float8 numbers."""
    if grid.float8:
        return levels.to(FLOAT8).view(torch.uint8)
    return (levels + zero).to(torch.uint8)


@dataclass(frozen=True, eq=False)
class FakeQuantize:
    """Rounds the inputs of a linear to 8 bits and back, as it happens where the checkpoint runs.

    The arithmetic, its dtype and the ratio of a range and its scale (127.5 for int8) are those of compressed-tensors
    (`quantization/lifecycle/forward_helpers.py`), so that the stock loader computes the same bits.

    Args:
        float8: e4m3 instead of whole numbers from -128 to 127.
        scale: float32, one number or one that the inputs broadcast with; None takes each token's own.
        group_size: columns that share a token's own scale; -1 means all.
        asymmetric: with a zero point of each token's own, by torchao's arithmetic instead.
    """

    float8: bool
    scale: Tensor | None = None
    group_size: int = -1
    asymmetric: bool = False

    @property
    def span(self) -> float:
        """The range, one side of it, in units of the scale."""
        return LARGEST_FLOAT8 if self.float8 else 127.5

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [B, S, I] (or more dimensions), float, rounded; in its own dtype.

        Where a model flattens its tokens to [N, I] (OPT does), the stock loader takes one scale for all of them.
        """
        if self.asymmetric:
            return self._round_asymmetric(x)
        if self.scale is not None:
            return self._round(x, self.scale.to(x.device, x.dtype))
        if self.group_size == -1:
            return self._round(x, self._scale_of(x))
        grouped = x.unflatten(-1, (-1, self.group_size))
        return self._round(grouped, self._scale_of(grouped)).flatten(-2)

    def _scale_of(self, x: Tensor) -> Tensor:
        scale = x.abs().amax((0, 1) if x.dim() == 2 else -1, keepdim=True) / self.span
        return scale.masked_fill_(scale == 0, torch.finfo(x.dtype).eps)

    def _round(self, x: Tensor, scale: Tensor) -> Tensor:
        scaled = x / scale
        if self.float8:
            return scaled.clamp_(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(FLOAT8).to(x.dtype).mul_(scale)
        return scaled.clamp_(-128, 127).round_().mul_(scale)

    def _round_asymmetric(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / 255).clamp_(min=torch.finfo(x.dtype).smallest_normal)
        zero = (-128 - torch.round(low / scale)).clamp_(-128, 127)
        codes = torch.round(x * (1 / scale)).add_(zero).clamp_(-128, 127)
        return codes.sub_(zero).mul_(scale)


def dynamic_fake_quantize(grid: Grid) -> FakeQuantize:
    """How runtimes round the inputs of weights on this grid token by token, in the columns of blocks."""
    return FakeQuantize(grid.float8, None, grid.group_size if grid.rows > 1 else -1, grid.bits == 4)


@dataclass(frozen=True, eq=False)
class CacheFakeQuantize:
    """Rounds keys and values [B, K, S, D] as they go into the cache."""

    keys: FakeQuantize
    values: FakeQuantize

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Both, rounded."""
        return self.keys(keys), self.values(values)


def store_scale(scale: Tensor, grid: Grid) -> Tensor:
    """`scale` as a loader will read it: rounded to the stored dtype, then float32 again, and never zero.

    What would round to zero gets the smallest number that is safe to multiply with everywhere, with its sign:
    float16's smallest subnormal, the smallest normal of the wider dtypes (processors may flush subnormals there). A
    group of zeros then has its zero point for codes and exact zeros for values.
    """
    stored, smallest = scale.to(grid.scale_dtype).float(), smallest_scale(grid.scale_dtype)
    return torch.where(stored.abs() < smallest, torch.full_like(stored, smallest).copysign(scale), stored)


def smallest_scale(dtype: torch.dtype) -> float:
    """What is stored instead of a smaller scale."""
    limits = torch.finfo(dtype)
    return limits.tiny * (limits.eps if dtype == torch.float16 else 1.0)
