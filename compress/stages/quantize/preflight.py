"""Whether a model's modules can be quantized at all, seen before anything is computed: layers run on the meta device.

Model code may hold a matrix in something that is no linear layer, never call a linear, or read its weight beside it.
Loaders put packed tensors in a weight's place, so the last one fails there, long after a run is done.
"""

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ModelError
from compress.loop.activations import Activations
from compress.loop.catcher import by_layers
from compress.loop.stream import LayerStream


def check_modules(stream: LayerStream, names: Collection[str]) -> None:
    """Refuse matrices (full names) inside the layers that no linear layer holds.

    Raises:
        ModelError: naming the model type and the modules.
    """
    kind, inside = stream.model.config.model_type, stream.arch.layers + "."
    modules = {name: stream.model.get_submodule(name) for name in names if name.startswith(inside)}
    others = {name: type(module).__name__ for name, module in modules.items() if not isinstance(module, nn.Linear)}
    if others and len(others) == len(modules):
        raise ModelError(
            f"model_type {kind!r} is not supported: its layers have {_listed(others.values())} modules and no nn.Linear"
        )
    if others:
        raise ModelError(
            f"model_type {kind!r}: {_listed(others)} ({_listed(others.values())}): only nn.Linear modules can be "
            f"quantized; add to ignore: {_globs(others, inside)}"
        )


def check_calls(stream: LayerStream, names: Collection[str], activations: Activations) -> None:
    """Refuse linears (full names) that their layer never calls: no inputs would be seen.

    Raises:
        ModelError: naming the model type and the modules.
    """
    missed = []
    for index in range(stream.depth):
        prefix = stream.prefix(index)
        called = {prefix + name for group in stream.groups(index, activations) for name in group}
        missed += [name for name in names if name.startswith(prefix) and name not in called]
    if missed:
        raise ModelError(
            f"model_type {stream.model.config.model_type!r}: {_listed(missed)} never used as a linear layer in the "
            f"forward pass; add to ignore: {_globs(missed, stream.arch.layers + '.')}"
        )


def check_weights(stream: LayerStream, names: Collection[str], activations: Activations, layout: str) -> None:
    """Refuse linears (full names) whose weight is read by other code than nn.Linear's own.

    Raises:
        ModelError: naming the model type and the modules.
    """
    inside = stream.arch.layers + "."
    seen, all_read, read, classes = set(), True, list[str](), set[str]()
    for index in range(stream.depth):
        prefix = stream.prefix(index)
        local = tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        if (key := (stream.kind(index), local)) not in seen:
            seen.add(key)
            found = _readers(stream, index, activations, local, layout)
            all_read = all_read and len(found) == len(local)
            read += [prefix + name for name in found]
            linears = [stream.layers[index].get_submodule(name) for name in local]
            classes |= {type(each).__name__ for each in linears if type(each).forward is not nn.Linear.forward}
    kind = stream.model.config.model_type
    if classes and layout == "compressed-tensors":  # loaders of gptq put modules of their own in their place
        raise ModelError(
            f"model_type {kind!r} is not supported in format compressed-tensors: its {_listed(classes)} modules read "
            "their weights themselves, and loaders have those packed; use format: gptq, or method: dynamic"
        )
    why = "transformers' code for it reads the weights of"
    if read and all_read:
        raise ModelError(
            f"model_type {kind!r} is not supported in format {layout}: {why} its linear layers itself, "
            "and loaders have those packed; 8-bit stages such as method: dynamic work"
        )
    if read:
        raise ModelError(
            f"model_type {kind!r}: {why} {_listed(read)} itself, and loaders of format {layout} have those packed; "
            f"add to ignore: {_globs(read, inside)}"
        )


def _readers(
    stream: LayerStream, index: int, activations: Activations, names: Collection[str], layout: str
) -> list[str]:
    """Those linears (local names) of a layer without whose weights it can't be made or run."""

    def runs(without: Collection[str]) -> bool:
        layer, run = stream.rehearsal(index, activations)
        for name in without:
            _close(layer.get_submodule(name))
        try:
            with by_layers(stream.model):
                for module in layer.modules() if layout == "compressed-tensors" else ():
                    stream.model._init_weights(module)  # as the loader does, when the weights are packed already
                run()
        except ModelError as error:
            if "has no attribute 'weight'" in str(error):
                return False
            raise
        return True

    return [] if runs(names) else [name for name in names if not runs([name])]


def _close(linear: Any) -> None:
    """Take a linear's weight away; it goes on putting out tensors of the right shape."""
    linear.forward = partial(_put_out, linear.out_features)
    del linear.weight


def _put_out(width: int, x: Tensor) -> Tensor:
    return torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)


def _listed(names: Collection[str]) -> str:
    """The first three, sorted."""
    shown = sorted(set(names))
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _globs(names: Collection[str], inside: str) -> str:
    """Globs that match modules of these names in all layers, as YAML."""
    return str(sorted({"*." + name.removeprefix(inside).partition(".")[2] for name in names})).replace("'", '"')
