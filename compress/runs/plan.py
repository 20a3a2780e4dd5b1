"""A recipe beside its model: one pass over the stages, each planned on the shapes that the one before leaves.

`validate`, `run --dry-run` and `run` all go by what comes out, so everything that would stop a run is said before it
starts. Never imports torch.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from compress.errors import RecipeError
from compress.model.arch import check_code, check_supported, positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import Shapes, check_depth, check_length, parameter_count, remarks
from compress.recipe.lengths import fitted_calibration, fitting_length, shortened
from compress.recipe.load import load_evaluation_spec
from compress.recipe.schema import CalibrationSpec, Recipe, is_local_source
from compress.recipe.types import StageSpec
from compress.stages import KINDS
from compress.stages.contract import Plan, Setting
from compress.system.fingerprint import sha256
from compress.system.units import size


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Args:
        recipe: valid.
        base: its model; None where that is not here.
        text: calibration text, with a length that the model has positions for.
        windows: tokens of an evaluation's window, likewise.
        stages: a plan for each stage.
        warnings: a line each.
    """

    recipe: Recipe
    base: Checkpoint | None
    text: CalibrationSpec
    windows: int
    stages: Sequence[Plan]
    warnings: Sequence[str]

    @property
    def specs(self) -> list[StageSpec]:
        """The recipe's stages, with what follows from the model filled in."""
        return [plan.spec or spec for plan, spec in zip(self.stages, self.recipe.stages, strict=True)]

    def behind(self, number: int, shapes: Shapes) -> "RunPlan":
        """The same with the stages behind one planned on what it has really made.

        Raises:
            RecipeError: what then can't be done.
        """
        there = replace(self.stages[number], shapes=shapes)
        stages = [*self.stages[:number], there, *_fold(self.recipe, shapes, self.base, self.text, number + 1)]
        return replace(self, stages=stages)

    def lines(self, work: Path) -> list[str]:
        """What a dry run prints.

        Args:
            work: folder for intermediate artefacts.
        """
        assert self.base is not None, "a dry run has the model"
        free = size(shutil.disk_usage(_existing(work)).free)
        rows = [("model", f"{self.recipe.model}: {parameter_count(self.base):,} parameters, {size(self.base.bytes)}")]
        for stage in self.stages:
            assert stage.shapes is not None
            rows += [
                *stage.lines[:1],
                (
                    "result",
                    f"about {size(stage.shapes.bytes)}, {self.base.bytes / stage.shapes.bytes:.2f} times smaller",
                ),
                *stage.lines[1:],
                ("disk", f"about {size(stage.disk_bytes)} under {work}, {free} free"),
            ]
        return [f"{label:<9}{text}" for label, text in [*rows, ("output", self.recipe.output)]]


def plan_run(recipe: Recipe, folder: Path | None) -> RunPlan:
    """Check a recipe against its model.

    Args:
        recipe: valid.
        folder: the model; None where it is not here: then only what the recipe alone shows is looked at.

    Raises:
        ModelError: a damaged or unsupported model, or sequences longer than its positions.
        RecipeError: what does not fit the model; all problems of all stages at once.
    """
    base = None if folder is None else _open(folder, recipe)
    positions = None if base is None else positions_of(base.config)
    text = fitted_calibration(recipe, positions)
    windows = (recipe.evaluate and recipe.evaluate.sequence_length) or fitting_length(positions)
    warnings = [*_flattered(recipe, text), *shortened(recipe, positions), *([] if base is None else remarks(base))]
    plans = _fold(recipe, base, base, text)
    if base is not None:
        _check_lengths(recipe, base, text, windows)
    return RunPlan(recipe, base, text, windows, plans, [*warnings, *(line for plan in plans for line in plan.warnings)])


def _fold(
    recipe: Recipe, shapes: Shapes | None, base: Checkpoint | None, text: CalibrationSpec, first: int = 0
) -> list[Plan]:
    """Plans of the stages from one on, each on the shapes that the one before leaves; all their problems at once."""
    plans: list[Plan] = []
    for number in range(first, len(recipe.stages)):
        spec = recipe.stages[number]
        setting = Setting(f"stages.{number}", text, recipe.stages[number + 1 :], base)
        plans.append(KINDS[spec.kind].plan().plan(spec, shapes, setting))
        shapes = plans[-1].shapes
    problems = [problem for plan in plans for problem in plan.problems]
    if problems:
        raise RecipeError(problems)
    return plans


def _open(folder: Path, recipe: Recipe) -> Checkpoint:
    base = Checkpoint(folder)
    check_supported(base.config, {n: info.shape for n, info in base.tensors.items()}, recipe.model)
    check_code(base.config, recipe.model, recipe.trust_remote_code)
    check_depth(base)
    return base


def _check_lengths(recipe: Recipe, base: Checkpoint, text: CalibrationSpec, windows: int) -> None:
    if any(stage.calibrates for stage in recipe.stages):
        check_length(base, text.length, "calibration.sequence_length")
    if recipe.evaluate is not None:
        check_length(base, windows, "evaluate.sequence_length")


def _flattered(recipe: Recipe, calibration: CalibrationSpec) -> list[str]:
    """Whether the evaluation's text has been calibrated on."""
    if recipe.evaluate is None or not any(stage.calibrates for stage in recipe.stages):
        return []
    evaluation = load_evaluation_spec(recipe.evaluate.text)
    if not _same_text(calibration, evaluation):
        return []
    return [
        f"calibration and evaluate.text are the same text ({evaluation.name or Path(evaluation.source).name}), "
        "which flatters the reported accuracy; calibrate on another, such as general_en"
    ]


def _same_text(one: CalibrationSpec, other: CalibrationSpec) -> bool:
    """The same file by its bytes, or the same split of a hub dataset; how many samples are drawn does not matter."""
    if not (is_local_source(one.source) and is_local_source(other.source)):
        return (one.source, one.subset, one.split) == (other.source, other.subset, other.split)
    first, second = Path(one.source).expanduser(), Path(other.source).expanduser()
    if not (first.is_file() and second.is_file()):
        return False  # reading them says so
    if first.samefile(second):
        return True
    return first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    while not folder.exists():
        folder = folder.parent
    return folder
