"""Writes what a sweep came to: `sweep.json`, `sweep.md`, `sweep.html` and `sweep.png`, all with the same figures.

Each file appears whole or not at all. The page holds its style, its pictures and the few lines of script that sort and
filter its table, and loads nothing; without script the table is whole.
"""

import contextlib
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.errors import OutputError
from compress.report import card
from compress.report.figures import duration, number, perplexity
from compress.report.frontier import figure_of
from compress.report.pages import environment, write
from compress.report.paths import without_folders
from compress.report.sweep_table import (
    columns,
    costs,
    done,
    figures_words,
    is_numeric,
    label,
    one_line,
    rows,
    settings_words,
    shown_axes,
    table,
)
from compress.sweep_records import Point, Searched, Sweep
from compress.system.units import size

__all__ = ["table", "verdict", "write_sweep"]

_CLOSE_KL = 0.1  # nats per token: what a sweep's result is called close by
_CLOSE_PERPLEXITY = 1.1  # times the base's


def write_sweep(sweep: Sweep, folder: Path, stem: str = "sweep") -> None:
    """Writes STEM.json, STEM.md, STEM.html and STEM.png into `folder`, which exists.

    There is no picture where no point was evaluated; one from before goes.

    Raises:
        OutputError: a file can't be written there.
    """
    from markupsafe import Markup

    from compress.report import sweep_plots

    picture = sweep_plots.png(sweep)
    view = _view(sweep, folder, stem) | {"picture": picture is not None}
    plots = [(label(cost), sweep_plots.frontier_plot(sweep, cost)) for cost in costs(sweep)]
    pictures = {
        "frontier_plots": [(title, Markup(svg)) for title, svg in plots if svg],
        "axis_plots": [(title, Markup(svg)) for title, svg in sweep_plots.axis_plots(sweep)],
    }
    templates = environment()
    css = "".join(templates.get_template(name).render() for name in ("report.css", "sweep.css"))
    page = templates.get_template("sweep.html.jinja").render(view | pictures, css=Markup(css))
    write(folder / f"{stem}.json", sweep.model_dump_json(indent=2) + "\n")
    write(folder / f"{stem}.md", templates.get_template("sweep.md.jinja").render(view))
    write(folder / f"{stem}.html", page)
    if picture is not None:
        write(folder / f"{stem}.png", picture)
    else:
        _remove(folder / f"{stem}.png")


def verdict(sweep: Sweep) -> str:
    """What came of it in one line of plain words: how many points, and which to take."""
    states = [point.status for point in sweep.points]
    best = sum(point.on_frontier for point in sweep.points)
    numbers = [
        (best, "on the frontier"),
        *((states.count(status), status) for status in ("failed", "running", "waiting")),
    ]
    parts = [f"{len(states)} point{'' if len(states) == 1 else 's'}"]
    parts += [f"{count} {words}" for count, words in numbers if count]
    return f"{', '.join(parts)}; {_to_take(sweep)}."


def _to_take(sweep: Sweep) -> str:
    """The smallest point that is close to the base, or how close the closest is."""
    points = [point for point in done(sweep) if math.isfinite(point.figures.get("bytes", math.nan))]
    if not points:
        return "none is done yet" if any(p.status in ("waiting", "running") for p in sweep.points) else "none is done"
    smallest = min(points, key=lambda point: point.figures["bytes"])
    cost = next((name for name in costs(sweep) if name in ("kl", "perplexity")), None)
    if not costs(sweep):
        return f"the smallest is {_at(smallest)}; what that cost in accuracy was not evaluated"
    if cost is None or (cost == "perplexity" and cost not in sweep.base):
        return f"the smallest is {_at(smallest)}"
    limit, words = _CLOSE_KL, f"KL {_CLOSE_KL:g} of the base"
    if cost == "perplexity":
        limit, words = _CLOSE_PERPLEXITY * sweep.base[cost], "10 % of the base's perplexity"
    measured = [point for point in points if math.isfinite(point.figures.get(cost, math.nan))]
    close = [point for point in measured if point.figures[cost] <= limit]
    if close:
        found = min(close, key=lambda point: (point.figures["bytes"], point.figures[cost]))
        return f"smallest within {words}: {_at(found)}"
    closest = min(measured, key=lambda point: point.figures[cost])
    shown = f"KL {number(closest.figures[cost])}" if cost == "kl" else f"perplexity {perplexity(closest.figures[cost])}"
    return f"none is within {words}; the closest is {_at(closest)}, {shown}"


def _at(point: Point) -> str:
    return f"{one_line(point.name)} at {size(point.figures['bytes'])}"


def _named(point: Point) -> str:
    return f"{one_line(point.name)} ({figures_words(point)})"


def _view(sweep: Sweep, folder: Path, stem: str) -> dict[str, Any]:
    """What the templates read."""
    heads, texts = table(sweep)
    names = columns(sweep)
    numeric = [False, *(is_numeric(sweep, axis) for axis in shown_axes(sweep)), *[True] * len(names)]
    return {
        "sweep": sweep,
        "model": without_folders(sweep.model),
        "stem": stem,
        "kind": "comparison" if stem == "compare" else stem,
        "verdict": verdict(sweep),
        "search": _search_facts(sweep, sweep.search) if sweep.search else [],
        "heads": heads,
        "shown": heads[: len(numeric)],  # the page says in a figure's place what became of a point
        "numeric": numeric + [False] * (len(heads) - len(numeric)),
        "figures": len(names),
        "rows": [
            (row, cells[1:], _link(row.point, folder), settings_words(sweep, row.point) if row.point else "")
            for row, cells in zip(rows(sweep), texts, strict=True)
        ],
        "warnings": _warnings(sweep),
        "axes": sweep.axes,
        "seconds": duration(sweep.seconds),
        "recipe_yaml": card.as_yaml(sweep.recipe) if sweep.recipe else "",
    }


def _search_facts(sweep: Sweep, search: Searched) -> list[tuple[str, str]]:
    """What was looked for, and found: labels and words."""
    limits = []
    for name, limit in search.subject_to.items():
        figure = figure_of(name)
        side = "at least" if figure and figure.larger_is_better else "at most"
        limits.append(f"{label(name)} {side} {figure.show(limit) if figure else f'{limit:g}'}")
    best = next((point for point in sweep.points if point.name == search.best), None)
    found = search.best or "nothing" if best is None else _named(best)
    facts = [
        ("Searched for", search.goal),
        ("Limits", ", ".join(limits)),
        ("By varying", search.over),
        ("Found", found),
    ]
    facts += [("How it ended", search.note)] if search.note else []
    return [(name, one_line(words)) for name, words in facts]


def _warnings(sweep: Sweep) -> list[tuple[str, list[str]]]:
    """Each warning with the points that have it."""
    found: dict[str, list[str]] = {}
    for point in sweep.points:
        for line in point.warnings:
            found.setdefault(line, []).append(point.name)
    return list(found.items())


def _link(point: Point | None, folder: Path) -> str:
    """The address of a point's report, empty where there is none; a file's, whatever its folder is called."""
    if point is None or point.status != "done":
        return ""
    place = Path(point.folder) / "report.html"
    if place.is_absolute() and not place.is_file():  # any checkpoint may stand in a comparison
        return ""
    return quote(re.sub("^/+", "/", place.as_posix()))


def _remove(path: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    except OSError as error:
        raise OutputError(
            f"{path}: can't be removed ({error.strerror or error}); remove it or choose another output folder"
        ) from error
