"""Stops inside a layer: every batch is brought to each group of linears with a common input before any goes on.

So the caller sees all inputs of a group, replaces its weights, and the batches go on with the new ones: each linear is
calibrated on what the compressed linears before it put out, inside its own layer too.

Two ways with the same numbers. `interleaved` keeps every batch where it stopped, in a fibre (a greenlet): the layer
runs once, and the inputs of a group are all in memory. `recompute` keeps nothing: in front of each group every batch is
run from the layer's beginning, about twice the forward passes in all. Left out: the usual two-pass loop (observe,
transform, run again), which costs as much as `recompute` for coarser statistics.

Until a group's weights are replaced, the caller may go through its inputs as often as it likes: `interleaved` gives the
kept ones, `recompute` runs the batches each time, so that what needs two passes need not keep them either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compress.loop.catcher import Reached
from compress.loop.groups import Group, norms

Work = Callable[[int], None]
T = TypeVar("T")


class Arrival(NamedTuple):
    """A batch in front of a group: its input [B, S, I], and the residual stream [B, S, D] that that comes from."""

    input: Tensor
    residual: Tensor | None


class Passes(Generic[T]):
    """An iterable that can be gone through several times: each pass is made anew."""

    def __init__(self, make: Callable[[], Iterable[T]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[T]:
        return iter(self._make())


Step = tuple[Group, Passes[Arrival]]


class PathsDiffer(Exception):
    """Batches take different paths through a layer."""


def interleaved(layer: nn.Module, groups: Sequence[Group], work: Work, batches: int) -> Iterator[Step]:
    """Run all batches through a layer together.

    Args:
        layer: its weights are read when a batch gets to them.
        groups: from `linear_groups`.
        work: runs one batch, by its number, from the layer's beginning to its end.
        batches: how many there are.

    Yields:
        Each group, in order, with the batches' arrivals in front of it.

    Raises:
        PathsDiffer: batches that don't all pass all groups in order.
    """
    main, where = getcurrent(), _Where()
    fibres = [greenlet(work, main) for _ in range(batches)]

    def arrivals(group: Group, kept: list[Arrival]) -> Iterator[Arrival]:
        yield from kept
        for number, fibre in enumerate(fibres[len(kept) :], len(kept)):
            where.batch = number
            arrived = fibre.switch() if fibre else fibre.switch(number)
            if fibre.dead or arrived[0] != group:
                raise PathsDiffer
            kept.append(Arrival(arrived[1], where.residuals.get(number)))
            yield kept[-1]

    with _stops(layer, groups, lambda group, x: main.switch(group, x), where):
        for group in groups:
            kept: list[Arrival] = []
            inputs = Passes(partial(arrivals, group, kept))
            yield group, inputs
            for _ in inputs:
                pass
            kept.clear()
        for number, fibre in enumerate(fibres):
            where.batch = number
            fibre.switch()
            if not fibre.dead:
                raise PathsDiffer


def recompute(layer: nn.Module, groups: Sequence[Group], work: Work, batches: int) -> Iterator[Step]:
    """As `interleaved`, but nothing is kept: each batch is run anew for each group, and once more to the end."""
    caught: list[Tensor] = []

    def catch(_: Group, x: Tensor) -> None:
        caught.append(x)
        raise Reached

    def arrivals(group: Group) -> Iterator[Arrival]:
        where = _Where()
        for where.batch in range(batches):
            with _stops(layer, [group], catch, where), suppress(Reached):
                work(where.batch)
            if not caught:
                raise PathsDiffer
            yield Arrival(caught.pop(), where.residuals.pop(where.batch, None))

    for group in groups:
        yield group, Passes(partial(arrivals, group))
    for number in range(batches):
        work(number)


class _Where:
    """The batch that runs, and the residual stream as each batch last read it."""

    def __init__(self) -> None:
        self.batch = 0
        self.residuals: dict[int, Tensor] = {}


@contextmanager
def _stops(
    layer: nn.Module, groups: Sequence[Group], stop: Callable[[Group, Tensor], object], where: _Where
) -> Iterator[None]:
    """Inside, `stop` is called with the input of each group's first linear, and norms note what they read."""

    def hook(group: Group) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def stopping(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            stop(group, inputs[0])

        return stopping

    def note(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        where.residuals[where.batch] = inputs[0]

    handles = [layer.get_submodule(group[0]).register_forward_pre_hook(hook(group), prepend=True) for group in groups]
    handles += [norm.register_forward_pre_hook(note) for norm in norms(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
