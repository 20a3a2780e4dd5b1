"""A layer gone through with something that looks at the inputs of its linears."""

from collections.abc import Callable, Iterable

from torch import Tensor

from compress.loop.activations import Activations
from compress.loop.groups import Group
from compress.loop.interleave import Passes
from compress.loop.stream import LayerStream


def visit_layer(
    stream: LayerStream, index: int, activations: Activations, visit: Callable[[Group, Iterable[Tensor]], object] | None
) -> None:
    """Run a layer; `visit` gets each group of linears and the batches' inputs [B, S, I], to be gone through again."""
    for group, arrivals in stream.steps(index, activations):
        if visit is not None:
            visit(group, Passes(lambda arrivals=arrivals: (arrival.input for arrival in arrivals)))
