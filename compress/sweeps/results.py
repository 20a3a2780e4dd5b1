"""What is done with finished points: one becomes the checkpoint, any finished results stand in one table."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

import compress
from compress import records
from compress.errors import OutputError, UserError
from compress.recipe.messages import did_you_mean
from compress.report.frontier import figures_of, frontier
from compress.report.sweep import write_sweep
from compress.runs.artefact import check_output, write_output
from compress.sweep_records import SWEEP, Point, Sweep
from compress.sweeps.prepare import read_sweep
from compress.system.files import make_writable, writing
from compress.system.locks import FileLock
from compress.system.progress import Reporter

_REPORT = "report.json"


def promote(sweep: Path, point: str, output: Path) -> records.Report:
    """Make a point of a sweep the finished checkpoint: its files, with a report that says where they are now.

    Args:
        sweep: folder of the sweep.
        point: its name.
        output: folder to write.

    Raises:
        UserError: no such sweep or point, one that failed, or one whose weights were not kept.
        OutputError: the folder holds something else, or can't be written.
    """
    record = read_sweep(sweep)
    if record is None:
        raise UserError(f"{sweep}: no sweep; name a folder with a {SWEEP}, which dscompress sweep writes")
    known = {each.name: each for each in record.points}
    if point not in known:
        raise UserError(f"{point}: no point of {sweep}{did_you_mean(point, known)} (there are {', '.join(known)})")
    found, folder = known[point], sweep / known[point].folder
    if found.status != "done":
        reason = f": {found.error}" if found.error else ""
        raise UserError(f"{point}: is {found.status}{reason}; run the same dscompress sweep again to make it")
    made = records.read_record(folder)
    if not found.kept or made is None or not all((folder / name).is_file() for name in made.files):
        raise UserError(f"{point}: its weights were not kept; run the same dscompress sweep again with --keep all")
    report = _report(folder)
    if report is None:
        raise UserError(f"{folder / _REPORT}: is missing or damaged; run the same dscompress sweep again")
    output = output.resolve()
    if sweep.resolve() in (output, *output.parents):
        raise OutputError(f"{output}: lies in the sweep, whose points stay as they are; name another folder")
    check_output(output)
    placed = report.compressed.model_copy(update={"path": str(output)})
    recipe = report.recipe | {"output": str(output)}
    report = report.model_copy(update={"compressed": placed, "recipe": recipe})
    make_writable(output.parent)
    with FileLock(output.with_name(f".{output.name}.lock")) as lock, writing(output.parent):
        lock.acquire(exclusive=True)
        try:
            write_output(folder, output, report)
        finally:
            lock.remove()
    return report


def compare(
    results: Sequence[str | Path],
    output: str | Path,
    *,
    base: str | None = None,
    text: str = "wikitext2",
    sequence_length: int | None = None,
    windows: int = 64,
    device: str = "auto",
    work_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Sweep:
    """Put finished results into one table and one picture.

    Args:
        results: outputs of runs, folders of sweeps, or any checkpoints.
        output: folder for compare.json, .md, .html and .png.
        base: the original, with which every result is compared anew; None takes the figures of the reports.
        text: to compare on, where there is a base.
        sequence_length: tokens of a window; None is 2048, or as many as the base has positions.
        windows: how many.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: where what the base gives is kept; None is `.dscompress` beside the output.
        trust_remote_code: let code that comes with the models run.
        reporter: told what happens.

    Raises:
        UserError: what is no result, or figures that can't be compared.
    """
    output = Path(output).absolute()
    found = [each for result in results for each in _results(Path(result), base is not None)]
    names = _names([folder for _, folder in found], [name for name, _ in found])
    if base is None:
        points, figures, protocol = _by_reports(names, [folder for _, folder in found])
    else:
        work = output.parent / ".dscompress" if work_dir is None else Path(work_dir)
        points, figures, protocol = [], {}, None
        for name, (_, folder) in zip(names, found, strict=True):
            quality = compress.evaluate(
                base, folder, text=text, sequence_length=sequence_length, windows=windows, device=device,
                work_dir=work, trust_remote_code=trust_remote_code, reporter=reporter,
            )  # fmt: skip
            measured, figures = _measured(base, folder, quality, work, reporter or Reporter())
            protocol = quality.protocol
            points.append(_point(name, folder, measured))
    best = frontier([point.figures for point in points])
    points = [point.model_copy(update={"on_frontier": place in best}) for place, point in enumerate(points)]
    model = base or (_report(found[0][1]) or _missing(found[0][1])).base.model
    sweep = Sweep(
        name=f"Comparison of {len(points)} results", model=model, axes=[], points=points, base=figures,
        protocol=protocol, created=records.now(), version=compress.__version__,
    )  # fmt: skip
    make_writable(output)
    write_sweep(sweep, output, "compare")
    return sweep


def _results(folder: Path, weights: bool) -> list[tuple[str, Path]]:
    """Names and folders of what a folder holds: the points of a sweep (those that have weights), or one result."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name outputs of runs, sweeps, or checkpoints")
    sweep = read_sweep(folder)
    if sweep is not None:
        done = [point for point in sweep.points if point.status == "done" and (point.kept or not weights)]
        if not done:
            raise UserError(f"{folder}: the sweep has no finished point whose weights are there; run it first")
        return [(point.name, folder / point.folder) for point in done]
    return [(folder.resolve().name, folder)]


def _names(folders: Sequence[Path], names: Sequence[str]) -> list[str]:
    """Names that tell the results apart: longer where two are alike."""
    found = list(names)
    for place, name in enumerate(names):
        if names.count(name) > 1:
            found[place] = str(folders[place])
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UserError(f"{twice[0]}: is given twice; name each result once")
    return found


def _by_reports(names: Sequence[str], folders: Sequence[Path]) -> tuple[list[Point], dict[str, float], str | None]:
    """Points from the reports, which must have been measured alike."""
    reports = [_report(folder) or _missing(folder) for folder in folders]
    first = reports[0]
    for name, report in zip(names, reports, strict=True):
        if report.base.fingerprint != first.base.fingerprint:
            raise UserError(
                f"{name}: was made of another model ({report.base.model}) than {names[0]} ({first.base.model}); name "
                "the one to compare all with: --base MODEL"
            )
        if _protocol(report) != _protocol(first):
            raise UserError(
                f"{name}: was not measured like {names[0]} ({_protocol(report)}; {_protocol(first)}); measure all "
                "anew: --base MODEL"
            )
    points = [
        _point(name, folder, figures_of(report)[0])
        for name, folder, report in zip(names, folders, reports, strict=True)
    ]
    return points, figures_of(first)[1], first.quality.protocol if first.quality is not None else None


def _protocol(report: records.Report) -> str:
    if report.quality is None:
        return "without an evaluation"
    measured, dtype = report.quality.perplexity, report.quality.dtype
    return (
        f"{measured.tokens} tokens of {measured.dataset} in windows of {measured.sequence_length}, computed in {dtype}"
    )


def _measured(
    base: str, folder: Path, quality: records.Quality, work: Path, reporter: Reporter
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures of a checkpoint and its base that was measured here, whoever made it."""
    from compress.model.checkpoint import Checkpoint
    from compress.model.shapes import parameter_count
    from compress.model.source import resolve_model

    original, result = Checkpoint(resolve_model(base, None, work, reporter.say)), Checkpoint(folder)
    ours: dict[str, float] = {
        "bytes": result.bytes, "size_ratio": original.bytes / result.bytes, "kl": quality.kl.mean,
        "perplexity": quality.perplexity.compressed, "top1": quality.top1_agreement.mean,
        "perplexity_ratio": quality.perplexity.compressed / quality.perplexity.base,
    }  # fmt: skip
    theirs: dict[str, float] = {
        "bytes": original.bytes, "size_ratio": 1.0, "kl": 0.0, "perplexity": quality.perplexity.base, "top1": 1.0,
        "perplexity_ratio": 1.0, "parameters": parameter_count(original),
    }  # fmt: skip
    return ours, theirs


def _point(name: str, folder: Path, figures: dict[str, float]) -> Point:
    return Point(name=name, settings={}, folder=str(folder.absolute()), key="", status="done", figures=figures)


def _report(folder: Path) -> records.Report | None:
    with suppress(OSError, ValidationError):
        return records.Report.model_validate_json((folder / _REPORT).read_text(encoding="utf-8"))
    return None


def _missing(folder: Path) -> records.Report:
    raise UserError(f"{folder}: has no {_REPORT} of a run; name the model to compare it with: --base MODEL")
