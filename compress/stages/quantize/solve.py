"""Matrices through the solver that a stage's spec asks for, and what the report says of them.

Rows of a matrix are independent once its Hessian is known: each of several processes solves a share of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress import records
from compress.errors import NumericalError, RecipeError
from compress.formats.base import AnyGrid, AnyQuantized
from compress.kernels.replayed import DIRECTLY, Replays
from compress.loop.finite import all_finite
from compress.model.gguf.block_types import BlockType
from compress.model.shapes import LAYER
from compress.prune.patterns import solver_mask
from compress.quant.block_gptq import block_gptq, block_order, block_rtn
from compress.quant.block_refine import refine
from compress.quant.blocks import Blocked
from compress.quant.error_propagation import PropagatedError
from compress.quant.gptq import Factor, Mask, factorize, gptq, importance, round_to_nearest, visiting_order
from compress.quant.grid import Grid
from compress.quant.scales import Clip
from compress.recipe.quantize import QuantizeStage, WeightOnlyStage
from compress.recipe.weights import WeightStage
from compress.stages.quantize.few_tokens import damping, is_few, trust
from compress.system import distributed

_REFINED = 2  # rounds; more gain next to nothing


@dataclass(frozen=True)
class Solved:
    """One matrix after the solver, with what the report says of it."""

    quantized: AnyQuantized
    module: records.Module


def measure(
    weight: Tensor, quantized: AnyQuantized, hessian: Tensor | None, loss: Tensor | None, damp: float | None
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
    name: str, quantized: AnyQuantized, squares: Tensor, damp: float | None, fallback: str | None
) -> records.Module:
    """What the report says of a matrix, from its rows' `squares`."""
    rows, columns = quantized.codes.shape
    weights, missed, *outputs = squares.sum(0).tolist()  # at once: a GPU is waited for
    error = max(0.0, _share(outputs[1], outputs[0])) if outputs else None
    grid: dict[str, Any]
    if isinstance(quantized, Blocked):
        kind = quantized.type
        grid = {"bits": kind.bits, "group_size": kind.sub_width, "symmetric": not kind.has_min, "dtype": kind.name}
    else:
        own = quantized.grid
        grid = {"bits": own.bits, "group_size": own.group_size, "symmetric": own.symmetric}
        grid["dtype"] = "fp" if own.float8 else "int"
    return records.Module(
        name=name, shape=(rows, columns), damp=damp, fallback=fallback, error=error,
        weight_error=_share(missed, weights), **grid,
    )  # fmt: skip


def _energy(matrix: Tensor, hessian: Tensor) -> Tensor:
    """||row X||^2 of each row, from X^T X, to three digits on a GPU, whose matrix units are worth it."""
    dtype = torch.bfloat16 if matrix.device.type == "cuda" else torch.float32
    return ((matrix.to(dtype) @ hessian.to(dtype)) * matrix).sum(1)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _gathered(part: Tensor, count: int) -> Tensor:
    """All rows of a tensor of which each process has its share."""
    sent = part.int() if part.dtype == torch.int16 else part  # which NCCL does not send
    return distributed.gather_rows(sent, count).to(part.dtype)


def _each(matrix: AnyQuantized, change: Callable[[Tensor], Tensor]) -> AnyQuantized:
    """The matrix with each of its tensors changed; all have its rows."""
    parts: dict[str, Any] = {field.name: getattr(matrix, field.name) for field in fields(matrix)}
    changed: dict[str, Any] = {name: change(part) for name, part in parts.items() if isinstance(part, Tensor)}
    return replace(matrix, **changed)


class _Plan(NamedTuple):
    """How a matrix will be quantized.

    Args:
        factor: of its Hessian; None rounds to nearest.
        importance: weighs the scale search where there is no factor; None takes the full range.
        clip: how the solver finds a group's scale.
        fallback: why there is no factor though there is a Hessian.
    """

    factor: Factor | None
    importance: Tensor | None
    clip: Clip
    fallback: str | None = None


class Solver:
    """Quantizes matrices as a stage's spec says.

    Args:
        spec: the stage.
        grids: of its matrices, by name.
        tokens: that a Hessian is of, in all processes.
        replays: runs the steps of solvers on a GPU; what it keeps for that is free when the solver is.

    Attributes:
        correction: share of the propagated error that weights are moved to make good; 0 where the spec has none.
        pattern: of the zeros that matrices inside the layers get; None where the spec has none.
    """

    def __init__(
        self, spec: QuantizeStage, grids: Mapping[str, AnyGrid], tokens: int = 0, replays: Replays = DIRECTLY
    ) -> None:
        self.spec, self.grids, self.tokens, self.replays = spec, grids, tokens, replays
        self.correction = spec.correction if isinstance(spec, WeightStage) else 0.0
        self.pattern = spec.pattern if isinstance(spec, WeightOnlyStage) else None

    def solve(
        self,
        weights: Mapping[str, Tensor],
        hessian: Tensor | None,
        propagated: PropagatedError | None = None,
    ) -> dict[str, Solved]:
        """Quantize matrices that share a Hessian; those on one grid are solved as one tall matrix.

        Args:
            weights: [O, I] each, by name.
            hessian: of their inputs in this process; summed over all processes here.
            propagated: error of their inputs, likewise.
        """
        for sums in (hessian, None if propagated is None else propagated.total()):
            if sums is not None:
                distributed.all_reduce(sums)
        by_grid: dict[tuple[AnyGrid, str], list[str]] = {}
        for name in weights:
            grid = self.grids[name]
            alone = name if isinstance(grid, Grid) and grid.rows != 1 else ""  # rows of two matrices share no scale
            by_grid.setdefault((grid, alone), []).append(name)
        shares = {name: weight[distributed.rows(len(weight))] for name, weight in weights.items()}
        targets = [torch.cat([shares[name] for name in names]).float() for names in by_grid.values()]
        masks = [self._mask(target, hessian, names) for names, target in zip(by_grid.values(), targets, strict=True)]
        if propagated is not None and hessian is not None:
            own = distributed.rows(len(next(iter(weights.values()))))
            share = self.correction * trust(self.tokens, len(hessian))
            targets = [propagated.correct(target, hessian, share, own) for target in targets]
            propagated.clear()
        solved: dict[str, Solved] = {}
        for ((grid, _), names), target, mask in zip(by_grid.items(), targets, masks, strict=True):
            plan = self._plan(target, hessian, grid, names)
            found: AnyQuantized
            if isinstance(grid, BlockType):
                found, loss = self._in_blocks(target, hessian, plan, grid)
            elif plan.factor is None:
                found, loss = round_to_nearest(_masked(target, hessian, mask), plan.importance, grid), None
            else:
                found, loss = gptq(target, plan.factor, grid, plan.clip, mask)
            if hessian is not None and is_few(self.tokens, len(hessian)):
                loss = None  # most of it is damping
            for name, rows in zip(names, _rows([shares[name] for name in names]), strict=True):
                part = _each(found, itemgetter(rows))
                damp = None if plan.factor is None else plan.factor.damp
                squares = measure(target[rows], part, hessian, None if loss is None else loss[rows], damp)
                count = len(weights[name])
                whole = _each(part, partial(_gathered, count=count))
                squares = distributed.gather_rows(squares, count)
                solved[name] = Solved(whole, describe(name, whole, squares, damp, plan.fallback))
        return solved

    def _in_blocks(
        self, weight: Tensor, hessian: Tensor | None, plan: _Plan, kind: BlockType
    ) -> tuple[Blocked, Tensor | None]:
        """On ggml's grids; codes and scales are refined where there are tokens enough to trust the Hessian that far."""
        if plan.factor is None or hessian is None:
            assert plan.importance is not None, "no recipe leaves blocks without a search"
            return block_rtn(weight, plan.importance, kind), None
        found, loss = block_gptq(weight, plan.factor, kind, plan.clip, self.replays)
        if is_few(self.tokens, len(hessian)):
            return found, loss
        return refine(weight, found, hessian, plan.factor.damp, _REFINED, self.replays)

    def _mask(self, weight: Tensor, hessian: Tensor | None, names: Sequence[str]) -> Mask | None:
        """Which weights become zero where a pattern is wanted: in matrices inside the layers.

        Raises:
            RecipeError: a width that the pattern's neighbours don't divide.
        """
        if self.pattern is None or hessian is None or LAYER.fullmatch(f"{names[0]}.weight") is None:
            return None
        width, of = weight.shape[1], int(self.pattern.partition(":")[2])
        if width % of:
            problem = f"{self.pattern} needs widths that {of} divides, and {names[0]} has {width}"
            raise RecipeError([f"stages: pattern: {problem}; add it to ignore, or remove pattern"])
        return solver_mask(self.pattern, silent=hessian.diagonal() <= 0, zeros=weight == 0)

    def _plan(self, weight: Tensor, hessian: Tensor | None, grid: AnyGrid, names: list[str]) -> _Plan:
        """The factor that the spec's solver wants; none without a Hessian, or where no damping repairs it."""
        clip = self.spec.clip or ("mse" if hessian is None else "hessian")
        if hessian is None:
            return _Plan(None, importance(weight.new_ones(weight.shape[1]), clip), clip)
        diagonal = hessian.diagonal()
        if not bool(all_finite(diagonal) & all_finite(weight)):
            raise NumericalError(f"NaN or inf in the inputs of {', '.join(names)}; the weights may be damaged")
        act_order = self.spec.act_order and self.pattern is None
        if isinstance(grid, BlockType):
            order = block_order(diagonal, grid, act_order)
        else:
            order = visiting_order(diagonal, grid.columns_per_group(weight.shape[1]), act_order)
        try:
            factor = factorize(hessian, order, damping(self.tokens, len(hessian), self.spec.damp))
        except NumericalError as error:
            return _Plan(None, importance(diagonal, clip), clip, str(error))
        return _Plan(factor, None, clip)


def _masked(weight: Tensor, hessian: Tensor | None, mask: Mask | None) -> Tensor:
    """The weights with the zeros of a mask, where nothing can make up for them."""
    if mask is None or hessian is None:
        return weight
    return weight.masked_fill(~mask.keep(0, weight.square() * hessian.diagonal()), 0.0)


def _rows(matrices: Sequence[Tensor]) -> list[slice]:
    """Where each matrix lies when they are stacked."""
    ends = list(accumulate(len(matrix) for matrix in matrices))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
