"""Scales and zero points of groups: min-max, or a search for the least weighted rounding error.

The search follows the idea of llama.cpp's `make_qx_quants`: try a few ranges, take the codes that each gives, and
fit the best scale to those codes in closed form (weighted least squares). Symmetric grids try both signs, because the
code range is one longer on the negative side. With `clip: hessian` a column counts by the loss that its rounding
error really causes in GPTQ, the squared pivot of the factor (Frantar et al., arXiv 2210.17323, eq. 2), not by 1.

Shapes: R independent groups (rows, or rows x groups), g columns in a group.
"""

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from compress.kernels import usable
from compress.quant.grid import Grid, store_scale
from compress.quant.positive_scales import positive_scales
from compress.system.parallel import on_cores

Clip = Literal["none", "mse", "hessian"]

_ELEMENTS_AT_ONCE = 1 << 15  # of a search on the CPU: keeps its temporaries inside a core's cache
_SHRINK = {2: 0.45, 3: 0.55, 4: 0.70, 8: 0.90}  # the tightest range tried, as a share of the extreme weight
_STEPS = 7  # more find no better scales than noise, once each is fitted to its codes


def group_scales(weight: Tensor, importance: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of every group.

    Args:
        weight: float32 [R, g].
        importance: float32 [g], the cost of a squared error in each column; None for the plain range (`clip: none`).
        grid: the grid; scales come back rounded to its stored dtype.

    Returns:
        scale float32 [R] (exact in `grid.scale_dtype`) and zero float32 [R] (whole numbers).
    """
    if grid.symmetric and not grid.signed_scale:
        scale = positive_scales(weight, importance, grid)
        return scale, torch.full_like(scale, 0 if grid.float8 else grid.middle)
    if usable(weight):
        from compress.kernels.scales import group_scales as fused  # here, because it imports triton

        return fused(weight, importance, _shares(grid), grid)
    if importance is None:
        return _full_range(weight, grid)
    weight = weight.t().contiguous().t()  # one layout for every caller: sums in one order, so that ties fall alike
    search = _search_symmetric if grid.symmetric else _search_asymmetric
    if weight.device.type != "cpu":
        return search(weight, importance, grid)
    parts = -(-weight.numel() // _ELEMENTS_AT_ONCE)
    found = on_cores(lambda part: search(part, importance, grid), weight.chunk(parts))
    return torch.cat([scale for scale, _ in found]), torch.cat([zero for _, zero in found])


@cache
def _shares(grid: Grid) -> tuple[float, ...]:
    """The ranges that the search tries, as shares of the extreme weight; a symmetric grid is one step short of it."""
    widest = grid.middle / max(grid.middle - 1, 0.75) if grid.symmetric else 1.0
    return tuple(torch.linspace(widest, _SHRINK[grid.bits], _STEPS).tolist())


def _full_range(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The finest grid on which no weight is clipped."""
    low, high = weight.amin(1), weight.amax(1)
    if grid.symmetric:
        short, long = grid.middle - 1, grid.middle
        positive = torch.maximum(high / short, -low / long)
        negative = torch.maximum(high / long, -low / short)
        scale = torch.where(positive <= negative, positive, -negative)
        return store_scale(scale, grid), torch.full_like(scale, grid.middle)
    return _asymmetric_range(low.clamp(max=0), high.clamp(min=0), grid)


def _asymmetric_range(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    steps = (high - low) / grid.largest_code
    if grid.zero_minimum:  # the levels below the smallest zero point can't be used above zero
        steps = torch.maximum(steps, high / (grid.largest_code - grid.zero_minimum))
    scale = store_scale(steps, grid)
    return scale, torch.round(-low / scale).clamp_(grid.zero_minimum, grid.largest_code)


def _search_symmetric(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    columns = weight.t()  # [g, R]: the solver's layout, in which every operation runs along memory
    full = _full_range(weight, grid)[0]
    low, high = -grid.middle, grid.middle - 1
    extreme = columns.abs().amax(0).clamp_(min=torch.finfo(torch.float32).tiny) / grid.middle
    shares = torch.tensor(_shares(grid), device=weight.device)
    tried_KR = torch.cat([full[None], (extreme * torch.stack([shares, -shares], 1).flatten()[:, None])])
    codes_KgR = (columns / tried_KR[:, None]).round_().clamp_(low, high)
    cross_KR = (columns * importance[:, None] * codes_KgR).sum(1)
    square_KR = importance @ codes_KgR.square_()
    gain = cross_KR * cross_KR / square_KR.clamp(min=1e-30)  # sum(h w^2) - gain is the loss with the scale fitted
    best = gain.argmax(0, keepdim=True)  # the first of equals
    cross, square = cross_KR.gather(0, best)[0], square_KR.gather(0, best)[0]
    found = store_scale(torch.where(square > 1e-30, cross / square, full), grid)  # which moves it
    losses = []
    for stored in (found, full):
        codes = (columns / stored).round_().clamp_(low, high)
        losses.append(importance @ torch.addcmul(columns, codes, stored, value=-1).square_())
    return torch.where(losses[0] <= losses[1], found, full), torch.full_like(full, grid.middle)


def _search_asymmetric(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    low, high = weight.amin(1).clamp_(max=0), weight.amax(1).clamp_(min=0)
    scale, zero = _asymmetric_range(low, high, grid)
    best = torch.full_like(low, torch.inf)
    for share in _shares(grid):
        tried, tried_zero = _asymmetric_range(low * share, high * share, grid)
        for _ in range(2):  # as it is, then with the scale fitted to its own codes
            codes = torch.round(weight / tried[:, None]).add_(tried_zero[:, None]).clamp_(0, grid.largest_code)
            levels = codes.sub_(tried_zero[:, None])
            loss = (weight - levels * tried[:, None]).square_() @ importance
            better = loss < best
            best = torch.where(better, loss, best)
            scale, zero = torch.where(better, tried, scale), torch.where(better, tried_zero, zero)
            square = levels.square() @ importance
            fitted = ((weight * levels) @ importance) / square.clamp(min=1e-30)
            tried = store_scale(torch.where(square > 0, fitted, tried), grid)
    return scale, zero
