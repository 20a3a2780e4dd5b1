"""What is kept makes up for what is removed: least squares towards the original model's outputs.

A linear of the smaller model reads X (some inputs are gone, and what comes before has changed), and the original one
read X0 and put out W0 X0. Where its output is added to the residual stream, that has moved too, from R0 to R. What is
wanted of the new weights is T = W0 X0 + R0 - R, so they are

    W' = argmin |W' X - T|^2 + d |(W' - W) diag(X X^T)^1/2|^2 = W + (T - W X) X^T (X X^T + d diag(X X^T))^-1,

with W what was kept of W0. Without drift and damping that is the optimal brain surgeon's update for all removed columns
at once. Each input is damped by its own energy, not by the mean of all, which a few huge inputs would make too much for
the others. With few tokens for the inputs they are damped more (`damping`).

Shapes: N tokens, I0 inputs of the original, I of the smaller model's linear, O outputs that are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.quant.statistics import Gram, add_product

_RETRIES = 6  # each ten times the damping before
_LEAST = 1e-9  # of the mean energy: what every input is damped by
_STRENGTH = 2.0


@dataclass(frozen=True)
class Refit:
    """A linear's new weights.

    Args:
        weight: W', float32 [O, I].
        before: |W X - T|^2 / |T|^2, of the kept weights as they were; None where it was not added up.
        after: |W' X - T|^2 / |T|^2.
    """

    weight: Tensor
    before: float | None
    after: float | None


class WriterFit:
    """Sums over tokens for a linear by itself, which may write to the residual stream.

    Args:
        kept: W [O, I].
        original: W0 [O, I0], the rows that are kept.
    """

    def __init__(self, kept: Tensor, original: Tensor) -> None:
        self._kept, self._original = kept, original
        self._gram = Gram()
        self._missing: Tensor | None = None
        self._energies: list[Tensor] = []

    def add(
        self,
        inputs: Tensor,
        original: Tensor,
        residual: tuple[Tensor, Tensor] | None,
        target: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            inputs: X [..., I].
            original: X0 [..., I0].
            residual: R and R0 [..., O], in front of a linear that writes to the residual stream.
            target: what R + W' X should be, [..., O], instead of W0 X0 + R0.
        """
        if target is not None and residual is not None:
            wanted = (target - residual[0]).flatten(0, -2)
        else:
            wanted = original.flatten(0, -2) @ self._original.t().to(original.dtype)
            if residual is not None:
                wanted += (residual[1] - residual[0]).flatten(0, -2)
        rows = inputs.flatten(0, -2)
        missing = wanted - rows @ self._kept.t().to(rows.dtype)
        self._gram.add(rows)
        self._missing = add_product(self._missing, missing, rows)
        self._energies.append(torch.stack([missing.float().square().sum(), wanted.float().square().sum()]))

    def solve(self, damp: float) -> Refit:
        """The new weights.

        Args:
            damp: share of each input's energy that pulls its weights towards the kept ones.
        """
        gram = self._gram.total()
        assert gram is not None and self._missing is not None, "batches were added"
        change = ridge(self._missing, gram, damp)
        missed, whole = torch.stack(self._energies).sum(0).tolist()
        gain = (2 * change * self._missing - (change @ gram) * change).sum()
        after = max(0.0, missed - float(gain))
        share = 1 / whole if whole > 0 else 0.0
        return Refit(self._kept + change, missed * share, after * share)


class ReaderFit:
    """Sums over tokens for any number of linears that read the same inputs, and write to no residual stream."""

    def __init__(self) -> None:
        self._gram = Gram()
        self._across: Tensor | None = None

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Add a batch: X [..., I] and X0 [..., I0]."""
        rows = inputs.flatten(0, -2)
        self._gram.add(rows)
        self._across = add_product(self._across, original.flatten(0, -2), rows)

    def solve(self, kept: Tensor, original: Tensor, damp: float, share: float = 1.0) -> Refit:
        """The new weights of one of them.

        Args:
            kept: W [O, I].
            original: W0 [O, I0].
            damp: as for `WriterFit.solve`.
            share: of the way from W to W'.
        """
        gram = self._gram.total()
        assert gram is not None and self._across is not None, "batches were added"
        missing = original.to(gram.dtype) @ self._across - kept.to(gram.dtype) @ gram
        return Refit(kept + share * ridge(missing, gram, damp), None, None)


def damping(tokens: int, inputs: int, damp: float) -> float:
    """Share of each input's energy to damp by, where a recipe says `damp`: more where the tokens are few."""
    return max(damp, _STRENGTH * inputs / tokens)


def ridge(missing: Tensor, gram: Tensor, damp: float) -> Tensor:
    """M (G + d diag(G))^-1 for M = (T - W X) X^T [O, I] and G = X X^T [I, I]; zero where G is."""
    lower = damped_factor(gram, damp)
    return torch.zeros_like(missing) if lower is None else torch.cholesky_solve(missing.t(), lower).t()


def damped_factor(gram: Tensor, damp: float) -> Tensor | None:
    """The lower Cholesky factor of G + d diag(G), with ten times d where it has to be; None where G is zero.

    Inputs that are always zero get the mean.
    """
    diagonal = gram.diagonal()
    least = torch.where(diagonal <= 0, diagonal.mean(), _LEAST * diagonal.mean())
    for attempt in range(_RETRIES):
        damped = gram.clone()
        damped.diagonal().add_(damp * 10**attempt * diagonal + least)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            factor: Tensor = lower
            return factor
    return None
