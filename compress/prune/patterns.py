"""Single weights become zero: any that make up a share, or n of every m neighbours in a row are kept.

Three scores, the lowest of which go:

    magnitude   |W_ij|                  over the matrix
    wanda       |W_ij| ||X_j||          in each row                            (Sun et al., arXiv 2306.11695)
    sparsegpt   W_ij^2 R_jj^2           in blocks of 128 columns, over all rows, with the weights as they are when the
                                        block is entered                       (Frantar and Alistarh, arXiv 2301.00774)

With n of m, all three compare m neighbours in a row. Only sparsegpt changes the weights that stay: its solver is GPTQ's
(compress/quant/gptq.py), which may also round them in the same pass, and asks the mask that is made here.

Shapes: O output rows, I input columns.
"""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from compress.quant.gptq import Mask

Pattern: TypeAlias = Literal["2:4", "4:8", "unstructured"]

_BLOCK = 128  # columns that unstructured sparsegpt decides on together


def kept_of(pattern: Pattern) -> tuple[int, int] | None:
    """How many of how many neighbours are kept, n and m; None where neighbours are not compared."""
    kept, _, of = pattern.partition(":")
    return (int(kept), int(of)) if of else None


def keep_mask(scores: Tensor, pattern: Pattern, sparsity: float = 0.5, by_row: bool = False) -> Tensor:
    """Which weights stay.

    Args:
        scores: [O, I], the larger the more a weight counts; of equals, those in front go first.
        pattern: m must divide I.
        sparsity: of unstructured, the share that goes.
        by_row: whether that is the share of each row, or of the matrix.

    Returns:
        bool [O, I].
    """
    counts = kept_of(pattern)
    if counts is not None:
        compared, gone = scores.reshape(-1, counts[1]), counts[1] - counts[0]
    else:
        compared = scores if by_row else scores.reshape(1, -1)
        gone = round(sparsity * compared.shape[1])
    lowest = compared.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(compared, dtype=torch.bool).scatter_(1, lowest, False).view_as(scores)


def magnitude(weight: Tensor, pattern: Pattern, sparsity: float = 0.5) -> Tensor:
    """`weight` [O, I] without its smallest weights."""
    return weight.masked_fill(~keep_mask(weight.abs(), pattern, sparsity), 0.0)


def wanda(weight: Tensor, hessian: Tensor, pattern: Pattern, sparsity: float = 0.5) -> Tensor:
    """`weight` [O, I] without those that count least for the outputs, by themselves.

    Args:
        weight: [O, I].
        hessian: X^T X of the inputs, [I, I].
        pattern: as for `keep_mask`.
        sparsity: likewise.
    """
    scores = weight.abs() * hessian.diagonal().sqrt()
    return weight.masked_fill(~keep_mask(scores, pattern, sparsity, by_row=True), 0.0)


def solver_mask(
    pattern: Pattern, sparsity: float = 0.5, silent: Tensor | None = None, zeros: Tensor | None = None
) -> Mask:
    """What tells the solver which weights become zero: those that the others can best make up for.

    Args:
        pattern: as for `keep_mask`.
        sparsity: likewise.
        silent: bool [I], inputs that were always zero. Their weights go first, whatever the damping says of their cost.
        zeros: for n:m, bool [O, I], weights that are zero already: where m neighbours have enough, they stay as they
            are.
    """
    counts = kept_of(pattern)
    fixed = None
    if zeros is not None and counts is not None:
        fixed = zeros & _enough(zeros, *counts).repeat_interleave(counts[1], 1)

    def keep(first: int, cost: Tensor) -> Tensor:
        columns = slice(first, first + cost.shape[1])
        if silent is not None:
            cost = cost.masked_fill(silent[columns], 0.0)
        if fixed is None:
            return keep_mask(cost, pattern, sparsity)
        return keep_mask(cost.masked_fill(fixed[:, columns], -1.0), pattern) & ~fixed[:, columns]

    return Mask(_BLOCK if counts is None else counts[1], keep)


def has_pattern(weight: Tensor, pattern: Pattern) -> bool:
    """Whether `weight` [O, I] keeps at most n of every m neighbours in a row; one that is all zero keeps no pattern."""
    counts = kept_of(pattern)
    if counts is None or weight.shape[1] % counts[1] or not bool(weight.any()):
        return False
    return bool(_enough(weight == 0, *counts).all())


def output_error(weight: Tensor, sparse: Tensor, hessian: Tensor) -> float:
    """||(W - W^) X||^2 / ||W X||^2 for W, W^ [O, I] and X^T X [I, I]; 0 where there is no output."""
    missed = weight - sparse
    part, whole = (float(((each @ hessian) * each).sum()) for each in (missed, weight))
    return max(0.0, part / whole) if whole > 0 else 0.0


def _enough(zeros: Tensor, kept: int, of: int) -> Tensor:
    """Which neighbours have as many zeros ([O, I]) as n of m wants, or more: bool [O, I / m]."""
    counts: Tensor = zeros.unflatten(1, (-1, of)).sum(2)
    return counts >= of - kept
