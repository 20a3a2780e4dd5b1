"""What `kind: scale` does: the removed channels run as zeros, and are not written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import records
from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.stages.contract import Result
from compress.stages.layerwise import LayerTransform, Layerwise
from scale_stage.plan import ScaleStage

CODE_VERSION = 1


def run(spec: ScaleStage, parent: Checkpoint, output: Path, context: Context) -> Result:
    stream = LayerStream(parent, context.device, context.dtype)
    return Layerwise(spec, parent, stream, output, context).run(_Scale(spec, parent, stream))


class _Scale(LayerTransform):
    def __init__(self, spec: ScaleStage, parent: Checkpoint, stream: LayerStream) -> None:
        self.spec, self.parent, self.stream = spec, parent, stream
        self.there = parent.config["intermediate_size"]
        self.width = spec.width or self.there

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], list[records.Module]]:
        written = {name: self._changed(name, tensor) for name, tensor in tensors.items()}
        self.stream.fill_layer(index, self.restore(index, written))
        assert calibration is not None
        self.stream.run_layer(index, calibration)
        return written, []

    def _changed(self, name: str, tensor: Tensor) -> Tensor:
        if name.endswith("down_proj.weight"):
            return tensor[:, : self.width] * self.spec.factor
        return tensor[: self.width] if ".mlp." in name else tensor

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._padded(name, tensor) for name, tensor in tensors.items()}

    def _padded(self, name: str, tensor: Tensor) -> Tensor:
        if ".mlp." not in name:
            return tensor
        missing = self.there - self.width
        return torch.nn.functional.pad(tensor, (0, missing) if "down_proj" in name else (0, 0, 0, missing))

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], list[records.Module]]:
        return tensors, []

    def config(self) -> dict[str, Any]:
        return self.parent.config | {"intermediate_size": self.width}
