"""What takes the decoder layers' places when the layer loop wants only what lies around them."""

from typing import Any

from torch import Tensor, nn


class Reached(Exception):
    """Raised by a stand-in to end a forward pass early."""


class StandIn(nn.Module):
    """Takes a decoder layer's place: records its keyword arguments and hands on `answer`, or its input.

    Args:
        layer: the layer, whose other attributes a model may ask for (`attention_type`).
        in_tuple: whether the layer puts out a tuple.
        last: raise `Reached` here.
    """

    def __init__(self, layer: nn.Module, in_tuple: bool, last: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child of this module
        self.in_tuple, self.last = in_tuple, last
        self.seen: tuple[Tensor, dict[str, Any]] | None = None
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor | tuple[Tensor]:
        """The layer's part in the model's forward pass."""
        if self.answer is None:
            self.seen = (hidden, arguments)
            if self.last:
                raise Reached
        out = hidden if self.answer is None else self.answer
        return (out,) if self.in_tuple else out
