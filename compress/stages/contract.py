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
from typing import TYPE_CHECKING

from compress.model.shapes import Shapes
from compress.recipe.text import CalibrationSpec
from compress.recipe.types import StageSpec
from compress.records import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Setting:
    """What surrounds a stage in its recipe.

    Args:
        where: the stage in the recipe, such as "stages.0", which its problems start with.
        text: what it is calibrated on.
        following: the stages behind it.
        base: shapes of the recipe's model, before any stage; None where it is not here.
        models: folders of other models that stages name, by what the recipe calls them; those that are here.
    """

    where: str
    text: CalibrationSpec
    following: Sequence[StageSpec] = ()
    base: Shapes | None = None
    models: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What a stage will do to a model.

    Args:
        shapes: of the model after the stage, which the next one is planned on; None where the model is not here.
        problems: why it can't be done, a line each, all at once; each starts with the key of the recipe.
        warnings: what is no mistake but should be heard before the run, a line each.
        lines: what a dry run prints, as (label, text).
        disk_bytes: free space wanted while it runs.
        splits: whether several processes can share the work.
        generates: whether transformers alone opens the result, so that it can be asked to continue prompts.
        spec: the stage with what follows from the model filled in, which is what runs; None: as it was.
        builds: whether the shapes are new, so that it has to be tried whether transformers builds such a model.
    """

    shapes: Shapes | None
    problems: Sequence[str] = ()
    warnings: Sequence[str] = ()
    lines: Sequence[tuple[str, str]] = ()
    disk_bytes: int = 0
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
