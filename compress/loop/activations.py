"""Hidden states between two layers, on the device where they fit and in host memory where they don't.

Dimensions: B batch, S sequence, D hidden.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Activations:
    """Hidden states between two layers, and what each layer is called with.

    Args:
        hidden: one tensor [B, S, D] per batch, replaced as layers run; on `device`, or in pinned host memory.
        arguments: for each batch shape (B, S), the keyword arguments of every layer.
        device: where layers run.
    """

    hidden: list[Tensor]
    arguments: dict[tuple[int, int], list[dict[str, Any]]]
    device: torch.device

    @property
    def tokens(self) -> int:
        """How many there are in all batches."""
        return sum(batch.shape[0] * batch.shape[1] for batch in self.hidden)

    def of_layer(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """Keyword arguments with which layer `index` is called for this batch."""
        return self.arguments[(hidden.shape[0], hidden.shape[1])][index]

    def get(self, number: int) -> Tensor:
        """A batch [B, S, D] on the device."""
        return self.hidden[number].to(self.device, non_blocking=True)

    def put(self, number: int, hidden: Tensor) -> None:
        """Replace a batch."""
        if self.hidden[number].device == self.device:
            self.hidden[number] = hidden
        else:
            self.hidden[number].copy_(hidden, non_blocking=True)

    def copy(self) -> "Activations":
        """The same activations, to be run through a layer without losing these."""
        here = self.hidden and self.hidden[0].device == self.device
        hidden = list(self.hidden) if here else [batch.clone().pin_memory() for batch in self.hidden]
        return Activations(hidden, self.arguments, self.device)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches on the device, one at a time."""
        return map(self.get, range(len(self.hidden)))
