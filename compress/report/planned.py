"""What each stage was expected to take beside what it took."""

from compress.records import Report, Stage
from compress.report import chain, figures
from compress.system.units import size

PLANNED_HEADS = ["Stage", "", "Planned", "Measured", "Difference"]


def planned_rows(report: Report) -> list[list[str]]:
    """A row of `PLANNED_HEADS` for each figure that was both planned and measured."""
    rows = []
    for number, stage in enumerate(chain.measured(report)):
        found = [[what, *cells] for what, cells in _compared(stage)]
        names = [chain.words(report, number), *[""] * len(found)]
        rows += [[name, *cells] for name, cells in zip(names, found, strict=False)]
    return rows


def _compared(stage: Stage) -> list[tuple[str, tuple[str, str, str]]]:
    """Planned, measured and the change from one to the other, by what it is."""
    planned = stage.forecast
    if planned is None:
        return []
    found = []
    if planned.output_bytes is not None and stage.bytes is not None:
        same = planned.output_bytes == stage.bytes
        difference = "none" if same else figures.change(planned.output_bytes, stage.bytes)
        found.append(("Bytes written", (f"{planned.output_bytes:,}", f"{stage.bytes:,}", difference)))
    for what, before, after in (
        ("Peak memory", planned.memory_bytes, stage.peak_memory_bytes),
        ("Peak GPU memory", planned.gpu_memory_bytes, stage.peak_gpu_memory_bytes),
    ):
        if before is not None and after is not None:
            found.append((what, (size(before), size(after), figures.change(before, after))))
    if planned.seconds is not None:
        times = figures.duration(planned.seconds), figures.duration(stage.seconds)
        found.append(("Time", (*times, figures.change(planned.seconds, stage.seconds))))
    return found
