"""The points of a sweep as rows: what the page, the Markdown and the terminal show of each."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from compress.report.figures import number, percent, perplexity
from compress.report.frontier import FIGURES, TASKS, figure_of
from compress.sweep_records import Point, Sweep
from compress.system.units import size

_SHOWN = ("bytes", "size_ratio", "bits_per_weight", "kl", "perplexity", "top1", "decode", "loaded_bytes", "seconds")
_SHOWN_WHERE_THEY_DIFFER = ("parameters", "sparsity")
_BRIEF = ("bytes", "size_ratio", "kl", "perplexity", "top1", "decode")
_MOST_AXES = 3  # that have columns of their own; more are read from the names
_REST = ("failed", "running", "waiting")


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it stands for where it stands for one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """The base (`point` is None) or a point, with a cell for each axis that is shown and for each figure.

    `note` says what became of a point that is not done.
    """

    name: str
    point: Point | None
    settings: list[Cell]
    figures: list[Cell]
    note: str = ""


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: the base, the points by size with the largest first, then those that are not done.

    A star marks points on the frontier. Where a point is not done, a last column says what became of it.
    """
    found = rows(sweep)
    notes = any(row.note for row in found)
    heads = ["Point", *axis_heads(sweep), *(label(name) for name in columns(sweep)), *(["Status"] if notes else [])]
    texts = []
    for row in found:
        name = f"{row.name} *" if row.point is not None and row.point.on_frontier else row.name
        cells = [cell.text for cell in [*row.settings, *row.figures]]
        texts.append([name, *cells, *([row.note] if notes else [])])
    return heads, texts


def brief_table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """The same for a terminal: the mark in front of the name, no settings, which names say, and fewer figures."""
    found, names = rows(sweep), columns(sweep)
    notes = any(row.note for row in found)
    shown = [place for place, name in enumerate(names) if name in _BRIEF or name.startswith(TASKS)]
    heads = ["", "Point", *(label(names[place]) for place in shown), *(["Status"] if notes else [])]
    texts = []
    for row in found:
        mark = "*" if row.point is not None and row.point.on_frontier else ""
        texts.append([mark, row.name, *(row.figures[place].text for place in shown), *([row.note] if notes else [])])
    return heads, texts


def rows(sweep: Sweep) -> list[Row]:
    """The rows of `table`, with the numbers that they can be sorted by."""
    shown = shown_axes(sweep)
    names = columns(sweep)
    base = Row("base", None, [Cell("–")] * len(shown), [_figure(name, sweep.base) for name in names])
    by_size = sorted(done(sweep), key=lambda point: -_finite(point.figures).get("bytes", -math.inf))
    others = [point for status in _REST for point in sweep.points if point.status == status]
    return [base] + [
        Row(
            point.name,
            point,
            [_setting(point, axis) for axis in shown],
            [_figure(name, point.figures) if point.status == "done" else Cell("") for name in names],
            _note(point),
        )
        for point in [*by_size, *others]
    ]


def done(sweep: Sweep) -> list[Point]:
    """The points that have a result."""
    return [point for point in sweep.points if point.status == "done"]


def columns(sweep: Sweep) -> list[str]:
    """Names of the figures that the table shows: those that a point has, of those that tell points apart."""
    there = {name for point in done(sweep) for name in _finite(point.figures)}
    there |= set() if done(sweep) else set(_finite(sweep.base))
    differ = {name for name in _SHOWN_WHERE_THEY_DIFFER if len({p.figures.get(name) for p in done(sweep)}) > 1}
    wanted = [name for name in FIGURES if name in _SHOWN or name in differ]
    after = wanted.index("top1") + 1
    wanted[after:after] = sorted(name for name in there if name.startswith(TASKS))
    return [name for name in wanted if name in there]


def costs(sweep: Sweep) -> list[str]:
    """The figures of accuracy that a point has together with its size; the first is what points are judged by."""
    there = {name for point in done(sweep) if "bytes" in _finite(point.figures) for name in _finite(point.figures)}
    tasks = sorted(name for name in there if name.startswith(TASKS))
    return [name for name in ("kl", "perplexity", *tasks) if name in there]


def label(name: str) -> str:
    """A figure as tables and axes call it."""
    figure = figure_of(name)
    return one_line(figure.label if figure else name)


def shown_axes(sweep: Sweep) -> list[str]:
    """The axes that have a column."""
    return sweep.axes if len(sweep.axes) <= _MOST_AXES else []


def axis_heads(sweep: Sweep) -> list[str]:
    """The heads of those columns."""
    short = axis_labels(sweep.axes)
    return [short[axis] for axis in shown_axes(sweep)]


def axis_labels(axes: Sequence[str]) -> dict[str, str]:
    """The shortest ends of the paths that tell them apart: bits; stages.0.bits where another stage's vary too."""
    parts, labels = path_parts(axes), {}
    for axis, long in shortest_ends(axes).items():
        own = parts[axis]
        while long < len(own) and own[-long].isdigit():
            long += 1
        labels[axis] = one_line(".".join(own[-long:]))
    return labels


def path_parts(paths: Sequence[str]) -> dict[str, list[str]]:
    """The keys of paths in a recipe."""
    return {path: [part.strip("\"'") for part in re.split(r"[.\[\]]+", path) if part] or [path] for path in paths}


def shortest_ends(paths: Sequence[str]) -> dict[str, int]:
    """How many last keys tell each path apart from the others."""
    parts, ends = path_parts(paths), {}
    for path, own in parts.items():
        long = 1
        while long < len(own) and any(own[-long:] == other[-long:] for name, other in parts.items() if name != path):
            long += 1
        ends[path] = long
    return ends


def settings_words(sweep: Sweep, point: Point) -> str:
    """What makes it this point: bits=4, sparsity=0.2; its name in a sweep without axes."""
    short = axis_labels(sweep.axes)
    pairs = [f"{short[axis]}={value_words(point.settings[axis])}" for axis in sweep.axes if axis in point.settings]
    return ", ".join(pairs) or one_line(point.name)


def figures_words(point: Point) -> str:
    """Its figures in one line: 95.2 MB, KL 0.083, perplexity 23.1."""
    show: dict[str, Callable[[float], str]] = {
        "bytes": size,
        "kl": lambda value: f"KL {number(value)}",
        "perplexity": lambda value: f"perplexity {perplexity(value)}",
        "top1": lambda value: f"top-1 agreement {percent(value)}",
    }
    there = _finite(point.figures)
    words = [words(there[name]) for name, words in show.items() if name in there]
    tasks = sorted(name for name in there if name.startswith(TASKS))
    return ", ".join(words + [f"{label(name)} {number(there[name])}" for name in tasks])


def value_words(value: Any) -> str:
    """A setting's value as a recipe writes it, in one line."""
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return one_line(json.dumps(value, default=str, ensure_ascii=False))


def one_line(text: str) -> str:
    """Without line breaks, repeated blanks and what has no shape, which SVG can't hold."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable())


def is_number(value: object) -> TypeGuard[float]:
    """Whether a setting has a place on an axis of numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_numeric(sweep: Sweep, axis: str) -> bool:
    """Whether all values of an axis are numbers."""
    values = [point.settings[axis] for point in sweep.points if axis in point.settings]
    return bool(values) and all(map(is_number, values))


def _finite(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _figure(name: str, figures: dict[str, float]) -> Cell:
    figure, value = figure_of(name), _finite(figures).get(name)
    assert figure is not None
    return Cell("–") if value is None else Cell(figure.show(value), value)


def _setting(point: Point, axis: str) -> Cell:
    if axis not in point.settings:
        return Cell("–")
    value = point.settings[axis]
    return Cell(value_words(value), float(value) if is_number(value) else None)


def _note(point: Point) -> str:
    if point.status == "done":
        return ""
    return one_line(f"{point.status}: {point.error}" if point.error else point.status)
