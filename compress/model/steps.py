"""Stops inside a layer: every batch is brought to each group of linears with a common input before any goes on.

So the caller sees all inputs of a group, replaces its weights, and the batches go on with the new ones: each linear is
calibrated on what the compressed linears before it put out, inside its own layer too.

Two ways with the same numbers. `in_step` keeps every batch where it stopped, in a fibre (a greenlet): the layer runs
once, and the inputs of a group are all in memory. `again` keeps nothing: in front of each group every batch is run from
the layer's beginning, about twice the forward passes in all. Left out: the usual two-pass loop (observe, transform, run
again), which costs as much as `again` for coarser statistics.

Until a group's weights are replaced, the caller may go through its inputs as often as it likes: `in_step` gives the
kept ones, `again` runs the batches each time, so that what needs two passes need not keep them either.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar
from weakref import ReferenceType, ref

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.model.stand_in import Reached

Group = tuple[str, ...]
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


class _Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still there."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for address, storage in _storages(out).items():
            if address not in given:  # else it is a view
                self._made[address] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self) -> int:
        return sum(size for reference, size in self._made.values() if not reference.expired())


def _storages(values: Any) -> dict[int, torch.UntypedStorage]:
    found = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {storage._cdata: storage for storage in found}


class Groups(NamedTuple):
    """Linears that share an input, in call order; and the most bytes per token that a batch holds where it stops."""

    names: list[Group]
    held: float


def linear_groups(layer: nn.Module, run: Callable[[], Any], tokens: int) -> Groups:
    """What `in_step` has to know of a layer.

    Args:
        layer: on the meta device.
        run: runs it once; inputs are compared by identity. What it makes and still holds in front of a group counts as
            held.
        tokens: that go through it then.
    """
    seen: list[tuple[ReferenceType[Tensor], list[str]]] = []
    held = [0]

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            for tensor, names in seen:
                if tensor() is inputs[0]:
                    names.append(name)
                    return
            seen.append((ref(inputs[0]), [name]))
            held.append(alive.bytes())

        return hook

    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(note(name), prepend=True)  # before what may change the input
    with _Alive() as alive, _stops(layer, [], lambda *_: None, _Where()):  # it keeps what norms read
        run()
    return Groups([tuple(names) for _, names in seen], max(held) / tokens)


def in_step(layer: nn.Module, groups: Sequence[Group], work: Work, batches: int) -> Iterator[Step]:
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


def again(layer: nn.Module, groups: Sequence[Group], work: Work, batches: int) -> Iterator[Step]:
    """As `in_step`, but nothing is kept: each batch is run anew for each group, and once more to the end."""
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


def norms(layer: nn.Module) -> list[nn.Module]:
    """The layer's own norms, which read the residual stream (those inside its attention do not)."""
    children = [(child, list(child.parameters())) for child in layer.children()]
    return [child for child, parameters in children if parameters and all(p.dim() == 1 for p in parameters)]


def carriers(layer: nn.Module, run: Callable[[], Tensor]) -> set[str]:
    """Linears (local names) whose output is added to the residual stream as it is, as `run`, once through it, shows."""
    states: list[Tensor] = []
    sums: dict[str, tuple[int, Tensor]] = {}  # how many states had been read, and what the next may be

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        states.append(inputs[0])

    def put_out(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> None:
            if states and out.shape == states[-1].shape:
                sums[name] = len(states), states[-1] + out

        return hook

    handles = [norm.register_forward_pre_hook(read) for norm in norms(layer)]
    linears = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    handles += [module.register_forward_hook(put_out(name)) for name, module in linears]
    try:
        states.append(run())
    finally:
        for handle in handles:
            handle.remove()
    return {name for name, (read, total) in sums.items() if any(torch.equal(total, each) for each in states[read:])}
