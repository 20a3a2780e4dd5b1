"""Ranges of activations, from calibration batches: how far from zero a scale should reach.

Symmetric ranges only, since that is what runtimes take. The observers know nothing of quantization methods; all but
`mse` need not even know the grid. Percentiles and errors come from a histogram of the magnitudes, so that batches are
passed over twice and never held together.

Left out: per-channel ranges (kernels have one scale per tensor) and entropy (KL) calibration, which was made for
images and is worse than the squared error on the long tails of language models.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from compress.errors import CalibrationError

Observer = Literal["minmax", "moving_average", "percentile", "mse"]

PERCENTILE = 0.9999
_FEWEST = 10 / (1 - PERCENTILE)  # values that put ten beyond the percentile
_MOMENTUM = 0.1  # weight of the newest batch in the moving average
_BINS = 1 << 15  # 256 in a step of int8
_SHARES = 40  # ranges tried, from the whole one to a fifth of it


def reach(
    batches: Iterable[Tensor], observer: Observer, rounded: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """The magnitude that a symmetric range should reach.

    Args:
        batches: activations, of any shape and float dtype; gone through twice for `percentile` and `mse`.
        observer: how it is found.
        rounded: for `mse`, values [n] rounded on the grid whose range reaches [k, 1]: [k, n].

    Returns:
        float32, one number; 0 where all activations are zero.

    Raises:
        CalibrationError: too few values for a percentile.
    """
    extremes = torch.stack([batch.abs().amax().float() for batch in batches])
    if observer == "minmax" or not bool(extremes.amax() > 0):
        return extremes.amax()
    if observer == "moving_average":
        return _moving_average(extremes)
    counts, centres = _histogram(batches, extremes.amax())
    if observer == "percentile":
        return _percentile(counts, extremes.amax())
    assert rounded is not None
    tried = extremes.amax() * torch.linspace(1.0, 0.2, _SHARES, device=centres.device)
    losses = (rounded(centres, tried[:, None]) - centres).double().square_() @ counts
    return tried[losses.argmin()]


def _moving_average(extremes: Tensor) -> Tensor:
    mean = extremes[0]
    for extreme in extremes[1:]:
        mean = mean + _MOMENTUM * (extreme - mean)
    return mean


def _percentile(counts: Tensor, largest: Tensor) -> Tensor:
    total = float(counts.sum())
    if total < _FEWEST:
        raise CalibrationError(
            f"observer percentile: {total:,.0f} calibration values are too few for the {100 * PERCENTILE:g}th "
            f"percentile, which needs {_FEWEST:,.0f}; give more calibration text, or use observer: minmax"
        )
    below = (counts.cumsum(0) < PERCENTILE * total).sum()
    return largest * (below + 1) / len(counts)


def _histogram(batches: Iterable[Tensor], largest: Tensor) -> tuple[Tensor, Tensor]:
    """Counts of magnitudes, float64 [bins], and the bins' middles, float32 [bins]."""
    counts = torch.zeros(_BINS, dtype=torch.float64, device=largest.device)
    for batch in batches:
        counts += torch.histc(batch.abs().float(), _BINS, 0, float(largest)).double()
    return counts, (torch.arange(_BINS, device=largest.device) + 0.5) * (largest / _BINS)
