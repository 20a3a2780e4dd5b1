"""The pictures of a sweep: what accuracy costs against size, and against each setting.

On the page every point says what it is where the pointer rests on it, as the <title> of its part of the SVG.
"""

import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.report.canvas import MARKERS, PAGE, Palette, canvas, legend, light, svg
from compress.report.frontier import figure_of, frontier
from compress.report.labels import place, short
from compress.report.sweep_table import (
    axis_labels,
    costs,
    figures_words,
    is_number,
    is_numeric,
    label,
    one_line,
    settings_words,
    value_words,
)
from compress.sweep_records import Point, Sweep
from compress.system.units import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_LOG_FROM = 4  # times that an axis spans
_LOG_SETTINGS_FROM = 30
_MOST_LINES = 8
_MOST_LABELS = 12
_UNITS = {"kl": "KL from the base, nats per token"}


@dataclass(frozen=True)
class _Mark:
    """A done point in a picture: its place in the record, and where it lies."""

    place: int
    point: Point
    x: float
    y: float


def frontier_plot(sweep: Sweep, cost: str) -> str | None:
    """A figure of accuracy against bytes on disk, with the frontier and the base; None where no point has both.

    Where two settings vary, the one with fewer values has a colour for each, and a line leads along the other.
    """
    if cost not in costs(sweep):
        return None
    prefix = f"frontier-{costs(sweep).index(cost)}"
    with canvas(4.3) as (figure, axes):
        marks = _draw(figure, axes, sweep, cost, PAGE)
        text = svg(figure, prefix, f"{label(cost)} against size on disk")
    return _with_titles(text, prefix, sweep, marks)


def axis_plots(sweep: Sweep) -> list[tuple[str, str]]:
    """What each setting does to accuracy: title and picture for each axis of numbers that a line can be drawn along.

    A line is a combination of the other settings; of more than eight, those with the most points are drawn.
    """
    found: list[tuple[str, str]] = []
    if not costs(sweep):
        return found
    cost, short_names = costs(sweep)[0], axis_labels(sweep.axes)
    for number, axis in enumerate(sweep.axes):
        lines = _combinations(sweep, axis, cost)
        if not is_numeric(sweep, axis) or max(map(_distinct, lines.values()), default=0) < 2:
            continue
        most = sorted(lines, key=lambda name: -len(lines[name]))[:_MOST_LINES]
        shown = {name: line for name, line in lines.items() if name in most}
        title = f"{label(cost)} against {short_names[axis]}"
        if len(shown) < len(lines):
            title += f" ({len(shown)} of {len(lines)} combinations)"
        prefix = f"axis-{number}"
        with canvas(3.2, 4.9) as (figure, axes):
            _draw_axis(axes, shown, cost, short_names[axis])
            text = svg(figure, prefix, title)
        marks = [mark for line in shown.values() for mark in line]
        found.append((title, _with_titles(text, prefix, sweep, marks)))
    return found


def png(sweep: Sweep) -> bytes | None:
    """The first frontier plot for where no page is: 1600 x 900 pixels in light colours; None without a cost."""
    if not costs(sweep):
        return None
    buffer = io.BytesIO()
    palette = light()
    with canvas(4.5, 8, palette) as (figure, axes):
        figure.set_facecolor("#ffffff")
        title = one_line(sweep.name)
        title = title if len(title) <= 70 else f"{title[:69]}…"
        figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.12)
        figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
        _draw(figure, axes, sweep, costs(sweep)[0], palette)
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _draw(figure: "Figure", axes: "Axes", sweep: Sweep, cost: str, palette: Palette) -> list[_Mark]:
    """Size against a cost: series, frontier, base, names; returns what was drawn of the points."""
    marks, base = _marks(sweep, cost), _base(sweep, cost)
    _size_axis(axes, [mark.x for mark in marks] + [x for x, _ in base])
    floor = _cost_axis(axes, cost, [mark.y for mark in marks] + [y for _, y in base])
    for number, (name, line) in enumerate(_series(sweep, marks).items()):
        style = {"color": palette.series[number % 8], "marker": MARKERS[number % 8]}
        _plot_line(axes, _raised(line, floor), name, style, _is_along(sweep))
    best = [marks[index] for index in frontier([mark.point.figures for mark in marks], cost=cost)]
    best = sorted(_raised(best, floor), key=lambda mark: mark.x)
    right = max([mark.x for mark in marks] + [x for x, _ in base])
    steps = [(mark.x, mark.y) for mark in best]
    corners = [(end, y) for (_, y), (end, _) in zip(steps, [*steps[1:], (right, 0.0)], strict=True)]
    way = [each for pair in zip(steps, corners, strict=True) for each in pair]
    dashes: dict[str, Any] = {"color": palette.ink, "linewidth": 1.1, "linestyle": (0, (4, 2)), "gid": "frontier"}
    axes.plot(*zip(*way, strict=True), label="frontier", zorder=2, **dashes)
    labels = [(x, max(y, floor), "base" if y > floor else "base, at 0") for x, y in base]
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "markerfacecolor": "none", "clip_on": False, "zorder": 4}
    ring |= {"markeredgecolor": palette.ink, "linestyle": "none", "gid": "base"}
    axes.plot([x for x, _, _ in labels], [y for _, y, _ in labels], **ring)
    axes.margins(x=0.06, y=0.1)
    if floor > -math.inf:
        axes.set_ylim(bottom=floor)
    axes.set(xlabel="size on disk", ylabel=_UNITS.get(cost, label(cost)))
    legend(axes)
    covered = [(mark.x, mark.y) for mark in _raised(marks, floor)] + [(x, y) for x, y, _ in labels]
    if len(best) <= _MOST_LABELS:
        labels += [(mark.x, mark.y, one_line(mark.point.name)) for mark in best]
    place(figure, axes, labels, covered)
    return marks


def _base(sweep: Sweep, cost: str) -> list[tuple[float, float]]:
    """Where the model itself lies; nowhere if either figure is not known."""
    x, y = sweep.base.get("bytes"), sweep.base.get(cost)
    return [(x, y)] if is_number(x) and is_number(y) else []


def _raised(marks: Iterable[_Mark], floor: float) -> list[_Mark]:
    """The marks, with what a log scale has no place for at its lower end."""
    return [replace(mark, y=max(mark.y, floor)) for mark in marks]


def _draw_axis(axes: "Axes", lines: dict[str, list[_Mark]], cost: str, name: str) -> None:
    marks = [mark for line in lines.values() for mark in line]
    floor = _cost_axis(axes, cost, [mark.y for mark in marks])
    for number, (combination, line) in enumerate(lines.items()):
        style = {"color": PAGE.series[number % 8], "marker": MARKERS[number % 8]}
        _plot_line(axes, _raised(line, floor), combination, style, True)
    values = sorted({mark.x for mark in marks})
    if values[0] > 0 and values[-1] >= _LOG_SETTINGS_FROM * values[0]:
        axes.set_xscale("log")
    if len(values) <= 6:
        axes.set_xticks(values, minor=False)
        axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if floor > -math.inf:
        axes.set_ylim(bottom=floor)
    axes.margins(x=0.06, y=0.1)
    axes.set(xlabel=name, ylabel=label(cost))
    if len(lines) > 1:
        columns = 2 if max(map(len, lines)) <= 24 else 1
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handlelength=1.6, fontsize=8)


def _plot_line(axes: "Axes", line: Sequence[_Mark], name: str, style: dict[str, Any], connected: bool) -> None:
    """A series: a thin line where it leads along a setting, and a marker of its own for each point."""
    if connected:
        axes.plot([m.x for m in line], [m.y for m in line], color=style["color"], linewidth=1, alpha=0.55, zorder=2)
    dot: dict[str, Any] = style | {"markersize": 7, "markeredgewidth": 0, "linestyle": "none", "clip_on": False}
    for number, mark in enumerate(line):
        text = short(name) if name and not number else "_"
        axes.plot(mark.x, mark.y, label=text, gid=f"point-{mark.place}", zorder=3, **dot)


def _marks(sweep: Sweep, cost: str) -> list[_Mark]:
    found = []
    for number, point in enumerate(sweep.points):
        x, y = point.figures.get("bytes"), point.figures.get(cost)
        if point.status == "done" and is_number(x) and is_number(y):
            found.append(_Mark(number, point, x, y))
    return found


def _series(sweep: Sweep, marks: Sequence[_Mark]) -> dict[str, list[_Mark]]:
    """The marks by the values of the setting that has the fewest; all under no name where that says nothing."""
    values = {axis: _values(sweep, axis) for axis in sweep.axes}
    by = min(values, key=lambda axis: len(values[axis]), default=None)
    others = [axis for axis in sweep.axes if axis != by]
    if by is None or not others or len(values[by]) > _MOST_LINES:
        return {"": _along(sweep, marks, sweep.axes)}
    name = axis_labels(sweep.axes)[by]
    found = {
        f"{name}={value}": _along(sweep, [mark for mark in marks if _value(mark.point, by) == value], others)
        for value in values[by]
    }
    return {series: line for series, line in found.items() if line}


def _is_along(sweep: Sweep) -> bool:
    """Whether one setting is left to lead a line along."""
    return len(sweep.axes) == 2 or (len(sweep.axes) == 1 and is_numeric(sweep, sweep.axes[0]))


def _along(sweep: Sweep, marks: Iterable[_Mark], axes: Sequence[str]) -> list[_Mark]:
    """The marks in the order of a setting: of its numbers, or as its values came."""
    if len(axes) != 1:
        return list(marks)
    order = {value: number for number, value in enumerate(_values(sweep, axes[0]))}
    return sorted(marks, key=lambda mark: order[_value(mark.point, axes[0])])


def _values(sweep: Sweep, axis: str) -> list[str]:
    """The values of an axis in words, numbers in their order."""
    points = sorted(sweep.points, key=lambda p: p.settings.get(axis, 0)) if is_numeric(sweep, axis) else sweep.points
    return list(dict.fromkeys(_value(point, axis) for point in points))


def _value(point: Point, axis: str) -> str:
    return value_words(point.settings[axis]) if axis in point.settings else "–"


def _combinations(sweep: Sweep, axis: str, cost: str) -> dict[str, list[_Mark]]:
    """For each combination of the other settings its marks along this one: x is the setting, y the cost."""
    labels, found = axis_labels(sweep.axes), dict[str, list[_Mark]]()
    for number, point in enumerate(sweep.points):
        others = [f"{labels[other]}={_value(point, other)}" for other in sweep.axes if other != axis]
        line = found.setdefault(", ".join(others), [])
        x, y = point.settings.get(axis), point.figures.get(cost)
        if point.status == "done" and is_number(x) and is_number(y):
            line.append(_Mark(number, point, float(x), y))
    return {name: sorted(line, key=lambda mark: mark.x) for name, line in found.items() if line}


def _distinct(line: Sequence[_Mark]) -> int:
    return len({mark.x for mark in line})


def _size_axis(axes: "Axes", values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > _LOG_FROM * min(values):
        axes.set_xscale("log")
        _ticks(axes.xaxis, max(values) / min(values))
    axes.xaxis.set_major_formatter(lambda value, _: size_tick(value))


def _cost_axis(axes: "Axes", cost: str, values: Sequence[float]) -> float:
    """Sets up the axis; the value below which nothing is drawn: on a log scale, zero lies there."""
    figure = figure_of(cost)
    assert figure is not None
    positive = [value for value in values if value > 0]
    is_log = figure.log and positive and max(positive) > _LOG_FROM * min(positive)
    if is_log:
        axes.set_yscale("log")
        _ticks(axes.yaxis, max(positive) / min(positive))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    if not is_log:
        return -math.inf
    return min(positive) / 2.5 if len(positive) < len(values) else -math.inf


def _ticks(axis: "Axis", span: float) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 1000 else (1.0,)))
    axis.set_minor_locator(NullLocator())


def size_tick(value: float) -> str:
    """Bytes without digits that say nothing: 95 MB, 1.2 GB."""
    text, _, unit = size(value).partition(" ")
    return f"{float(text):g} {unit}"


def _with_titles(text: str, prefix: str, sweep: Sweep, marks: Iterable[_Mark]) -> str:
    """The picture, with words for each point."""
    for mark in marks:
        head = f'<g id="{prefix}-point-{mark.place}">'
        words = html.escape(f"{settings_words(sweep, mark.point)}: {figures_words(mark.point)}")
        text = text.replace(head, f"{head}<title>{words}</title>", 1)
    return text
