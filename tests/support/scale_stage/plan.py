"""What `kind: scale` may say, and what it will do."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from compress.forecast_records import Forecast
from compress.model.checkpoint import TensorInfo
from compress.model.shapes import PlannedShapes, Shapes
from compress.recipe.types import Count, StageSpec
from compress.stages.contract import Plan, Setting


class ScaleStage(StageSpec):
    """Multiply the weights of down_proj."""

    kind: Literal["scale"] = Field(description="What the stage does: scale.")
    factor: float = Field(gt=0, description="What down_proj is multiplied by.")
    width: Count | None = Field(default=None, description="Inner channels that are kept.")

    @property
    def calibrates(self) -> bool:
        return True

    @property
    def title(self) -> str:
        return f"scale by {self.factor:g}"


def plan(spec: ScaleStage, shapes: Shapes | None, setting: Setting) -> Plan:
    where = setting.where
    if shapes is None:
        return Plan(None)
    there = shapes.config["intermediate_size"]
    if spec.width is not None and spec.width > there:
        return Plan(shapes, problems=[f"{where}.width: {spec.width} is more than the {there} channels; use fewer"])
    tensors = {name: cut(name, info, spec.width or there) for name, info in shapes.tensors.items()}
    config = shapes.config | {"intermediate_size": spec.width or there}
    size = sum(info.bytes for info in tensors.values())
    after = PlannedShapes(shapes, config, tensors, size)
    return Plan(
        after,
        warnings=[f"{where}: only a toy"],
        lines=[("stage", spec.title)],
        forecast=Forecast(output_bytes=size, disk_bytes=size),
    )


def cut(name: str, info: TensorInfo, width: int) -> TensorInfo:
    if ".mlp." not in name:
        return info
    rows, columns = info.shape
    shape = (rows, width) if "down_proj" in name else (width, columns)
    return replace(info, shape=shape, bytes=info.bytes * shape[0] * shape[1] // (rows * columns))
