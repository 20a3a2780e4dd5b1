"""The figures that results are compared by, and which results no other one beats in both size and accuracy.

A figure has one name everywhere: in `sweep.json`, in `subject_to` of a search, in the columns of a table. Those of
benchmarks are called `tasks.NAME`. Never imports torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.records import Report
from compress.report.figures import duration, number, percent, perplexity
from compress.system.units import count, size

TASKS = "tasks."


@dataclass(frozen=True)
class Figure:
    """One figure of a result.

    Args:
        label: as tables and axes call it.
        larger_is_better: which way is good.
        read: it, from a report; None where it was not measured.
        base: the same of the model before.
        show: as people read it.
        log: whether an axis of it is logarithmic.
    """

    label: str
    larger_is_better: bool
    read: Callable[[Report], float | None]
    base: Callable[[Report], float | None]
    show: Callable[[float], str]
    log: bool = False


def _quality(read: Callable[[Any], float]) -> Callable[[Report], float | None]:
    return lambda report: None if report.quality is None else read(report.quality)


def _speed(read: Callable[[Any], float]) -> Callable[[Report], float | None]:
    """Of a machine that was busy with other work, speeds say little: they are none."""
    return lambda report: None if report.speed is None or report.speed.busy else read(report.speed)


def _most(values: Sequence[int | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


FIGURES: Mapping[str, Figure] = {
    "bytes": Figure("Size", False, lambda r: r.compressed.bytes, lambda r: r.base.bytes, size, log=True),
    "size_ratio": Figure("Times smaller", True, lambda r: r.size_ratio, lambda r: 1.0, lambda v: f"{v:.2f}x"),
    "parameters": Figure("Parameters", False, lambda r: r.compressed.parameters, lambda r: r.base.parameters, count),
    "sparsity": Figure(
        "Parameters removed", True, lambda r: 1 - r.compressed.parameters / r.base.parameters, lambda r: 0.0, percent
    ),
    "bits_per_weight": Figure(
        "Bits per weight", False, lambda r: r.compressed.bits_per_weight,
        lambda r: 8 * r.base.bytes / r.base.parameters if r.base.parameters else None, lambda v: f"{v:.2f}",
    ),
    "kl": Figure("KL from the base", False, _quality(lambda q: q.kl.mean), _quality(lambda q: 0.0), number, log=True),
    "perplexity": Figure(
        "Perplexity", False, _quality(lambda q: q.perplexity.compressed), _quality(lambda q: q.perplexity.base),
        perplexity, log=True,
    ),
    "perplexity_ratio": Figure(
        "Perplexity, times the base's", False, _quality(lambda q: q.perplexity.compressed / q.perplexity.base),
        _quality(lambda q: 1.0), lambda v: f"{v:.3f}", log=True,
    ),
    "top1": Figure(
        "Top-1 agreement", True, _quality(lambda q: q.top1_agreement.mean), _quality(lambda q: 1.0), percent,
    ),
    "prefill": Figure(
        "Prefill, tokens/s", True, _speed(lambda s: s.compressed.prefill_tokens_per_second),
        _speed(lambda s: s.base.prefill_tokens_per_second), lambda v: f"{v:,.0f}",
    ),
    "decode": Figure(
        "Decode, tokens/s", True, _speed(lambda s: s.compressed.decode_tokens_per_second),
        _speed(lambda s: s.base.decode_tokens_per_second), lambda v: f"{v:,.1f}",
    ),
    "loaded_bytes": Figure(
        "Memory when loaded", False, _speed(lambda s: s.compressed.loaded_bytes), _speed(lambda s: s.base.loaded_bytes),
        size,
    ),
    "peak_gpu_memory_bytes": Figure(
        "Peak GPU memory to make it", False, lambda r: _most([s.peak_gpu_memory_bytes for s in r.stages]),
        lambda r: None, size,
    ),
    "seconds": Figure("Time to make it", False, lambda r: sum(s.seconds for s in r.stages), lambda r: None, duration),
}  # fmt: skip


def figure_of(name: str) -> Figure | None:
    """The figure of a name; None where there is none of it."""
    if not name.startswith(TASKS):
        return FIGURES.get(name)
    task = name.removeprefix(TASKS)

    def read(which: str) -> Callable[[Report], float | None]:
        def found(report: Report) -> float | None:
            tasks = {} if report.quality is None else report.quality.tasks
            return float(getattr(tasks[task], which)) if task in tasks else None

        return found

    return Figure(task, True, read("compressed"), read("base"), number)


def figures_of(report: Report) -> tuple[dict[str, float], dict[str, float]]:
    """What was measured of a report's result, and of its base, by the figures' names; what is no number is left out."""
    tasks = [] if report.quality is None else [f"{TASKS}{name}" for name in report.quality.tasks]
    ours: dict[str, float] = {}
    base: dict[str, float] = {}
    for name in [*FIGURES, *tasks]:
        figure = figure_of(name)
        assert figure is not None
        for found, read in ((ours, figure.read), (base, figure.base)):
            value = read(report)
            if value is not None and math.isfinite(value):
                found[name] = float(value)
    return ours, base


def frontier(rows: Sequence[Mapping[str, float]], size: str = "bytes", cost: str = "kl") -> set[int]:
    """Which rows no other one beats: none is at most as large, at most as far from the base, and better in one of both.

    Any two figures will do; of those of which more is better, less counts as farther. Rows without either figure, or
    with one that is not finite, are never among them.
    """
    signs = [-1 if (figure := figure_of(name)) and figure.larger_is_better else 1 for name in (size, cost)]
    there = [
        (signs[0] * row[size], signs[1] * row[cost], place)
        for place, row in enumerate(rows)
        if math.isfinite(row.get(size, math.nan)) and math.isfinite(row.get(cost, math.nan))
    ]
    found: set[int] = set()
    least, smallest = math.inf, math.nan
    for small, far, place in sorted(there):
        if far < least:
            least, smallest = far, small
        if (small, far) == (smallest, least):
            found.add(place)
    return found
