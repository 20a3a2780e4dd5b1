"""A recipe beside its model: one pass over the stages, each planned on the shapes that the one before leaves.

`validate`, `run --dry-run` and `run` all go by what comes out, so everything that would stop a run is said before it
starts. Never imports torch.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from compress.data.sources import source_files
from compress.errors import CalibrationError, ModelError, RecipeError
from compress.evaluation.tasks.names import task_problems
from compress.evaluation.tasks.places import task_lines
from compress.forecast_records import Forecast
from compress.model.arch import check_code, check_supported, positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import Shapes, check_depth, check_length, parameter_count, remarks
from compress.recipe.lengths import fitted_calibration, fitting_length, shortened
from compress.recipe.load import load_evaluation_spec, load_training_texts
from compress.recipe.prune import PatternStage
from compress.recipe.schema import Recipe
from compress.recipe.text import CalibrationSpec, SourceSpec
from compress.recipe.train import BASE, DistillStage, FinetuneStage
from compress.recipe.types import StageSpec
from compress.runs.foreseen import export_rows, file_rows, memory_words, time_words
from compress.stages import KINDS
from compress.stages.contract import Place, Plan, Setting
from compress.system.fingerprint import sha256
from compress.system.tracker import tracker_problem
from compress.system.units import size

_ONE_CPU = Place()


@dataclass(frozen=True)
class Part:
    """A stage as it runs; a stage of a recipe may stand for several.

    Args:
        number: of the recipe's stage, counted from 0.
        spec: what was planned.
        plan: what came out.
    """

    number: int
    spec: StageSpec
    plan: Plan


@dataclass(frozen=True)
class RunPlan:
    """What a run will do.

    Args:
        recipe: valid.
        base: its model; None where that is not here.
        text: calibration text, with a length that the model has positions for.
        windows: tokens of an evaluation's window, likewise.
        parts: the stages in order.
        warnings: a line each.
        models: folders of other models that stages name.
        place: where it will run.
    """

    recipe: Recipe
    base: Checkpoint | None
    text: CalibrationSpec
    windows: int
    parts: Sequence[Part]
    warnings: Sequence[str]
    models: Mapping[str, Path]
    place: Place = Place()

    @property
    def stages(self) -> list[Plan]:
        """A plan for each stage that runs."""
        return [part.plan for part in self.parts]

    @property
    def specs(self) -> list[StageSpec]:
        """The stages that run, with what follows from the model filled in."""
        return [part.plan.spec or part.spec for part in self.parts]

    @property
    def calibrates(self) -> bool:
        """Whether any of them looks at calibration text."""
        return any(spec.calibrates for spec in self.specs)

    def behind(self, index: int, shapes: Shapes) -> "RunPlan":
        """The same with the stages behind one planned on what it has really made.

        Raises:
            RecipeError: what then can't be done.
        """
        done = self.parts[index]
        parts = [*self.parts[:index], replace(done, plan=replace(done.plan, shapes=shapes))]
        for number, part in enumerate(self.parts[index + 1 :], index + 1):
            found = self._planned(number, shapes, self.place)
            parts.append(replace(part, plan=found))
            assert found.shapes is not None
            shapes = found.shapes
        _check(parts)
        return replace(self, parts=parts)

    def forecast(self, number: int, shapes: Shapes, place: Place) -> Forecast | None:
        """What a stage takes that begins now, on these shapes in this place."""
        return self._planned(number, shapes, place).forecast

    def _planned(self, number: int, shapes: Shapes, place: Place) -> Plan:
        """The plan of a stage on other shapes, or in another place."""
        part, following = self.parts[number], [each.spec for each in self.parts[number + 1 :]]
        setting = Setting(f"stages.{part.number}", self.text, following, self.base, self.models, place)
        found: Plan = KINDS[part.spec.kind].plan().plan(part.spec, shapes, setting)
        return found

    def lines(self, work: Path, files: Mapping[str, int] = MappingProxyType({})) -> list[str]:
        """What a dry run prints.

        Args:
            work: folder for intermediate artefacts.
            files: bytes of those that hold the weights, by name, where they are no safetensors.
        """
        assert self.base is not None, "a dry run has the model"
        free = size(shutil.disk_usage(_existing(work)).free)
        rows = [("model", f"{self.recipe.model}: {parameter_count(self.base):,} parameters, {size(self.base.bytes)}")]
        for spec, stage in zip(self.specs, self.stages, strict=True):
            assert stage.shapes is not None and stage.forecast is not None
            result = f"{stage.shapes.bytes:,} bytes" + (" or so" if stage.forecast.about else "")
            smaller = f"{self.base.bytes / stage.shapes.bytes:.2f} times smaller"
            rows += [*stage.lines[:1], ("result", f"{result} ({size(stage.shapes.bytes)}), {smaller}")]
            rows += stage.lines[1:]
            if words := memory_words(stage.forecast):
                text = f" ({self.text.samples} x {self.text.length} calibration tokens)" if spec.calibrates else ""
                rows.append(("memory", words + text))
            if stage.forecast.disk_bytes is not None:
                rows.append(("disk", f"about {size(stage.forecast.disk_bytes)} under {work}, {free} free"))
            if words := time_words(spec, stage, self.place, work):
                rows.append(("time", words))
        said = task_lines(self.recipe.evaluate, self.base, self.place.device, self.place.width, work)
        rows += [("tasks", line) for line in said]
        rows += [*file_rows(self, files), *export_rows(self), ("output", self.recipe.output)]
        return [f"{label:<9}{text}" for label, text in rows]


def plan_run(
    recipe: Recipe, folder: Path | None, models: Mapping[str, Path] | None = None, place: Place = _ONE_CPU
) -> RunPlan:
    """Check a recipe against its model.

    Args:
        recipe: valid.
        folder: the model; None where it is not here: then only what the recipe alone shows is looked at.
        models: folders of other models that its stages name, those that are here.
        place: where it will run.

    Raises:
        ModelError: a damaged or unsupported model, or sequences longer than its positions.
        RecipeError: what does not fit the model; all problems of all stages at once.
    """
    base = None if folder is None else _open(folder, recipe.model, recipe.trust_remote_code)
    for name, other in (models or {}).items():
        _check_other(name, other, recipe.trust_remote_code)
    positions = None if base is None else positions_of(base.config)
    text = fitted_calibration(recipe, positions)
    windows = (recipe.evaluate and recipe.evaluate.sequence_length) or fitting_length(positions)
    parts = _fold(recipe, base, text, models or {}, place)
    planned = RunPlan(recipe, base, text, windows, parts, (), models or {}, place)
    said = [*_flattered(planned), *shortened(recipe, positions), *([] if base is None else remarks(base))]
    if base is not None:
        _check_lengths(planned, base)
    said += [line for part in parts for line in part.plan.warnings]
    return replace(planned, warnings=list(dict.fromkeys(said)))


def other_models(recipe: Recipe) -> list[str]:
    """Models that stages name beside the recipe's own, as they are called there."""
    named = []
    for stage in recipe.stages:
        heal = getattr(stage, "heal", None)
        named += [getattr(stage, "teacher", None), getattr(stage, "student", None), getattr(heal, "teacher", None)]
    return list(dict.fromkeys(name for name in named if name not in (None, BASE)))


def _fold(
    recipe: Recipe, base: Checkpoint | None, text: CalibrationSpec, models: Mapping[str, Path], place: Place
) -> list[Part]:
    """Plans of all stages, each on the shapes that the one before leaves; all their problems at once."""
    shapes: Shapes | None = base
    parts: list[Part] = []
    for number, stage in enumerate(recipe.stages):
        behind = Setting(f"stages.{number}", text, recipe.stages[number + 1 :], base, models, place)
        specs = KINDS[stage.kind].parts(stage, shapes, behind)
        for nth, spec in enumerate(specs):
            following = [*specs[nth + 1 :], *recipe.stages[number + 1 :]]
            setting = replace(behind, following=following)
            parts.append(Part(number, spec, KINDS[spec.kind].plan().plan(spec, shapes, setting)))
            shapes = parts[-1].plan.shapes
    _check(parts, [*_between(parts), *_not_comparable(recipe, base, models), *_asked_for(recipe)])
    return parts


def _check(parts: Sequence[Part], more: Sequence[str] = ()) -> None:
    problems = list(dict.fromkeys([*(problem for part in parts for problem in part.plan.problems), *more]))
    if problems:
        raise RecipeError(problems)


def _between(parts: Sequence[Part]) -> list[str]:
    """What stages do to each other that neither sees alone."""
    problems = []
    student = zeros = None
    for part in parts:
        spec, where = part.spec, f"stages.{part.number}"
        if spec.starts_from is not None:
            student, zeros = where, None
        if isinstance(spec, PatternStage):
            zeros = where
        if zeros is not None and getattr(spec, "lora", None) is not None:
            problems.append(
                f"{where}.lora: {zeros} makes zeros, and low-rank additions would fill them; train the weights "
                "themselves (remove lora)"
            )
        said = any(problem.startswith(f"{where}.reference: ") for problem in part.plan.problems)
        if student is not None and getattr(spec, "reference", None) == BASE and not said:
            problems.append(
                f"{where}.reference: is base, and {student} goes on with another model (student), whose layers are not "
                "base's; use parent"
            )
    return problems


def _asked_for(recipe: Recipe) -> list[str]:
    """A tracker that is not installed, and tasks of the evaluation that nobody knows."""
    problem, evaluate = tracker_problem(recipe.tracker), recipe.evaluate
    found = [] if problem is None else [f"tracker: {problem}"]
    if evaluate is None or evaluate.tasks is None:
        return found
    files = None if evaluate.task_files is None else Path(evaluate.task_files)
    return found + task_problems(evaluate.tasks, files, "evaluate.tasks")


def _not_comparable(recipe: Recipe, base: Checkpoint | None, models: Mapping[str, Path]) -> list[str]:
    """Students whose logits are not as many as those of the recipe's model, which the evaluation compares them with."""
    problems = []
    for number, stage in enumerate(recipe.stages):
        folder = None if stage.starts_from is None else models.get(stage.starts_from)
        if base is None or folder is None or recipe.evaluate is None:
            continue
        sizes = [model.config.get("vocab_size") for model in (Checkpoint(folder), base)]
        if sizes[0] == sizes[1]:
            continue
        taught = isinstance(stage, DistillStage) and stage.teacher == BASE and stage.losses.used != ["ce"]
        problems.append(
            f"stages.{number}.student: has {sizes[0]} logits and the recipe's model {sizes[1]}, and the evaluation "
            f"compares the two; make the student `model`{f' and {recipe.model} its `teacher`' if taught else ''}"
        )
    return problems


def _open(folder: Path, name: str, trust_remote_code: bool) -> Checkpoint:
    """A model that stages can work on; `name` is what the recipe calls it."""
    found = Checkpoint(folder)
    check_supported(found.config, {n: info.shape for n, info in found.tensors.items()}, name)
    check_code(found.config, name, trust_remote_code)
    check_depth(found)
    return found


def _check_other(name: str, folder: Path, trust_remote_code: bool) -> None:
    """Refuse a teacher or a student as the recipe's model would be; messages start with what the recipe calls it."""
    try:
        _open(folder, name, trust_remote_code)
    except ModelError as error:
        said = str(error)
        raise ModelError(said if said.startswith(name) else f"{name}: {said.removeprefix(f'{folder}: ')}") from error


def _check_lengths(planned: RunPlan, base: Checkpoint) -> None:
    if planned.calibrates:
        check_length(base, planned.text.length, "calibration.sequence_length")
    if planned.recipe.evaluate is not None:
        check_length(base, planned.windows, "evaluate.sequence_length")


def _flattered(planned: RunPlan) -> list[str]:
    """Whether the evaluation's text has been calibrated or trained on."""
    recipe = planned.recipe
    if recipe.evaluate is None:
        return []
    texts = [load_evaluation_spec(text) for text in recipe.evaluate.texts(chats=True)]
    return [line for text in texts for line in _flattered_on(text, planned)]


def _flattered_on(evaluation: SourceSpec, planned: RunPlan) -> list[str]:
    name = evaluation.name or Path(evaluation.source).name
    lines = []
    if planned.calibrates and _same_text(planned.text, evaluation):
        lines.append(
            f"calibration and evaluate.text are the same text ({name}), which flatters the reported accuracy; "
            "calibrate on another, such as general_en"
        )
    for part in planned.parts:
        if not isinstance(part.spec, FinetuneStage | DistillStage):
            continue
        if any(_same_text(each, evaluation) for each in load_training_texts(part.spec.data, planned.text)):
            lines.append(
                f"stages.{part.number}: is trained on the text of the evaluation ({name}), which flatters the reported "
                "accuracy; train or measure on another"
            )
    return lines


def _same_text(one: SourceSpec, other: SourceSpec) -> bool:
    """Whether they share a file, by its bytes, or are the same split of a hub dataset; samples do not matter."""
    try:
        first, second = source_files(one), source_files(other)
    except CalibrationError:
        return False  # reading them says so
    if first is None or second is None:
        return first is second and (one.source, one.subset, one.split) == (other.source, other.subset, other.split)
    return any(_same_file(file, each) for file in first for each in second)


def _same_file(first: Path, second: Path) -> bool:
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
