"""What takes the decoder layers' places when the layer loop wants only what lies around them."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, nn

from compress.errors import ModelError


class Reached(Exception):
    """Raised by a stand-in to end a forward pass early."""


@contextmanager
def by_layers(model: Any) -> Iterator[None]:
    """Turn what a model's own code raises because it is not run as a whole into one line.

    Raises:
        ModelError: naming the model type.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, LookupError, NotImplementedError, AssertionError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        kind = model.config.model_type
        raise ModelError(f"model_type {kind!r} is not supported: it can't be run layer by layer ({reason})") from error


class LayerCatcher(nn.Module):
    """Takes a decoder layer's place: records its arguments, by name, and hands on `answer`, or its input.

    Args:
        layer: the layer, whose other attributes a model may ask for (`attention_type`).
        in_tuple: how many things the layer puts out in a tuple, of which the first counts; 0 is no tuple.
        last: raise `Reached` here.
    """

    def __init__(self, layer: nn.Module, in_tuple: int, last: bool) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a child of this module
        self.in_tuple, self.last = in_tuple, last
        self.seen: tuple[Tensor, dict[str, Any]] | None = None
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *positional: Any, **named: Any) -> Tensor | tuple[Tensor | None, ...]:
        """The layer's part in the model's forward pass."""
        names = _parameters(type(self.__dict__["layer"]).forward)
        arguments = dict(zip(names, positional, strict=False)) | named
        hidden = arguments.pop(names[0])
        if self.answer is None:
            self.seen = (hidden, arguments)
            if self.last:
                raise Reached
        out = hidden if self.answer is None else self.answer
        return (out, *[None] * (self.in_tuple - 1)) if self.in_tuple else out


@cache
def _parameters(forward: Callable[..., Any]) -> list[str]:
    """Names of what a method takes."""
    return list(inspect.signature(forward).parameters)[1:]
