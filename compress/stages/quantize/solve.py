"""Matrices through the solver that a stage's spec asks for, and what the report says of them.

Rows of a matrix are independent once its Hessian is known: each of several processes solves a share of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import records
from compress.errors import NumericalError
from compress.loop.finite import all_finite
from compress.quant.error_propagation import PropagatedError
from compress.quant.gptq import factorize, gptq, importance, round_to_nearest, visiting_order
from compress.quant.grid import Grid, Quantized
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.stages.quantize.few_tokens import damping, is_few, trust
from compress.system import distributed


@dataclass(frozen=True)
class Solved:
    """One matrix after the solver, with what the report says of it."""

    quantized: Quantized
    module: records.Module


def measure(
    weight: Tensor, quantized: Quantized, hessian: Tensor | None, loss: Tensor | None, damp: float | None
) -> Tensor:
    """Squares of each row: of its weights, of their errors and, with a Hessian, of its outputs and their errors.

    Returns:
        [O, 2] or [O, 4]. `loss` [O] is the solver's (damped) output error, computed here where there is none.
    """
    missed = weight - quantized.dequantize()
    squares = [weight.square().sum(1), missed.square().sum(1)]
    if hessian is not None:
        if loss is not None and damp is not None:
            loss = loss - damp * hessian.diagonal().mean() * squares[1]  # without the damping
        else:
            loss = _energy(missed, hessian)
        squares += [_energy(weight, hessian), loss]
    return torch.stack(squares, 1)


def describe(
    name: str, quantized: Quantized, squares: Tensor, damp: float | None, fallback: str | None
) -> records.Module:
    """What the report says of a matrix, from its rows' `squares`."""
    rows, columns = quantized.codes.shape
    weights, missed, *outputs = squares.sum(0).tolist()  # at once: a GPU is waited for
    error = max(0.0, _share(outputs[1], outputs[0])) if outputs else None
    return records.Module(
        name=name, shape=(rows, columns), bits=quantized.grid.bits, damp=damp, fallback=fallback,
        group_size=quantized.grid.group_size, symmetric=quantized.grid.symmetric, error=error,
        weight_error=_share(missed, weights), dtype="fp" if quantized.grid.float8 else "int",
    )  # fmt: skip


def _energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """||row X||^2 of each row, from X^T X, to three digits on a GPU, whose matrix units are worth it."""
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    return ((matrix.to(dtype) @ hessian.to(dtype)) * matrix).sum(1)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _gather(part: Quantized, rows: int) -> Quantized:
    """The whole matrix, of which each process has its share."""
    codes, scale, zero = (distributed.gather_rows(each, rows) for each in (part.codes, part.scale, part.zero))
    return Quantized(codes, scale, zero, part.grid)


class Solver:
    """Quantizes matrices as a stage's spec says.

    Args:
        spec: the stage.
        grids: of its matrices, by name.

    Attributes:
        correction: share of the inputs' drift that weights are moved to make good; 0 where the spec has none.
    """

    def __init__(self, spec: WeightOnlyStage | WeightActivationStage, grids: Mapping[str, Grid]) -> None:
        self.spec, self.grids = spec, grids
        self.correction = spec.correction if isinstance(spec, WeightOnlyStage) else 0.0

    def solve(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        drift: PropagatedError | None = None,
        tokens: int = 0,
    ) -> dict[str, Solved]:
        """Quantize matrices that share a Hessian; those on one grid are solved as one tall matrix.

        Args:
            weights: [O, I] each, by name.
            hessian: of their inputs in this process; summed over all processes here.
            drift: of their inputs, likewise.
            tokens: that `hessian` and `drift` are of, likewise.
        """
        tokens = distributed.total(tokens)
        for sums in (hessian, None if drift is None else drift.total()):
            if sums is not None:
                distributed.all_reduce(sums)
        by_grid: dict[tuple[Grid, str], list[str]] = {}
        for name in weights:
            alone = name if self.grids[name].rows != 1 else ""  # rows of two matrices never share a scale
            by_grid.setdefault((self.grids[name], alone), []).append(name)
        shares = {name: weight[distributed.rows(len(weight))] for name, weight in weights.items()}
        targets = [torch.cat([shares[name] for name in names]).float() for names in by_grid.values()]
        if drift is not None and hessian is not None:
            own = distributed.rows(len(next(iter(weights.values()))))
            share = self.correction * trust(tokens, len(hessian))
            targets = [drift.correct(target, hessian, share, own) for target in targets]
            drift.clear()
        solved: dict[str, Solved] = {}
        for ((grid, _), names), target in zip(by_grid.items(), targets, strict=True):
            found, loss, damp, fallback = self._quantize(target, hessian, grid, names, tokens)
            start = 0
            for name in names:
                rows = slice(start, start + len(shares[name]))
                start = rows.stop
                part = Quantized(found.codes[rows], found.scale[rows], found.zero[rows], grid)
                squares = measure(target[rows], part, hessian, None if loss is None else loss[rows], damp)
                whole = _gather(part, len(weights[name]))
                squares = distributed.gather_rows(squares, len(weights[name]))
                solved[name] = Solved(whole, describe(name, whole, squares, damp, fallback))
        return solved

    def _quantize(
        self, weight: Tensor, hessian: Tensor | None, grid: Grid, names: list[str], tokens: int
    ) -> tuple[Quantized, Tensor | None, float | None, str | None]:
        """The spec's solver, or round-to-nearest where no damping repairs the Hessian.

        Returns:
            The matrix; each row's loss where damping is a small part of it; the damping (None for round-to-nearest);
            why the solver was not used.
        """
        clip = self.spec.clip or ("mse" if hessian is None else "hessian")
        if hessian is None:
            return round_to_nearest(weight, importance(weight.new_ones(weight.shape[1]), clip), grid), None, None, None
        diagonal = hessian.diagonal()
        if not bool(all_finite(diagonal) & all_finite(weight)):
            raise NumericalError(f"NaN or inf in the inputs of {', '.join(names)}; the weights may be damaged")
        order = visiting_order(diagonal, grid.columns_per_group(weight.shape[1]), self.spec.act_order)
        try:
            factor = factorize(hessian, order, damping(tokens, len(hessian), self.spec.damp))
        except NumericalError as error:
            return round_to_nearest(weight, importance(diagonal, clip), grid), None, None, str(error)
        quantized, loss = gptq(weight, factor, grid, clip)
        return quantized, None if is_few(tokens, len(hessian)) else loss, factor.damp, None
