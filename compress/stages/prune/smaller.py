"""The smaller model as the layer loop reads it: its config, and what of the parent's outer tensors stays."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.model.checkpoint import Checkpoint
from compress.model.shapes import Modules, find_modules, is_tied
from compress.prune.axes import Anatomy, Dims, per_layer, smaller_config
from compress.prune.surgery import Kept, cut

_SCALED_EMBEDDINGS = ("gemma", "gemma2", "gemma3_text")  # multiplied by the root of hidden_size as they are read


@dataclass
class Smaller:
    """A `Source` for a stream of the smaller model; layers are filled by the stage.

    Args:
        parent: the model.
        body: its anatomy.
        dims: sizes afterwards.
        layers: the parent's layers that stay.
        hidden: residual channels that stay; None is all.
        ratio: what they have of the root mean square that the last norm reads.
        folder: where its config.json is put.

    Attributes:
        changed: tensors that are used instead of the parent's, by name.
        offset: what is added to a norm's weight before it multiplies.
    """

    parent: Checkpoint
    body: Anatomy
    dims: Dims
    layers: Sequence[int]
    hidden: Tensor | None
    ratio: float
    folder: Path
    changed: dict[str, Tensor] = field(default_factory=dict)
    offset: float = 0.0

    @cached_property
    def modules(self) -> Modules:
        """Where the parent's parts are."""
        return find_modules(self.parent)

    @cached_property
    def tensors(self) -> Mapping[str, Any]:
        """Names of its tensors, as the parent has them."""
        inside, names = self.modules.layers + ".", {}
        number = {old: new for new, old in enumerate(self.layers)}
        tied = f"{self.modules.head}.weight" if is_tied(self.parent, self.modules) else ""
        for name in self.parent.tensors:
            if not name.startswith(inside):
                if name != tied:
                    names[name] = name
                continue
            index, _, local = name.removeprefix(inside).partition(".")
            if int(index) in number:
                names[f"{inside}{number[int(index)]}.{local}"] = name
        return names

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json; what transformers derives for each layer is written out where layers are gone."""
        config = smaller_config(self.body, self.dims, self.layers)
        if self.dims.layers < self.body.dims.layers:
            from transformers import AutoConfig

            derived = AutoConfig.from_pretrained(self.parent.folder).to_dict()
            for key in per_layer(derived, self.body.dims.layers):
                config[key] = [derived[key][index] for index in self.layers]
        return config

    def write_config(self) -> None:
        """Put its config.json where a stream looks for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config), encoding="utf-8")

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors outside the layers, cut."""
        wanted = list(names)
        loaded = self.parent.load([self.tensors[name] for name in wanted], device)
        return {name: self._cut(name, loaded[self.tensors[name]]) for name in wanted}

    def _cut(self, name: str, tensor: Tensor) -> Tensor:
        if name in self.changed:
            return self.changed[name].to(tensor.device)
        if self.hidden is None or name not in self.body.outer:
            return tensor
        part = cut(tensor, self.body.outer[name][0], Kept(self.body.dims, hidden=self.hidden))
        scale = 1.0
        if self.parent.config.get("model_type") in _SCALED_EMBEDDINGS:
            scale = math.sqrt(self.body.dims.hidden / self.dims.hidden)
        if name == f"{self.modules.embeddings}.weight":
            return (part * scale).to(part.dtype)
        if part.dim() == 1:  # the last norm
            tied = is_tied(self.parent, self.modules)
            return scaled_norm(part, self.ratio / (scale if tied else 1.0), self.offset)
        return part


def scaled_norm(weight: Tensor, ratio: float, offset: float) -> Tensor:
    """The weight of a norm that puts out `ratio` times as much."""
    return ((weight.double() + offset) * ratio - offset).to(weight.dtype)


def layers_without(depth: int, first: int, size: int) -> list[int]:
    """The layers that stay when a block is removed."""
    return [index for index in range(depth) if not first <= index < first + size]
