"""Makes the points of a sweep: hands them to workers, notes what became of each, and writes what it all comes to.

What became of a finished point is written beside its folder, so the same command goes on where it was stopped and makes
no point twice. What points share is made once: one with a stage that another one is making comes later, or waits.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

import compress
from compress import records
from compress.errors import OutputError, RecipeError, UserError
from compress.report.frontier import figures_of, frontier
from compress.report.sweep import write_sweep
from compress.runs.artefact import check_output, check_work, drop_weights, work_folder
from compress.runs.cache import drop_artefact
from compress.sweep_records import SWEEP, Point, Searched, Sweep
from compress.sweeps import tree
from compress.sweeps.display import Board
from compress.sweeps.local import LocalWorkers
from compress.sweeps.points import POINTS, Planned, load_sweep
from compress.sweeps.prepare import Prepared, forget_point, prepare, read_point, read_sweep, write_point
from compress.sweeps.search import Bisection
from compress.sweeps.work import Event, Task, Workers
from compress.system.files import make_writable, write_text, writing
from compress.system.locks import FileLock, InUseError
from compress.system.progress import Reporter

Keep = Literal["all", "best", "none"]
_SCRATCH = {"logs", ".ray"}  # what workers leave before there is a point
_WAIT = 0.5  # seconds
_TRIES = 2  # of a point whose worker is lost


def sweep(
    recipe: str | Path,
    *,
    over: Sequence[str] = (),
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    work_dir: str | Path | None = None,
    jobs: int = 1,
    ray: str | None = None,
    keep: Keep = "all",
    reporter: Reporter | None = None,
) -> Sweep:
    """Make every point of a sweep, and a table and pictures of what they cost.

    The same call continues a sweep that was stopped, and makes no finished point again.

    Args:
        recipe: path of a recipe, or the name of a bundled one.
        over: `path=value,value` each, in place of what the recipe says of a sweep.
        overrides: `path=value` each, for all points.
        model: replaces the recipe's.
        output: folder of the sweep, in place of the recipe's.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: for intermediate artefacts; None is `.dscompress` beside the output.
        jobs: processes of this machine, each making a point at a time.
        ray: address of a Ray cluster that makes them instead, or "auto".
        keep: whose weights stay: of all points, of those on the frontier, or none; reports always do.
        reporter: told what happens; None says it on standard error.

    Raises:
        UserError: something in the recipe, the model or the folders that the user can mend.
    """
    if keep not in get_args(Keep):
        raise UserError(f"keep: {keep!r} is not known; use {', '.join(get_args(Keep))}")
    output = None if output is None else str(output)
    job = load_sweep(str(recipe), over=over, overrides=overrides, model=model, output=output)
    reporter = reporter or Reporter()
    work = work_folder(job.folder, None if work_dir is None else Path(work_dir).absolute())
    with _alone(job.folder, work, job.recipe.model):
        prepared = prepare(job, work, reporter)
        workers: Workers
        if ray is None:
            workers = LocalWorkers(jobs, job.folder / "logs")
        else:
            from compress.sweeps.rays import RayWorkers

            workers = RayWorkers(ray, job.folder, jobs if jobs > 1 else None, work)
        try:
            return _Driver(prepared, workers, device, keep, reporter).run()
        finally:
            workers.close()


@contextmanager
def _alone(folder: Path, work: Path, model: str) -> Iterator[None]:
    """Hold the sweep's folder against other sweeps.

    Raises:
        OutputError: it holds something else, can't be written, or another sweep is at work there.
    """
    begun = (folder / SWEEP).is_file() or (folder / POINTS).is_dir()
    if folder.is_file() or (folder.is_dir() and not begun and {each.name for each in folder.iterdir()} - _SCRATCH):
        check_output(folder)
        raise OutputError(f"{folder}: holds the result of a run; choose another --output for the sweep")
    check_work(work, folder, model)
    make_writable(folder)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(exclusive=True)
    except InUseError as error:
        raise OutputError(
            f"{folder}: being written by {error.holder}; wait for that sweep, or choose another --output"
        ) from None
    try:
        with writing(folder):
            yield
    finally:
        lock.remove()


class _Driver:
    """One sweep under way."""

    def __init__(self, prepared: Prepared, workers: Workers, device: str, keep: Keep, reporter: Reporter) -> None:
        self.prepared, self.workers, self.device, self.keep = prepared, workers, device, keep
        self.job, self.reporter = prepared.job, reporter
        self.folder = self.job.folder
        self.began = time.monotonic()
        self.planned: dict[str, Planned] = {}
        self.points: dict[str, Point] = {}
        self.chains: dict[str, list[str]] = {}
        self.built: set[str] = set()
        self.tries: dict[str, int] = {}
        self.base: dict[str, float] = {}
        self.protocol: str | None = None
        self.measures: dict[str, tuple[str | None, str | None]] = {}  # of each point: how it was measured, in what
        self.searched: Searched | None = None
        earlier = read_sweep(self.folder)
        self.spent = earlier.seconds if earlier is not None else 0.0

    def run(self) -> Sweep:
        """Make all points; returns the record."""
        for point in self.job.points:
            self._add(point)
        search = self._search()
        with Board(self.reporter, self.record) as board:
            self._make(board)
            if search is not None:
                self._go_on(search, board)
        self._mark()
        self._drop()
        record = self.record()
        write_sweep(record, self.folder)
        return record

    def record(self) -> Sweep:
        """The sweep as it stands."""
        job = self.job
        seconds = self.spent + time.monotonic() - self.began
        return Sweep(
            name=job.recipe.name, model=job.recipe.model, axes=list(job.axes), recipe=job.recipe.shown(),
            points=list(self.points.values()), base=self.base, protocol=self.protocol, search=self.searched,
            created=records.now(), seconds=seconds, version=compress.__version__,
        )  # fmt: skip

    def _add(self, planned: Planned) -> None:
        """A point to be made, unless it is finished already."""
        name = planned.name
        plan = self.prepared.plans.get(name)
        if plan is None:
            plan = tree.plan_points([planned], self.prepared.folder, self.prepared.models)[name]
        key = self.prepared.key(planned, plan)
        self.planned[name], self.chains[name] = planned, tree.chain(plan)
        point = Point(name=name, settings=dict(planned.settings), folder=f"{POINTS}/{name}", key=key)
        before = read_point(self.folder, name)
        if before is not None and before.key == key and (before.kept or self.keep != "all"):
            with suppress(OSError, ValidationError):
                self._read(name)
                self.built |= set(self.chains[name])
                point = before
        self.points[name] = point

    def _read(self, name: str) -> records.Report:
        """A point's report; base and protocol are those of any."""
        file = self.folder / POINTS / name / "report.json"
        report = records.Report.model_validate_json(file.read_text(encoding="utf-8"))
        _, self.base = figures_of(report)
        quality = report.quality
        self.measures[name] = (None, None) if quality is None else (quality.protocol, quality.dtype)
        self.protocol = quality.protocol if quality is not None else None
        return report

    def _make(self, board: Board) -> None:
        """Make all points that wait."""
        while True:
            while self.workers.free and (name := self._pick()) is not None:
                self._start(name)
            if not any(point.status == "running" for point in self.points.values()):
                return
            for event in self.workers.events(_WAIT):
                self._took(event, board)
            board.refresh()

    def _pick(self) -> str | None:
        """The next point: best one that has no stage to make which another one is making."""
        waiting = [name for name, point in self.points.items() if point.status == "waiting"]
        running = [name for name, point in self.points.items() if point.status == "running"]
        busy = {key for name in running for key in self.chains[name]} - self.built
        return next((name for name in waiting if not busy & set(self.chains[name])), next(iter(waiting), None))

    def _start(self, name: str) -> None:
        recipe = self.planned[name].recipe
        self.tries[name] = self.tries.get(name, 0) + 1
        (self.folder / POINTS).mkdir(parents=True, exist_ok=True)
        forget_point(self.folder, name)  # what it says is of another recipe, or soon will be
        self._set(name, status="running")
        self.workers.start(Task(name, recipe.shown(), self.device, str(self.prepared.work)))

    def _took(self, event: Event, board: Board) -> None:
        """Note what a worker says."""
        if event.kind == "said":
            board.said(event.name, event.text)
            return
        if event.kind == "lost" and self.tries[event.name] < _TRIES:
            self.reporter.warn(f"{event.name}: {event.text}; trying once more")
            self._set(event.name, status="waiting")
            return
        if event.kind == "done":
            report = self._read(event.name)
            figures, _ = figures_of(report)
            failure = _failure(report)
            self._set(
                event.name, status="failed" if failure else "done", error=failure, seconds=event.seconds,
                figures=figures, warnings=report.warnings, kept=True,
            )  # fmt: skip
            self.built |= set(self.chains[event.name])
            self._remake_others(event.name)
        else:
            self._set(event.name, status="failed", error=event.text, seconds=event.seconds)
        self._mark()
        board.ended(self.points[event.name])

    def _remake_others(self, name: str) -> None:
        """Points of an earlier command that were measured otherwise, on a CPU or a GPU say, are made again."""
        for other, point in self.points.items():
            if point.status == "done" and other not in self.tries and self.measures[other] != self.measures[name]:
                self.reporter.say(f"{other}: was measured otherwise than {name}; making it again")
                self._set(other, status="waiting", on_frontier=False)

    def _set(self, name: str, **values: Any) -> None:
        self.points[name] = self.points[name].model_copy(update=values)
        if self.points[name].status == "done":
            write_point(self.folder, self.points[name])
        write_text(self.folder / SWEEP, self.record().model_dump_json(indent=2) + "\n")

    def _mark(self) -> None:
        """Who is on the frontier."""
        names = list(self.points)
        rows = [self.points[name].figures if self.points[name].status == "done" else {} for name in names]
        best = frontier(rows)
        for place, name in enumerate(names):
            self.points[name] = self.points[name].model_copy(update={"on_frontier": place in best})

    def _search(self) -> Bisection | None:
        search = self.job.search
        if search is None:
            return None
        goal = f"{'largest' if search.maximize else 'smallest'} {search.goal}"
        self.searched = Searched(over=search.over, goal=goal, subject_to=dict(search.subject_to))
        return Bisection(search)

    def _go_on(self, search: Bisection, board: Board) -> None:
        """Make points until the search is at its end."""
        assert self.searched is not None
        names: dict[float, str] = {}
        while (value := search.next()) is not None:
            try:
                planned = self.job.at({search.search.over: value})
                self._add(planned)
            except RecipeError as error:  # a value between two that can be done
                self.reporter.warn(f"{search.search.over}={value:g}: {error.problems[0]}")
                search.tell(value, {})
                continue
            names[value] = planned.name
            self._make(board)
            search.tell(value, self.points[planned.name].figures if self.points[planned.name].status == "done" else {})
        best = search.best()
        found = None if best is None else names[best.value]
        self.searched = self.searched.model_copy(update={"best": found, "note": search.note()})

    def _drop(self) -> None:
        """Delete the weights of points that are not to be kept, here and in the work folder."""
        for name, point in self.points.items():
            if self.keep == "all" or (self.keep == "best" and self._is_best(point)) or not point.kept:
                continue
            if point.status != "done":
                continue
            self.points[name] = point.model_copy(update={"kept": False})
            write_point(self.folder, self.points[name])  # first: half of the weights are none
            folder = self.folder / POINTS / name
            record = records.read_record(folder)
            drop_weights(folder)
            if record is not None:
                drop_artefact(self.prepared.work, record.fingerprint)

    def _is_best(self, point: Point) -> bool:
        """Whether a point is on the frontier, is what a search has found, or can't be judged."""
        found = self.searched is not None and self.searched.best == point.name
        return point.on_frontier or found or "kl" not in point.figures


def _failure(report: records.Report) -> str | None:
    """Why a result must not be used."""
    verified = report.verified
    if verified is None or verified.passed:
        return None
    return f"verification failed: {verified.note or f'{verified.loader} computes other logits'}"
