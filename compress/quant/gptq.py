"""GPTQ (Frantar et al., arXiv 2210.17323) with one triangular factor and no inverse, SparseGPT, and round-to-nearest.

Quantizing column by column with error feedback is nearest-plane rounding in the lattice of the Hessian's factor. With

    H = R R^T, R upper triangular            (Cholesky of H flipped in both axes, flipped back)
    F = R / diag(R)                          (unit diagonal)

the loss (w - w^) H (w - w^)^T is sum_j R_jj^2 (w_j + (w - w^)_{:j} F_{:j,j} - w^_j)^2, so each column is rounded to the
nearest level of its corrected target, w^_j = Q(w_j + (w - w^)_{:j} F_{:j,j}). In exact arithmetic these are the codes
of the usual form, which inverts H. Left out: lazy inverse updates, which this form does not need.

A group's scale is fitted when the group is entered, to the weights as the errors so far have moved them. The activation
order therefore moves whole groups (largest first) and columns inside them, never columns across groups: it keeps both
advantages and the stored column order, so no g_idx is needed. That is GAR, group-aware reordering (arXiv 2505.14638).

A weight that is set to zero is one whose only level is 0, so SparseGPT (Frantar and Alistarh, arXiv 2301.00774) is the
same loop: a `Mask` says which weights become zero, a few columns at a time as they are entered, by what that costs:
R_jj^2 times the square of what the errors so far have made of them. The others are rounded, or keep their targets.

Everything here takes tensors and returns tensors. Shapes: O output rows, I input columns, G groups, g columns in one.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.kernels import usable
from compress.quant.grid import Grid, Quantized, round_levels_, to_codes
from compress.quant.scales import Clip, group_scales
from compress.system.parallel import one_thread

_INNER = 16  # columns between two matrix products inside a block: rank-1 updates touch only these
_ROWS_WORTH_THREADS = (
    8192  # in the column loop's products; with fewer, threads wait longer for each other than they work
)
_DAMP_RETRIES = 6  # each ten times the damping before
_BLOCK = 128  # columns between two products with all errors before them, where no scale makes groups


@dataclass(frozen=True)
class Factor:
    """The factor of a Hessian in the order in which columns are quantized.

    Args:
        feedback: F, float32 [I, I], unit upper triangular, in the visiting order.
        pivot: R_jj^2, float32 [I], in the visiting order: what a squared rounding error in a column costs.
        order: int64 [I]: column visited at each step.
        damp: the share of the mean diagonal that was added, after retries.
    """

    feedback: Tensor
    pivot: Tensor
    order: Tensor
    damp: float


@dataclass(frozen=True)
class Mask:
    """Which weights become zero.

    Args:
        width: neighbouring columns that are decided on together, when the first of them is entered.
        keep: from a column and the cost of zeros from there on, float32 [O, n], which weights stay, bool [O, n]. n is
            `width`, a multiple of it, or what is left at the matrix's end.
    """

    width: int
    keep: Callable[[int, Tensor], Tensor]


def visiting_order(importance: Tensor, columns_per_group: int, act_order: bool) -> Tensor:
    """Order of the columns, int64 [I]: whole groups by their largest importance, then columns inside each.

    Args:
        importance: [I], the Hessian's diagonal.
        columns_per_group: columns that share a scale.
        act_order: False keeps the stored order.
    """
    if not act_order:
        return torch.arange(importance.numel(), device=importance.device)
    grouped = importance.view(-1, columns_per_group)
    groups = grouped.amax(1).argsort(descending=True, stable=True)
    inside = grouped.argsort(dim=1, descending=True, stable=True)
    return (groups[:, None] * columns_per_group + inside[groups]).flatten()


def factorize(hessian: Tensor, order: Tensor, damp: float) -> Factor:
    """The factor of `hessian` + damping in the given order.

    Args:
        hessian: float32 [I, I], symmetric, X^T X of the inputs; columns never active may be zero.
        order: int64 [I], from `visiting_order`.
        damp: share of the mean diagonal added to the diagonal; ten times more at each retry.

    Raises:
        NumericalError: not positive definite whatever the damping (NaN or inf in the inputs).
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    backwards = order.flip(0)
    flipped = hessian[backwards][:, backwards]
    inactive = (diagonal <= 0)[backwards]
    for attempt in range(_DAMP_RETRIES):
        trial = flipped.clone() if attempt else flipped
        added = torch.where(inactive, mean, damp * 10**attempt * mean).clamp(min=torch.finfo(torch.float32).tiny)
        trial.diagonal().copy_(diagonal[backwards] + added)
        lower, failed = torch.linalg.cholesky_ex(trial)
        pivots = lower.diagonal()
        if bool((failed == 0) & torch.isfinite(pivots).all()):  # one question, for which a GPU is waited for once
            return Factor((lower / pivots).flip(0, 1), pivots.flip(0).square(), order, damp * 10**attempt)
    raise NumericalError(
        f"the Hessian of a layer with {hessian.shape[0]} inputs is not positive definite, even with "
        f"damp {damp * 10 ** (_DAMP_RETRIES - 1):g}"
    )


def gptq(weight: Tensor, factor: Factor, grid: Grid, clip: Clip, mask: Mask | None = None) -> tuple[Quantized, Tensor]:
    """Quantize one matrix with error feedback.

    Args:
        weight: [O, I].
        factor: of the Hessian of the matrix's inputs; its order must keep groups whole.
        grid: where the codes lie.
        clip: how a group's scale is found.
        mask: the weights that become zero (code == zero point) in the same pass; its width divides the groups', and the
            factor is in the stored order.

    Returns:
        The matrix, and each row's loss (w - w^) H (w - w^)^T under the damped Hessian, float32 [O].
    """
    if mask is None and usable(weight) and not grid.float8:
        from compress.kernels.solver import solve  # here, because it imports triton

        work = weight.t().contiguous()[factor.order].float()
        weighs = importance(factor.pivot, clip)
        codes, scales, zeros, loss = solve(work, factor.feedback, factor.pivot, weighs, grid, group_scales)
        return _in_stored_order(codes, scales, zeros, factor.order, grid), loss
    work = weight.float().t()[factor.order]  # [I, O], rows in the visiting order
    levels, scales, zeros, loss = _walk(work, factor, grid, clip, mask)
    return _in_stored_order(levels, scales, zeros, factor.order, grid), loss


def sparsify(weight: Tensor, factor: Factor, mask: Mask) -> tuple[Tensor, Tensor]:
    """Set weights of one matrix to zero, and make up for each in the columns after it; nothing is rounded.

    Args:
        weight: [O, I].
        factor: of the Hessian of the matrix's inputs, in the stored order.
        mask: which; its width divides 128.

    Returns:
        The matrix, float32 [O, I], and each row's loss as for `gptq`.
    """
    values, _, _, loss = _walk(weight.float().t().contiguous(), factor, None, "none", mask)
    return values.t().contiguous(), loss


def _walk(
    work: Tensor, factor: Factor, grid: Grid | None, clip: Clip, mask: Mask | None
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """The loop over groups of columns of `work` [I, O], in the visiting order.

    Returns:
        Codes as float32 [I, O] (without a grid the weights themselves), each group's scale and zero, each row's loss.
    """
    columns, rows = work.shape
    width = _BLOCK if grid is None else grid.columns_per_group(columns)
    error, levels = torch.empty_like(work), torch.empty_like(work)
    loss = work.new_zeros(rows)
    scales, zeros = [], []
    for start in range(0, columns, width):
        group = slice(start, start + width)
        pivot, inside = factor.pivot[group], factor.feedback[group, group]
        target = torch.addmm(work[group], factor.feedback[:start, group].t(), error[:start])
        chooser = None if mask is None else _GroupMask(mask, start, pivot)
        if grid is None:
            scale, zero = work.new_ones(rows), work.new_zeros(rows)
        else:
            moved = moved_weights(work[group], target, inside)
            if chooser is not None:  # foreseen: errors inside the group may still change the choice a little
                moved.masked_fill_(chooser.removed(0, moved), 0.0)
            scale, zero = group_scales(moved.t(), importance(pivot, clip), grid)
        with one_thread() if rows < _ROWS_WORTH_THREADS else nullcontext():
            _quantize_group(work[group], target, inside, scale, zero, grid, levels[group], error[group], chooser)
        missed = torch.addcmul(target, levels[group], scale, value=-1)
        loss += pivot @ missed.square_()
        levels[group].add_(zero)
        scales.append(scale)
        zeros.append(zero)
    return levels, scales, zeros, loss


def moved_weights(weight: Tensor, target: Tensor, feedback: Tensor) -> Tensor:
    """Where the errors so far have moved columns [n, O], were these left alone; `feedback` is that among them."""
    moved: Tensor = torch.linalg.solve_triangular(feedback.t(), target - weight, upper=False, unitriangular=True)
    return moved.add_(weight)


@dataclass(frozen=True)
class _GroupMask:
    """A mask, to be asked about the group of columns that begins at `start` and has the pivots [g]."""

    mask: Mask
    start: int
    pivot: Tensor

    def removed(self, first: int, moved: Tensor) -> Tensor:
        """Which of `moved` [n, O], the group's columns from `first` on, become zero: bool [n, O]."""
        cost = moved.square() * self.pivot[first : first + len(moved), None]
        return ~self.mask.keep(self.start + first, cost.t()).t().contiguous()


def _quantize_group(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid | None,
    levels: Tensor,
    error: Tensor,
    chooser: _GroupMask | None = None,
) -> None:
    """Column loop of one group [g, O], in place.

    `target` holds the weights plus the feedback of earlier groups and gets that of this one; `levels` (code - zero) and
    `error` (w - w^) are filled. A level times a 16-bit scale is exact in float32, so `addcmul` rounds once. Without a
    grid, levels are the targets themselves.
    """
    low, high = -zero, zero if grid is None else grid.largest_code - zero
    columns, removed = target.shape[0], torch.empty(0)
    for first in range(0, columns, _INNER):
        last = min(first + _INNER, columns)
        for column in range(first, last):
            if grid is None:
                level = levels[column].copy_(target[column])
            else:
                level = torch.div(target[column], scale, out=levels[column])
                round_levels_(level, low, high, grid)
            if chooser is not None:
                width = chooser.mask.width
                if column % width == 0:
                    part = slice(column, min(column + width, columns))
                    moved = moved_weights(weight[part], target[part], feedback[part, part])
                    removed = chooser.removed(column, moved)
                level.masked_fill_(removed[column % width], 0.0)
            missed = torch.addcmul(weight[column], level, scale, value=-1, out=error[column])
            if column + 1 < last:
                target[column + 1 : last].addr_(feedback[column, column + 1 : last], missed)
        if last < columns:
            target[last:].addmm_(feedback[first:last, last:].t(), error[first:last])


def round_to_nearest(weight: Tensor, importance: Tensor | None, grid: Grid) -> Quantized:
    """Quantize one matrix [O, I] without error feedback.

    Args:
        weight: [O, I].
        importance: [I], weighs the scale search; None takes the full range.
        grid: where the codes lie.
    """
    rows, columns = weight.shape
    width = grid.columns_per_group(columns)
    grouped = weight.float().view(rows, columns // width, width)
    found = [
        group_scales(grouped[:, g], None if importance is None else importance[g * width : (g + 1) * width], grid)
        for g in range(columns // width)
    ]
    scale, zero = torch.stack([s for s, _ in found], 1), torch.stack([z for _, z in found], 1)
    low, high = -zero[..., None], grid.largest_code - zero[..., None]
    codes = to_codes(round_levels_(grouped / scale[..., None], low, high, grid), zero[..., None], grid)
    return Quantized(codes.view(rows, columns), scale.to(grid.scale_dtype), zero.to(torch.uint8), grid)


def importance(pivot: Tensor, clip: Clip) -> Tensor | None:
    """Weights of the scale search for a `clip` setting: None, ones, or the cost of each column's error."""
    if clip == "none":
        return None
    return torch.ones_like(pivot) if clip == "mse" else pivot


def _in_stored_order(
    codes: Tensor, scales: Sequence[Tensor], zeros: Sequence[Tensor], order: Tensor, grid: Grid
) -> Quantized:
    """Undo the visiting order: codes [I, O] and a scale per visited group become [O, I] and [O, G]."""
    width = codes.shape[0] // len(scales)
    stored = torch.empty_like(codes)
    stored[order] = codes
    position = (order[::width] // width).argsort()  # visited position of each stored group
    scale, zero = torch.stack(list(scales), 1)[:, position], torch.stack(list(zeros), 1)[:, position]
    return Quantized(
        codes=to_codes(stored.t(), 0, grid).contiguous(),
        scale=scale.to(grid.scale_dtype).contiguous(),
        zero=zero.to(torch.uint8).contiguous(),
        grid=grid,
    )
