"""A finished run in the user's own tracker of runs: the report's figures, with the recipe beside them."""

from pathlib import Path

from compress.errors import reason
from compress.records import Report
from compress.report.frontier import figures_of
from compress.system.progress import Reporter
from compress.system.tracker import EVENTS, open_tracker

_OF_STAGES = (
    "seconds", "bytes", "parameters", "peak_memory_bytes", "peak_gpu_memory_bytes", "quantized_bits_per_weight", "kl",
    "perplexity",
)  # fmt: skip
_OF_ENGINES = ("prefill_tokens_per_second", "decode_tokens_per_second", "loaded_bytes", "peak_bytes")


def track(report: Report, kind: str | None, work: Path, reporter: Reporter) -> None:
    """Log a report; that this fails is a warning, for the run is finished.

    Args:
        report: as it was written.
        kind: of the tracker; None where nobody asked for one.
        work: the work folder, in which tensorboard's files lie.
        reporter: told what went wrong.
    """
    if kind is None:
        return
    try:
        tracker = open_tracker(kind, work / EVENTS, report.name, report.recipe)
        try:
            tracker.add(0, tracked_figures(report))
        finally:
            tracker.close()
    except Exception as error:
        said = f"{kind} did not take the figures ({reason(error)})"
        reporter.warn(f"tracker: {said}; they are in {report.compressed.path}")


def tracked_figures(report: Report) -> dict[str, float]:
    """The numbers of a report, by name: those that sweeps compare under `result/` and `base/`, and each stage's."""
    found: dict[str, float] = {}
    for number, stage in enumerate(report.stages, 1):
        values = {name: getattr(stage, name) for name in _OF_STAGES}
        found |= {f"stages/{number}_{stage.kind}/{name}": value for name, value in values.items() if value is not None}
    ours, base = figures_of(report)
    found |= {f"result/{name}": value for name, value in ours.items()}
    found |= {f"base/{name}": value for name, value in base.items()}
    if report.served is not None and report.served.speed is not None:
        pace, engine = report.served.speed.compressed, report.served.engine.replace(" ", "_")
        found |= {f"served/{engine}/{name}": getattr(pace, name) for name in _OF_ENGINES}
    return found
