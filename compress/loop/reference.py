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

    A layer is called by its number in the compressed model. Behind it the original goes on through the layers that are
    gone there, up to the next one that is left.

    Args:
        stream: of the original model.
        activations: of the calibration, in front of the first layer.
        probe: of a few tokens.
        layers: which of the original's layers each of the compressed model's was; None: all, in order.

    Attributes:
        activations: behind the last layer that was gone through.
    """

    def __init__(
        self, stream: LayerStream, activations: Activations, probe: Activations, layers: Sequence[int] | None = None
    ) -> None:
        self.stream, self.activations, self._probe = stream, activations, probe
        self._layers = range(stream.depth) if layers is None else layers
        self._ends: Activations | None = None
        for own in range(self._layers[0]):  # gone in front of the first that is left
            self._run(own, stream.load_layer(own))

    def gone(self, index: int) -> range:
        """The original's layers behind one that are gone."""
        following = self._layers[index + 1] if index + 1 < len(self._layers) else self.stream.depth
        return range(self._layers[index] + 1, following)

    def prefix(self, index: int) -> str:
        """Where the original's tensors of a layer lie."""
        return self.stream.prefix(self._layers[index])

    def load(self, index: int) -> dict[str, Tensor]:
        """The original's tensors of a layer, by full name."""
        return self.stream.load_layer(self._layers[index])

    def run(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Go through a layer, whose tensors in the original these are."""
        self._run(self._layers[index], tensors)
        self._pass(index)

    def _run(self, own: int, tensors: Mapping[str, Tensor]) -> None:
        self.stream.fill_layer(own, dict(tensors))
        self.stream.run_layer(own, self.activations)
        self._leave(own)

    def _pass(self, index: int) -> None:
        """Go through what is gone behind a layer."""
        for own in self.gone(index):
            self._run(own, self.stream.load_layer(own))

    def _ahead(self, index: int, tensors: Mapping[str, Tensor]) -> Activations:
        """The states behind a layer and those that are gone behind it; the model stays where it is."""
        activations, own = self.activations.copy(), self._layers[index]
        for each in (own, *self.gone(index)):
            self.stream.fill_layer(each, dict(tensors) if each == own else self.stream.load_layer(each))
            self.stream.run_layer(each, activations)
            self.stream.empty_layer(each)
        return activations

    def end(self, number: int, bias: Tensor | None) -> Tensor | None:
        """What the weights of a layer's last linear and the states before it should add up to; inside `beside`.

        Args:
            number: of the batch.
            bias: of the linear, as wide as the states.

        Returns:
            [B, S, D], where layers behind it are gone; else None: what the original's put out is wanted then.
        """
        if self._ends is None:
            return None
        states = self._ends.get(number)
        return states if bias is None else states - bias.to(states)

    def beside(
        self, stream: LayerStream, index: int, activations: Activations, tensors: Mapping[str, Tensor]
    ) -> Iterator[tuple[Group, Iterator[Pair], set[str]]]:
        """Go through a layer in step with the compressed model.

        Args:
            stream: the compressed model.
            index: the layer.
            activations: in front of the compressed model's layer.
            tensors: of the original's.

        Yields:
            A group, its inputs in both models batch by batch, and those of its linears that write to the residual
            stream.
        """
        own = self._layers[index]
        self._ends = self._ahead(index, tensors) if self.gone(index) else None
        layer = self.stream.fill_layer(own, dict(tensors))
        probe = self._probe.copy()
        writers = carriers(layer, lambda: self._through(own, probe))
        steps = zip(stream.steps(index, activations), self.stream.steps(own, self.activations), strict=True)
        for (group, arrivals), (_, originals) in steps:
            writing = writers & set(group)
            yield group, map(_pair, arrivals, originals), writing
        self._ends = None
        self._leave(own)
        self._pass(index)

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
