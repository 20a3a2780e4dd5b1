"""The tensors of the smaller model: which entries of each dimension stay.

Shapes: U units that are kept along an axis.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.prune.axes import Dims, Parts


@dataclass(frozen=True)
class Kept:
    """What stays of a layer, as sorted indices; None is all.

    Args:
        dims: the original's sizes.
        ffn: channels.
        heads: query heads.
        groups: key-value heads.
        hidden: residual channels.
    """

    dims: Dims
    ffn: Tensor | None = None
    heads: Tensor | None = None
    groups: Tensor | None = None
    hidden: Tensor | None = None

    def index(self, parts: Parts) -> Tensor | None:
        """Entries of a dimension that stay; None is all."""
        found = [self._of(part) for part in parts]
        if all(each is None for each in found):
            return None
        starts, at = [], 0
        for part in parts:
            starts.append(at)
            at += self.dims.length((part,))
        wholes = [torch.arange(self.dims.length((part,))) for part in parts]
        return torch.cat([s + (w if i is None else i) for s, w, i in zip(starts, wholes, found, strict=True)])

    def _of(self, part: str) -> Tensor | None:
        if part in ("q", "kv"):
            heads = self.heads if part == "q" else self.groups
            width = self.dims.head_dim
            return None if heads is None else (heads[:, None] * width + torch.arange(width)).flatten()
        return self.ffn if part == "ffn" else self.hidden


def cut(tensor: Tensor, parts: Sequence[Parts], kept: Kept) -> Tensor:
    """What stays of a tensor."""
    for dimension, part in enumerate(parts):
        index = kept.index(part) if part else None
        if index is not None:
            tensor = tensor.index_select(dimension, index.to(tensor.device))
    return tensor


def cut_all(
    tensors: Mapping[str, Tensor], known: Mapping[str, tuple[Sequence[Parts], tuple[int, ...]]], kept: Kept
) -> dict[str, Tensor]:
    """What stays of tensors by name; those without known parts stay whole."""
    return {name: cut(tensor, known[name][0], kept) if name in known else tensor for name, tensor in tensors.items()}
