"""Positive scales for the grids whose inputs are quantized too: int8 and float8, by row, block of rows or matrix.

A row is hundreds of columns wide here, so that its scale hardly matters beyond its range: a few ranges are tried and
the one with the least weighted rounding error is kept. For float8 the tried ones lie an octave apart at most: its
levels are spaced like the numbers of a binade, and a factor of two changes only what falls below the smallest of them.

Shapes: R rows, g columns in a group.
"""

import torch
from torch import Tensor

from compress.quant.grid import LARGEST_FLOAT8, Grid, round_levels_, store_scale

_SHARES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.84, 0.8, 0.75)  # of the scale that clips nothing
_OCTAVE = tuple(2 ** (step / 8) for step in range(-3, 9))


def positive_scales(weight: Tensor, importance: Tensor | None, grid: Grid) -> Tensor:
    """Scale of every row; rows that share one repeat it.

    Args:
        weight: float32 [R, g].
        importance: float32 [g], the cost of a squared error in each column; None for the range that clips nothing.
        grid: the grid; scales come back rounded to its stored dtype.

    Returns:
        float32 [R], positive.
    """
    if grid.float8:
        finest = weight.abs().amax(1) / LARGEST_FLOAT8
    else:
        finest = torch.maximum(weight.amax(1) / (grid.middle - 1), -weight.amin(1) / grid.middle).clamp_(min=0)
    finest = _shared(finest, grid.rows, "amax")
    best = store_scale(finest, grid)
    if importance is None:
        return best
    least = torch.full_like(best, torch.inf)
    for share in _OCTAVE if grid.float8 else _SHARES:
        tried = store_scale(finest * share, grid)
        levels = round_levels_(weight / tried[:, None], -grid.middle, grid.middle - 1, grid)
        missed = torch.addcmul(weight, levels, tried[:, None], value=-1)
        loss = _shared(missed.square_() @ importance, grid.rows, "sum")
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better, tried, best)
    return best


def _shared(values: Tensor, rows: int, reduce: str) -> Tensor:
    """The sum or the largest of each block of `rows` values (-1: of all), at every one of them."""
    if rows == 1:
        return values
    size = len(values) if rows == -1 else rows
    padded = torch.nn.functional.pad(values, (0, -len(values) % size)).view(-1, size)  # zeros change neither
    found = padded.sum(1) if reduce == "sum" else padded.amax(1)
    return found.repeat_interleave(size)[: len(values)]
