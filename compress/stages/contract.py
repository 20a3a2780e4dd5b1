"""What a stage kind owes to the runner: a plan from shapes alone, and a result.

A kind is a package with two modules (compress/stages/__init__.py lists them):

    plan.py   plan(spec, shapes, setting) -> Plan           never imports torch
    parts.py  parts(spec, shapes, setting) -> stages        only of a kind that expands: what one of a recipe stands for
    run.py    CODE_VERSION                                  raised when the same inputs give other tensors
              run(spec, parent, output, context) -> Result  resumable: what `output` holds already is continued
              reads(spec, context) -> list                  only of a kind that reads more than calibration text: what
                                                            identifies that, for the fingerprint
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from compress.forecast_records import Forecast
from compress.model.shapes import Shapes
from compress.recipe.text import CalibrationSpec
from compress.recipe.types import StageSpec
from compress.records import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where stages will run.

    Args:
        device: "cpu" or "cuda".
        width: bytes of a number in the forward passes.
        free: bytes of the device's memory that may be used; None: as many as are wanted.
        held: bytes that the process has resident already; None: what its libraries usually take.
        world: processes that share the work.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    width: int = 2
    free: int | None = None
    held: int | None = None
    world: int = 1


@dataclass(frozen=True)
class Setting:
    """What surrounds a stage in its recipe.

    Args:
        where: the stage in the recipe, such as "stages.0", which its problems start with.
        text: what it is calibrated on.
        following: the stages behind it.
        base: shapes of the recipe's model, before any stage; None where it is not here.
        models: folders of other models that stages name, by what the recipe calls them; those that are here.
        place: where it runs.
    """

    where: str
    text: CalibrationSpec
    following: Sequence[StageSpec] = ()
    base: Shapes | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    place: Place = Place()


@dataclass(frozen=True)
class Plan:
    """What a stage will do to a model.

    Args:
        shapes: of the model after the stage, which the next one is planned on; None where the model is not here.
        problems: why it can't be done, a line each, all at once; each starts with the key of the recipe.
        warnings: what is no mistake but should be heard before the run, a line each.
        lines: what a dry run prints, as (label, text).
        forecast: what it will take; None where the model is not here, or it can't be done.
        splits: whether several processes can share the work.
        generates: whether transformers alone opens the result, so that it can be asked to continue prompts.
        spec: the stage with what follows from the model filled in, which is what runs; None: as it was.
        builds: whether the shapes are new, so that it has to be tried whether transformers builds such a model.
    """

    shapes: Shapes | None
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    lines: Sequence[tuple[str, str]] = ()
    forecast: Forecast | None = None
    splits: bool = False
    generates: bool = True
    spec: StageSpec | None = None
    builds: bool = False


@dataclass(frozen=True)
class Result:
    """What a stage made: its folder `output/checkpoint` is a whole checkpoint.

    Args:
        record: for dscompress.json and the report.
        logits: of the finished model in memory for the context's probe, float32 [S, V], on the CPU; what the written
            checkpoint is compared with.
    """

    record: Stage
    logits: "Tensor"
