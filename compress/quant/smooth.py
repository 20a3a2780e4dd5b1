"""SmoothQuant (Xiao et al., arXiv 2211.10438): large input channels move into the weights, which have room for them.

The inputs are divided by s, the columns of the weights multiplied: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

Dimensions: N tokens, I inputs, O outputs, P channels of what produces the inputs.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compress.quant.gptq import round_to_nearest
from compress.quant.grid import Grid, InputRounding

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scales s with a geometric mean of 1, float32 [P].

    Args:
        inputs: [P], largest magnitude of each channel of the inputs.
        weights: [P], largest magnitude of each column of the weights.
        alpha: how much of the difficulty moves into the weights, 0 to 1.
    """
    inputs, weights = inputs.float().clamp(min=1e-5), weights.float().clamp(min=1e-5)
    logarithm = alpha * inputs.log() - (1 - alpha) * weights.log()
    return (logarithm - logarithm.mean()).exp()


def best_alpha(
    inputs: Tensor, weights: Sequence[Tensor], scale_of: Callable[[float], Tensor], static: bool, grid: Grid
) -> float | None:
    """The power with which linears that share an input lose least; None where none beats no smoothing.

    Args:
        inputs: X [1, N, I], a sample.
        weights: W [O, I] of each linear.
        scale_of: scales [I] for a power.
        static: one scale for all inputs, the range of the sample; else each token's own.
        grid: of the weights, which are rounded to nearest here.
    """
    stacked, exact = torch.cat([weight.float() for weight in weights]), inputs.float()
    wanted = exact @ stacked.t()
    least, best = torch.inf, None
    for alpha in (None, *ALPHAS):
        scale = torch.ones_like(exact[0, 0]) if alpha is None else scale_of(alpha)
        smoothed = (exact / scale).to(inputs.dtype)
        span = InputRounding(grid.float8).span
        reach = smoothed.abs().amax().float() / span if static else None
        rounding = InputRounding(grid.float8, reach, grid.group_size)
        stored = round_to_nearest(stacked * scale, None, grid).dequantize()
        missed = float((wanted - rounding(smoothed).float() @ stored.t()).square().sum())
        if missed < least:
            least, best = missed, alpha
    return best
