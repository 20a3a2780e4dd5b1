"""How the inputs of linears are rounded: static scales from calibration batches, and what rounding does to an output.

Dimensions: N tokens, I inputs, O outputs.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from compress.quant.grid import FakeQuantize, smallest_scale
from compress.quant.observers import Observer, reach

_TOKENS = 1024  # that errors are measured on


def static_fake_quantize(
    batches: Iterable[Tensor], observer: Observer, float8: bool, scale_dtype: torch.dtype
) -> FakeQuantize | None:
    """One scale for all tokens, rounded to the dtype in which it is stored; None where all inputs are zero.

    Raises:
        CalibrationError: too few values for the observer.
    """

    def rounded(values: Tensor, reaches: Tensor) -> Tensor:
        return FakeQuantize(float8, reaches / span)(values)

    span = FakeQuantize(float8).span
    largest = reach(batches, observer, rounded)
    if not bool(largest > 0):
        return None
    return FakeQuantize(float8, (largest / span).clamp(min=smallest_scale(scale_dtype)).to(scale_dtype).float())


class Sample:
    """Tokens that are evenly spread over batches, kept as the batches pass.

    Args:
        there: how many pass.
        tokens: about how many are kept.
    """

    def __init__(self, there: int, tokens: int = _TOKENS) -> None:
        self._step, self._kept = max(1, there // tokens), list[Tensor]()

    def add(self, batch: Tensor) -> None:
        """Take from a batch [B, S, I]."""
        self._kept.append(batch.flatten(0, -2)[:: self._step].clone())

    def total(self) -> Tensor | None:
        """What was taken, [1, N, I]; None without batches."""
        return torch.cat(self._kept)[None] if self._kept else None


def output_error(
    inputs: Tensor, weights: Mapping[str, Tensor], stored: Mapping[str, Tensor], rounding: FakeQuantize
) -> dict[str, float]:
    """||X W^T - r(X) W^^T||^2 / ||X W^T||^2 of matrices that share an input.

    Args:
        inputs: X [1, N, I].
        weights: W [O, I] by name, as they were.
        stored: W^ [O, I], as they are stored.
        rounding: r.
    """
    exact, rounded = inputs.float(), rounding(inputs).float()
    errors = {}
    for name, weight in weights.items():
        wanted = exact @ weight.float().t()
        energy = float(wanted.square().sum())
        missed = float((wanted - rounded @ stored[name].float().t()).square().sum())
        errors[name] = missed / energy if energy > 0 else 0.0
    return errors
