"""Matrices with Hessians to be quantized, and what a scale costs, for the tests of solvers and kernels."""

import torch
from torch import Tensor

from compress.quant.grid import Grid
from compress.quant.statistics import gram

BITS, CLIPS = (2, 3, 4, 8), ("none", "mse", "hessian")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problem(rows: int, columns: int, seed: int, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """Weights [O, I] and X^T X of inputs that are correlated and differ in size from column to column."""
    generator = torch.Generator().manual_seed(seed)
    mix = 0.3 * torch.randn(columns, columns, generator=generator) + torch.eye(columns) * columns**0.5
    mix *= torch.logspace(-0.5, 0.5, columns)[torch.randperm(columns, generator=generator)]
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    return weight, second_moment(inputs)


def second_moment(inputs: Tensor) -> Tensor:
    hessian = gram([inputs])
    assert hessian is not None
    return hessian


def group_loss(weight: Tensor, scale: Tensor, zero: Tensor, cost: Tensor, grid: Grid) -> Tensor:
    """Weighted squared rounding error of every group [R, g], in float64."""
    scale, zero = scale.double()[:, None], zero.double()[:, None]
    codes = (torch.round(weight.double() / scale) + zero).clamp(0, grid.largest_code)
    return (weight.double() - (codes - zero) * scale).square() @ cost.double()


AWKWARD = {
    "zeros": torch.zeros(1, 32),
    "constant": torch.full((1, 32), 0.37),
    "negative constant": torch.full((1, 32), -0.37),
    "one weight": torch.eye(32)[:1] * -0.2,
    "huge outlier": torch.cat([torch.full((1, 31), 1e-3), torch.tensor([[1e4]])], 1),
    "subnormal": torch.full((1, 32), 1e-40),
    "tiny": torch.linspace(-1e-30, 1e-30, 32)[None],
    "two values": torch.tensor([[0.1, -0.1] * 16]),
}
