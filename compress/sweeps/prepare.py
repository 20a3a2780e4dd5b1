"""A sweep beside its model: every point checked before the first one is made, and what a point's result hangs on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import compress
from compress.data.sources import source_files
from compress.errors import UserError
from compress.model.checkpoint import Checkpoint
from compress.model.identity import identity
from compress.model.side_files import side_digest
from compress.model.source import resolve_model
from compress.recipe.load import load_evaluation_spec, load_training_texts
from compress.recipe.schema import Recipe
from compress.recipe.text import SourceSpec
from compress.runs.artefact import work_folder
from compress.runs.plan import RunPlan, other_models
from compress.sweep_records import SWEEP, Point, Sweep
from compress.sweeps import tree
from compress.sweeps.points import POINTS, Job, Planned, load_sweep
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint
from compress.system.progress import Reporter

_NOT_IDENTITY = ("name", "output", "tracker")  # keys of a recipe that change nothing of what a point comes to


def plan_sweep(
    recipe: str | Path,
    *,
    over: Sequence[str] = (),
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | Path | None = None,
    work_dir: str | Path | None = None,
    reporter: Reporter,
) -> list[str]:
    """What `sweep` would do with the same arguments, in lines: what points share, what each adds, how much disk.

    Raises:
        UserError: as `sweep`.
    """
    output = None if output is None else str(output)
    job = load_sweep(str(recipe), over=over, overrides=overrides, model=model, output=output)
    work = work_folder(job.folder, None if work_dir is None else Path(work_dir).absolute())
    prepared = prepare(job, work, reporter)
    points = points_of(job)
    finished: dict[str, float] = {}
    for point in points:
        before = read_point(job.folder, point.name)
        if before is not None and before.key == prepared.key(point, prepared.plans[point.name]):
            finished[point.name] = before.seconds or 0.0
    said = tree.lines(points, prepared.plans, finished)
    if job.search is not None:
        said.append(f"search: these two first, then at most {job.search.points - 2} points between them")
    return said


@dataclass(frozen=True)
class Prepared:
    """A sweep that has been checked against its model.

    Args:
        job: the sweep.
        work: the work folder.
        folder: of the model.
        models: folders of other models that stages name.
        plans: of the points.
        base_id: the model's identity.
    """

    job: Job
    work: Path
    folder: Path
    models: dict[str, Path]
    plans: dict[str, RunPlan]
    base_id: str

    def key(self, point: Planned, plan: RunPlan) -> str:
        """What a point's result hangs on."""
        shown = {name: value for name, value in point.recipe.shown().items() if name not in _NOT_IDENTITY}
        texts = [_text(spec) for spec in _texts(point.recipe, plan)]
        others = [identity(Checkpoint(folder), self.work) for folder in self.models.values()]
        return fingerprint(shown, self.base_id, side_digest(self.folder), texts, others, compress.__version__)


def prepare(job: Job, work: Path, reporter: Reporter) -> Prepared:
    """Find the model, and check every point against it.

    Raises:
        UserError: every problem of every point.
    """
    recipe = job.recipe
    folder = resolve_model(recipe.model, recipe.revision, work, reporter.say)
    points = points_of(job)
    names = dict.fromkeys(name for point in points for name in other_models(point.recipe))
    models = {name: resolve_model(name, None, work, reporter.say) for name in names}
    for point in points:
        _check_comparable(point, points[0])
    plans = tree.plan_points(points, folder, models)
    for line in dict.fromkeys(line for plan in plans.values() for line in plan.warnings):
        reporter.warn(line)
    return Prepared(job, work, folder, models, plans, identity(Checkpoint(folder), work))


def _check_comparable(point: Planned, first: Planned) -> None:
    """Refuse points whose figures can't stand in one table."""
    one, other = point.recipe, first.recipe
    differ = [key for key in ("model", "revision", "trust_remote_code") if getattr(one, key) != getattr(other, key)]
    measured = [each.evaluate and each.evaluate.model_copy(update={"prompts": None}) for each in (one, other)]
    differ += ["evaluate"] if measured[0] != measured[1] else []
    if differ:
        raise UserError(
            f"{point.name}: has another {differ[0]} than {first.name}, and figures against two models or by two "
            "protocols can't be compared; make a sweep of each"
        )


def points_of(job: Job) -> list[Planned]:
    """The points; of a search those at the ends of its range."""
    if job.search is None:
        return list(job.points)
    return [job.at({job.search.over: value}) for value in job.search.ends]


def _texts(recipe: Recipe, plan: RunPlan) -> list[SourceSpec]:
    """Texts that the point reads."""
    found: list[SourceSpec] = [plan.text] if plan.calibrates else []
    if recipe.evaluate is not None:
        found += [load_evaluation_spec(text) for text in recipe.evaluate.texts(chats=True)]
    for spec in plan.specs:
        if hasattr(spec, "data"):
            found += load_training_texts(spec.data, plan.text)
    return found


def _text(spec: SourceSpec) -> Any:
    """A text by what changes when it is written to."""
    files = source_files(spec)
    if files is None:
        return spec.model_dump(mode="json")
    states = [file.stat() for file in files if file.is_file()]
    return [spec.model_dump(mode="json"), [[state.st_size, state.st_mtime_ns] for state in states]]


def read_point(folder: Path, name: str) -> Point | None:
    """What became of a finished point; None where there is none that this version can read."""
    try:
        return Point.model_validate_json((folder / POINTS / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_point(folder: Path, point: Point) -> None:
    """Note what became of a finished point."""
    write_text(folder / POINTS / f"{point.name}.json", point.model_dump_json(indent=2) + "\n")


def forget_point(folder: Path, name: str) -> None:
    """Delete what became of a point, which is about to be made again."""
    (folder / POINTS / f"{name}.json").unlink(missing_ok=True)


def read_sweep(folder: Path) -> Sweep | None:
    """The record of a sweep; None where there is none that this version can read."""
    try:
        return Sweep.model_validate_json((folder / SWEEP).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
