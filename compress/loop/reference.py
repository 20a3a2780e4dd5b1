"""The model as it was, run beside the compressed one on the same tokens: it shows the error that has propagated."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from compress.loop.activations import Activations
from compress.loop.groups import Group, carriers
from compress.loop.interleave import Arrival
from compress.loop.stream import LayerStream


class Beside(NamedTuple):
    """What the original model has in front of a group: X0 [B, S, I]; and what both read of the residual stream last."""

    original: Tensor
    residual: tuple[Tensor, Tensor] | None


Pair = tuple[Tensor, Beside | None]


class ReferenceModel:
    """The original layers, one at a time, and their activations.

    Args:
        stream: of the original model, filled from what another stream has read.
        activations: of the calibration, in front of the first layer.
        probe: of a few tokens.

    Attributes:
        activations: behind the last layer that was gone through.
    """

    def __init__(self, stream: LayerStream, activations: Activations, probe: Activations) -> None:
        self.stream, self.activations, self._probe = stream, activations, probe

    def run(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Go through a layer."""
        self.stream.fill_layer(index, dict(tensors))
        self.stream.run_layer(index, self.activations)
        self._leave(index)

    def ahead(self, indices: Sequence[int]) -> Activations:
        """What the original model puts out behind these layers, which follow; it stays where it is."""
        activations = self.activations.copy()
        for index in indices:
            self.stream.fill_layer(index, self.stream.load_layer(index))
            self.stream.run_layer(index, activations)
            self.stream.empty_layer(index)
        return activations

    def beside(
        self,
        stream: LayerStream,
        index: int,
        activations: Activations,
        tensors: Mapping[str, Tensor],
        original: int | None = None,
    ) -> Iterator[tuple[Group, Iterator[Pair], set[str]]]:
        """Go through a layer in step with the compressed model.

        Args:
            stream: the compressed model.
            index: of its layer.
            activations: in front of that layer.
            tensors: of the original's layer.
            original: that layer's index, where layers have been removed; None is the same.

        Yields:
            A group, its inputs in both models batch by batch, and those of its linears that write to the residual
            stream.
        """
        own = index if original is None else original
        layer = self.stream.fill_layer(own, dict(tensors))
        probe = self._probe.copy()
        writers = carriers(layer, lambda: self._through(own, probe))
        steps = zip(stream.steps(index, activations), self.stream.steps(own, self.activations), strict=True)
        for (group, arrivals), (_, originals) in steps:
            writing = writers & set(group)
            yield group, map(_pair, arrivals, originals), writing
        self._leave(own)

    def _through(self, index: int, probe: Activations) -> Tensor:
        self.stream.run_layer(index, probe)
        return probe.get(0)

    def _leave(self, index: int) -> None:
        self.stream.run_layer(index, self._probe)
        self.stream.empty_layer(index)


def _pair(arrival: Arrival, original: Arrival) -> tuple[Tensor, Beside]:
    residual = None
    if arrival.residual is not None and original.residual is not None:
        residual = arrival.residual, original.residual
    return arrival.input, Beside(original.input, residual)
