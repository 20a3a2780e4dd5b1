"""Which parts of a layer matter least: removal orders from the inputs of the matrix that reads them.

`greedy` is the optimal brain surgeon (Hassibi and Stork 1993) on a linear's least-squares problem, as Frantar et al.
("Optimal Brain Compression", arXiv 2208.11580) use it for single weights: with H = X^T X, removing the columns P and
solving the others anew raises |W X|^2's error by tr(W_P ([H^-1]_PP)^-1 W_P^T). Columns go in blocks of such as hardly
depend on each other, so that of two that say the same only one goes; W and H^-1 are down-dated behind each block. The
other scores look at a channel alone: `activation` is Minitron's (Muralidharan et al., arXiv 2407.14679), `fluctuation`
is FLAP's (An et al., arXiv 2312.11983).

Shapes: N tokens, I inputs, O outputs, U units of I / U neighbouring columns.
"""

import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.prune.compensation import damped_factor

_BLOCK, _BLOCKS = 64, 100  # so many columns go before the others are scored anew, or one of so many parts of them
_COUPLED = 0.05  # r^2 of columns that go at once, at most


class InputStatistics:
    """Of a linear's inputs, over all batches: what the scores that look at a channel alone need."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._batches: list[Tensor] = []
        self._tokens = 0

    def add(self, batch: Tensor) -> None:
        """Add a batch [B, S, I]; one whose sequences were joined, [N, I], counts as one sequence."""
        x = batch.float().reshape(-1, *batch.shape[-2:])
        self._batches += x.abs().mean(1).unbind()
        found = torch.stack([x.sum((0, 1)), x.square().sum((0, 1))])
        self._sums = found if self._sums is None else self._sums + found
        self._tokens += x.shape[0] * x.shape[1]

    def activation(self) -> Tensor:
        """Mean magnitude over a sequence, root of the sum of squares over sequences: [I]."""
        return torch.stack(self._batches).square().sum(0).sqrt()

    def variance(self) -> Tensor:
        """[I]."""
        assert self._sums is not None, "batches were added"
        mean, square = (self._sums / self._tokens).unbind()
        return (square - mean.square()).clamp_min(0)


def greedy_order(weight: Tensor, hessian: Tensor, damp: float, width: int = 1, quota: int = 0) -> tuple[Tensor, Tensor]:
    """The order in which units are best removed when the others make up for them.

    Args:
        weight: [O, I].
        hessian: X^T X, float32 [I, I].
        damp: share of its diagonal that is added to it.
        width: columns of a unit.
        quota: units of a neighbourhood of which every round takes one; 0: they compete with all others.

    Returns:
        Units [U], first to be removed first, and the loss that each adds, [U].

    Raises:
        NumericalError: a Hessian that no damping repairs.
    """
    inverse = _inverse(hessian, damp)
    left = weight.to(inverse.dtype).masked_fill(hessian.diagonal() <= 0, 0.0)  # inputs that were always zero go first
    units = torch.arange(weight.shape[1] // width, device=weight.device)
    order, losses = [], []
    waiting: set[int] = set()
    while len(units):
        scores = _scores(left, inverse, width)
        if quota:
            waiting = waiting or {int(unit) // quota for unit in units.tolist()}
            open_ = torch.tensor([int(unit) // quota in waiting for unit in units.tolist()], device=scores.device)
            worst = scores.masked_fill(~open_, torch.inf).argmin()[None]
            waiting.discard(int(units[worst]) // quota)
        else:
            worst = _next(inverse, scores) if width == 1 else scores.argmin()[None]
        order.append(units[worst])
        losses.append(scores[worst])
        stays = torch.ones(len(units), dtype=torch.bool, device=scores.device)
        stays[worst] = False
        left, inverse = down_date(left, inverse, stays.repeat_interleave(width))
        units = units[stays]
    return torch.cat(order), torch.cat(losses)


def _next(inverse: Tensor, scores: Tensor) -> Tensor:
    """The cheapest columns, up to the first that depends on a cheaper one: a block, or fewer.

    With c = H^-1 and r^2 = c_ij^2 / (c_ii c_jj), removing column i changes the score of column j, which is no cheaper,
    by a factor of (1 + r) / (1 - r) at most.
    """
    cheapest = scores.argsort(stable=True)[: max(_BLOCK, len(scores) // _BLOCKS)]
    among = inverse[cheapest][:, cheapest]
    diagonal = among.diagonal()
    coupling = among.square() / (diagonal[:, None] * diagonal)
    return cheapest[(coupling.tril(-1).amax(1) < _COUPLED).int().cumprod(0).bool()]  # the cheapest one always


def _inverse(hessian: Tensor, damp: float) -> Tensor:
    lower = damped_factor(hessian, damp)
    if lower is None:
        raise NumericalError(f"the Hessian of a layer with {len(hessian)} inputs is not positive definite")
    inverse: Tensor = torch.cholesky_inverse(lower)
    return inverse


def _scores(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """What removing each unit costs: tr(W_u ([H^-1]_uu)^-1 W_u^T), [U]."""
    if width == 1:
        return weight.square().sum(0) / inverse.diagonal()
    units = weight.shape[1] // width
    blocks = torch.stack([inverse[u * width : (u + 1) * width, u * width : (u + 1) * width] for u in range(units)])
    parts = weight.t().reshape(units, width, -1)
    costs: Tensor = parts * torch.linalg.solve(blocks, parts)
    return costs.sum((1, 2))


def down_date(weight: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """W and H^-1 without some columns, the others solved anew.

    Args:
        weight: [O, I], the least-squares solution for the columns that there are.
        inverse: H^-1, [I, I].
        stays: bool [I].
    """
    gone = ~stays
    if not bool(stays.any()):
        return weight[:, stays], inverse[stays][:, stays]
    across = inverse[gone][:, stays]
    solved = torch.linalg.solve(inverse[gone][:, gone], across)
    kept = weight[:, stays].addmm_(weight[:, gone], solved, alpha=-1)
    return kept, inverse[stays][:, stays].addmm_(across.t(), solved, alpha=-1)


def by_unit(scores: Tensor, width: int) -> Tensor:
    """Root of the sum of squares over each unit's columns: [I] to [U]."""
    return scores.view(-1, width).square().sum(1).sqrt()
