"""SmoothQuant (Xiao et al., arXiv 2211.10438): large input channels move into the weights, which have room for them.

The inputs are divided by s, the columns of the weights multiplied: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

One power for all channels is a coarse choice. With a scale for each token and each row of the weights, rounding costs
an output about

    mean_t max_j (x_tj / s_j)^2  sum_j s_j^2 |W_j|^2   +   sum_o max_j (w_oj s_j)^2  sum_j mean_t x_tj^2 / s_j^2

(uniform errors of the inputs through the weights, and the other way round), which a few steps of gradient descent on
log s make smaller: by 10 to 40 % on a small Llama. With one scale for all tokens a power does as well.

Dimensions: N tokens, I inputs, O outputs, P channels of what produces the inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from compress.quant.gptq import round_to_nearest
from compress.quant.grid import FakeQuantize, Grid, dynamic_fake_quantize

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_STEPS, _RATE = 40, 0.05
_SILENT = 0.01  # of the middle channel's magnitude

Change = Callable[[Tensor], Tensor]


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scales s with a geometric mean of 1, float32 [P].

    Args:
        inputs: [P], largest magnitude of each channel of the inputs.
        weights: [P], largest magnitude of each column of the weights.
        alpha: how much of the difficulty moves into the weights, 0 to 1.
    """
    inputs, weights = _raised(inputs.float()), weights.float().clamp(min=1e-5)
    logarithm = alpha * inputs.log() - (1 - alpha) * weights.log()
    return (logarithm - logarithm.mean()).exp()


def _raised(channels: Tensor) -> Tensor:
    """Positive numbers [I], none far below the middle one: a channel that calibration left silent may speak later."""
    there = channels[channels > 0]
    return channels.clamp(min=float(there.median()) * _SILENT if there.numel() else 1.0)


def best_scale(
    inputs: Tensor,
    weights: Tensor,
    scale_of: Callable[[float], Tensor],
    spread: Change,
    total: Change,
    static: bool,
    grid: Grid,
) -> tuple[float, Tensor] | None:
    """Scales [P] with which linears that share an input lose least, and the power that they started from.

    Args:
        inputs: X [1, N, I], a sample.
        weights: W float32 [O, I], of all linears, one below the other.
        scale_of: scales [P] for a power.
        spread: those of the linears' inputs [I], from scales [P].
        total: [P] from [I], added up where inputs share a producer's channel.
        static: one scale for all inputs, the range of the sample; else each token's own.
        grid: of the weights, which are rounded to nearest here.

    Returns:
        None where nothing that was tried beats no smoothing.
    """
    # each token counts the same: a few are a hundred times as large, and norms scale them down again
    exact = inputs.float() @ weights.t()
    root = exact.norm(dim=-1, keepdim=True).clamp(min=1e-6)

    def lost(scale: Tensor) -> float:
        rounded = _rounded(inputs, weights, spread(scale), static, grid)
        return float(((exact - rounded) / root).square().sum())

    alpha = min(ALPHAS, key=lambda each: lost(scale_of(each)))
    tried = [scale_of(alpha)]
    if not static and not grid.float8 and grid.bits == 8 and grid.group_size == -1:
        tried.append(refine(tried[0], inputs.float() / root, weights, spread, total))
    best = min(tried, key=lost)
    return (alpha, best) if lost(best) < lost(torch.ones_like(best)) else None


def _rounded(inputs: Tensor, weights: Tensor, scale: Tensor, static: bool, grid: Grid) -> Tensor:
    """Outputs [1, N, O] with scales [I], inputs and weights [O, I] rounded."""
    smoothed = (inputs.float() / scale).to(inputs.dtype)
    rounding = dynamic_fake_quantize(grid)
    if static:
        rounding = FakeQuantize(grid.float8, smoothed.abs().amax().float() / rounding.span)
    return rounding(smoothed).float() @ round_to_nearest(weights * scale, None, grid).dequantize().t()


def refine(scale: Tensor, inputs: Tensor, weights: Tensor, spread: Change, total: Change) -> Tensor:
    """Scales [P] that cost less than `scale` by the formula above: for whole numbers, a scale per token and per row.

    Args:
        scale: float32 [P], positive, where to start.
        inputs: X [1, N, I], a sample.
        weights: W float32 [O, I], of all linears.
        spread: scales [I] of the linears' inputs from those of what produces them.
        total: [P] from [I], added up where inputs share a producer's channel.
    """
    x, w = inputs.float().abs().flatten(0, -2), weights.abs()
    x_square, w_square = _raised(x.square().mean(0).sqrt()).square(), w.square().sum(0)
    logarithm = scale.log()
    optimizer = torch.optim.Adam([logarithm], lr=_RATE)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        s = spread(logarithm.exp())
        (widest, at_x), (tallest, at_w) = _extremes(x / s), _extremes(w * s)
        through_w, through_x = s.square() * w_square, x_square / s.square()
        of_inputs, of_weights = widest.mean() * through_w.sum(), tallest.sum() * through_x.sum()
        slope = of_inputs * (through_w / through_w.sum() - at_x) + of_weights * (at_w - through_x / through_x.sum())
        logarithm.grad = total(slope / (of_inputs + of_weights))
        optimizer.step()
    return (logarithm - logarithm.mean()).exp()


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Squares of each row's largest number [R], of numbers [R, C] >= 0, and each column's share of their sum [C]."""
    largest = rows.amax(1)
    squares = largest.square()
    return squares, squares @ (rows == largest[:, None]).float() / squares.sum()
