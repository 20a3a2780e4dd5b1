"""GPTQ (Frantar et al., arXiv 2210.17323) with one triangular factor and no inverse, and round-to-nearest.

Quantizing column by column with error feedback is nearest-plane rounding in the lattice of the Hessian's factor. With

    H = R R^T, R upper triangular            (Cholesky of H flipped in both axes, flipped back)
    F = R / diag(R)                          (unit diagonal)

the loss (w - w^) H (w - w^)^T is sum_j R_jj^2 (w_j + (w - w^)_{:j} F_{:j,j} - w^_j)^2, so each column is rounded to the
nearest level of its corrected target, w^_j = Q(w_j + (w - w^)_{:j} F_{:j,j}). In exact arithmetic these are the codes
of the usual form, which inverts H. Left out: lazy inverse updates, which this form does not need.

A group's scale is fitted when the group is entered, to the weights as the errors so far have moved them. The activation
order therefore moves whole groups (largest first) and columns inside them, never columns across groups: it keeps both
advantages and the stored column order, so no g_idx is needed. That is GAR, group-aware reordering (arXiv 2505.14638).

Everything here takes tensors and returns tensors. Shapes: O output rows, I input columns, G groups, g columns in one.
"""

from collections.abc import Sequence
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


def gptq(weight: Tensor, factor: Factor, grid: Grid, clip: Clip) -> tuple[Quantized, Tensor]:
    """Quantize one matrix with error feedback.

    Args:
        weight: [O, I].
        factor: of the Hessian of the matrix's inputs; its order must keep groups whole.
        grid: where the codes lie.
        clip: how a group's scale is found.

    Returns:
        The matrix, and each row's loss (w - w^) H (w - w^)^T under the damped Hessian, float32 [O].
    """
    rows, columns = weight.shape
    width = grid.columns_per_group(columns)
    if usable(weight) and not grid.float8:
        from compress.kernels.solver import solve  # here, because it imports triton

        work = weight.t().contiguous()[factor.order].float()
        weighs = importance(factor.pivot, clip)
        codes, scales, zeros, loss = solve(work, factor.feedback, factor.pivot, weighs, grid, group_scales)
        return _in_stored_order(codes, scales, zeros, factor.order, grid), loss
    work = weight.float().t()[factor.order]  # [I, O], rows in the visiting order
    error, levels = torch.empty_like(work), torch.empty_like(work)
    loss = work.new_zeros(rows)
    scales, zeros = [], []
    for start in range(0, columns, width):
        group = slice(start, start + width)
        target = torch.addmm(work[group], factor.feedback[:start, group].t(), error[:start])
        inside = factor.feedback[group, group]
        # where the errors so far have moved the group's weights, were the rest of it not rounded
        moved = torch.linalg.solve_triangular(inside.t(), target - work[group], upper=False, unitriangular=True)
        scale, zero = group_scales(moved.add_(work[group]).t(), importance(factor.pivot[group], clip), grid)
        with one_thread() if rows < _ROWS_WORTH_THREADS else nullcontext():
            _quantize_group(work[group], target, inside, scale, zero, grid, levels[group], error[group])
        missed = torch.addcmul(target, levels[group], scale, value=-1)
        loss += factor.pivot[group] @ missed.square_()
        levels[group].add_(zero)
        scales.append(scale)
        zeros.append(zero)
    return _in_stored_order(levels, scales, zeros, factor.order, grid), loss


def _quantize_group(
    weight: Tensor,
    target: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero: Tensor,
    grid: Grid,
    levels: Tensor,
    error: Tensor,
) -> None:
    """Column loop of one group [g, O], in place.

    `target` holds the weights plus the feedback of earlier groups and gets that of this one; `levels` (code - zero) and
    `error` (w - w^) are filled. A level times a 16-bit scale is exact in float32, so `addcmul` rounds once.
    """
    low, high = -zero, grid.largest_code - zero
    for first in range(0, target.shape[0], _INNER):
        last = min(first + _INNER, target.shape[0])
        for column in range(first, last):
            level = round_levels_(torch.div(target[column], scale, out=levels[column]), low, high, grid)
            missed = torch.addcmul(weight[column], level, scale, value=-1, out=error[column])
            if column + 1 < last:
                target[column + 1 : last].addr_(feedback[column, column + 1 : last], missed)
        if last < target.shape[0]:
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
