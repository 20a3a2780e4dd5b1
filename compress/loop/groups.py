"""Which linears of a layer share an input, and which write to the residual stream: seen as it runs, not looked up."""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Group = tuple[str, ...]


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
    """What `interleaved` has to know of a layer.

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
    residual: list[Tensor] = []  # as the norms read it last, which `interleaved` keeps
    for norm in norms(layer):
        norm.register_forward_pre_hook(lambda _, inputs: residual.__setitem__(slice(None), inputs[:1]))
    with _Alive() as alive:
        run()
    return Groups([tuple(names) for _, names in seen], max(held) / tokens)


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
