"""What a dry run says of memory and time, and where it takes the run to happen. Never imports torch."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from compress.exports.plan import Foreseen, disk_bytes, export_bytes
from compress.forecast_records import Forecast
from compress.model.side_files import copy_side_files
from compress.recipe.export import stem_of
from compress.recipe.types import StageSpec
from compress.records import Record, read_record
from compress.report.figures import duration
from compress.stages.contract import Place, Plan, Result
from compress.stages.quantize.plan import plan_matrices
from compress.system import distributed
from compress.system.files import write_text
from compress.system.machine import fast_bf16
from compress.system.memory import available, free_here, resident
from compress.system.units import size

if TYPE_CHECKING:
    from compress.loop.context import Context
    from compress.runs.plan import RunPlan


def place_of(device: str, limit: int | None) -> Place:
    """Where a run would happen, as far as that can be told without torch.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        limit: bytes of its memory that may be used; None: what is free, which is not known of a GPU.
    """
    if device.startswith("cuda") or (device == "auto" and shutil.which("nvidia-smi") is not None):
        return Place("cuda", 2, limit)
    free = free_here()
    return Place("cpu", 2 if fast_bf16() else 4, free if limit is None else min(free, limit))


def place_now(context: "Context") -> Place:
    """Where a stage begins now, and with how much memory."""
    free = available(context.device, context.max_memory)
    width, held, world = context.dtype.itemsize, resident()[0], distributed.world()
    if context.device.type == "cuda":
        return Place("cuda", width, free, held, world)
    return Place("cpu", width, free // distributed.here(), held, world)


def with_forecast(result: Result, foreseen: Forecast | None) -> Result:
    """A stage's result whose record says what it was expected to take; the time, it has foreseen itself."""
    own = result.record.forecast
    if foreseen is None:
        return result
    forecast = foreseen.model_copy(update={"seconds": None if own is None else own.seconds})
    return replace(result, record=result.record.model_copy(update={"forecast": forecast}))


def memory_words(forecast: Forecast) -> str:
    """How much memory a stage takes; empty where that is not known."""
    host, gpu = forecast.memory_bytes, forecast.gpu_memory_bytes
    found = [f"about {size(host)}"] if host is not None else []
    return ", ".join([*found, f"about {size(gpu)} on the GPU"] if gpu is not None else found)


def time_words(spec: StageSpec, plan: Plan, place: Place, work: Path) -> str:
    """How long a stage takes, from an earlier run of the same; empty where the plan itself says something.

    Args:
        spec: as it runs.
        plan: of the stage.
        place: where it will run.
        work: the work folder.
    """
    before = [record for file in (work / "stages").glob("*/dscompress.json") if (record := read_record(file.parent))]
    same = [record for record in before if _is_same(record, spec, plan, place)]
    if same:
        newest = max(same, key=lambda record: record.created)
        return f"{duration(newest.stage.seconds)} when it ran before; not run again where model and text are the same"
    return "" if "time" in dict(plan.lines) else "not known before its first layer is done"


def _is_same(record: Record, spec: StageSpec, plan: Plan, place: Place) -> bool:
    """Whether a record is of this stage, on a model of the same sizes."""
    stage, foreseen = record.stage, record.stage.forecast
    if foreseen is None or plan.forecast is None or place.device not in (stage.device or ""):
        return False
    same = stage.spec == spec.model_dump(mode="json")
    with suppress(ValueError):  # of another kind, or written by a version with other keys
        same = same or type(spec).model_validate(stage.spec).identity() == spec.identity()
    return same and foreseen.output_bytes == plan.forecast.output_bytes


def foreseen_result(planned: "RunPlan") -> Foreseen:
    """What is known of a run's result, whose model is here, before there is one."""
    *before, last = planned.parts
    shapes, spec = last.plan.shapes, planned.specs[-1]
    assert shapes is not None and planned.base is not None, "it has been planned on the model"
    if spec.kind != "quantize":
        return Foreseen(shapes)
    parent, stage = before[-1].plan.shapes if before else planned.base, cast(Any, spec)
    assert parent is not None
    return Foreseen(shapes, stage.layout, plan_matrices(stage, parent, f"stages.{last.number}"))


def file_rows(planned: "RunPlan", files: Mapping[str, int]) -> list[tuple[str, str]]:
    """What a dry run says of the files that hold the weights, as (label, text)."""
    forecasts = [part.plan.forecast for part in planned.parts[:-1]]
    about = " or so" if any(each is None or each.about for each in forecasts) else ""
    return [("file", f"{name}: {taken:,} bytes{about} ({size(taken)})") for name, taken in files.items()]


def export_rows(planned: "RunPlan") -> list[tuple[str, str]]:
    """What a dry run says of a recipe's exports, as (label, text)."""
    recipe = planned.recipe
    result = foreseen_result(planned) if recipe.export else None
    rows = []
    for spec in recipe.export:
        assert result is not None
        name = spec.file_name(stem_of(recipe.name))
        written, disk = size(export_bytes(spec, result)), size(disk_bytes(spec, result))
        rows.append(("export", f"{name} for {spec.target.program}: about {written}, and {disk} in the work folder"))
    return rows


def origin_of(planned: "RunPlan") -> Path:
    """The dense checkpoint that the result is made of: the recipe's model, or the last student in its place."""
    assert planned.base is not None, "the model has been found"
    named = [spec.starts_from for spec in planned.specs if spec.starts_from is not None]
    return planned.models[named[-1]] if named else planned.base.folder


@contextmanager
def sketch_of(base: Path, config: dict[str, object]) -> Iterator[Path]:
    """A folder with the config.json that a result will have, dense, and its tokenizer."""
    with TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = Path(scratch)
        copy_side_files(base, folder)
        dense = {key: value for key, value in config.items() if key != "quantization_config"}
        write_text(folder / "config.json", json.dumps(dense))
        yield folder
