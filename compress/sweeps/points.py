"""From a recipe and the values to vary to the points of a sweep, each an ordinary recipe with an output of its own."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from compress.errors import RecipeError
from compress.recipe.document import Document, split_assignment
from compress.recipe.load import load_recipe
from compress.recipe.messages import did_you_mean
from compress.recipe.schema import Recipe
from compress.recipe.sweep import Search, Sweep
from compress.report.frontier import FIGURES, TASKS, figure_of
from compress.report.sweep_table import path_parts, shortest_ends
from compress.system.fingerprint import fingerprint

POINTS = "points"
_NAME = "name"
_LONGEST = 120
_OWN = ("sweep", "output")


@dataclass(frozen=True)
class Planned:
    """A point before it is made.

    Args:
        name: of its folder and in tables.
        settings: what makes it this point, by paths in the recipe.
        recipe: valid.
    """

    name: str
    settings: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Job:
    """A sweep before it is made.

    Args:
        recipe: what its points start from; its output is the sweep's folder.
        axes: paths that differ.
        points: all of them; those of a search are made as it goes on.
        search: what is searched for.
        at: the point of given settings.
    """

    recipe: Recipe
    axes: Sequence[str]
    points: Sequence[Planned]
    search: Search | None
    at: Callable[[Mapping[str, Any]], Planned]

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.recipe.output)


def load_sweep(
    reference: str,
    *,
    over: Sequence[str] = (),
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | None = None,
) -> Job:
    """Read a recipe and what is varied in it.

    Args:
        reference: path of a YAML file, or the name of a bundled recipe.
        over: `path=value,value` each; all combinations are points. They replace what the recipe says of a sweep.
        overrides: `path=value` each, for all points.
        model: replaces the recipe's.
        output: replaces the recipe's: the sweep's folder.

    Raises:
        RecipeError: every problem of every point, a line each.
    """
    recipe = load_recipe(reference, overrides=overrides, model=model, output=output)
    sweep = _of_options(over) if over else recipe.sweep
    if sweep is None:
        raise RecipeError(
            [
                f"{reference}: says nothing of a sweep; add --over stages.0.PATH=VALUE,VALUE, or a sweep with a grid, "
                "a list or a search"
            ]
        )
    listed = _listed(sweep)
    paths = list(dict.fromkeys(path for settings in listed for path in settings if path != _NAME))
    axes = [path for path in paths if sweep.list is None or _differs(path, listed)]
    parts = path_parts(paths)
    labels = {path: ".".join(parts[path][-count:]) for path, count in shortest_ends(paths).items()}
    common = {"overrides": overrides, "model": model, "output": output}

    def at(settings: Mapping[str, Any]) -> Planned:
        name = _name(settings, labels)
        assignments = [f"{path}={json.dumps(value)}" for path, value in settings.items()]
        made = load_recipe(reference, point=assignments, typed=bool(over), **common)  # type: ignore[arg-type]
        named = made.name if _NAME in settings else f"{made.name} {name}"
        folder = str(Path(recipe.output) / POINTS / name)
        return Planned(name, settings, made.model_copy(update={"name": named, "output": folder, "sweep": None}))

    if sweep.search is not None:
        _check_search(sweep.search)
    points = _all_at_once(listed, at)
    return Job(recipe.model_copy(update={"sweep": sweep}), axes, [] if sweep.search else points, sweep.search, at)


def _of_options(over: Sequence[str]) -> Sweep:
    """The grid that `--over` options mean."""
    document = Document.of({})
    grid: dict[str, list[Any]] = {}
    problems = []
    for option in over:
        try:
            _, values = split_assignment(option)
        except LookupError:
            problems.append(f"--over {option}: is not path=value,value, such as stages.0.bits=3,4")
            continue
        path = option[: len(option) - len(values) - 1].strip()
        if path in grid:
            problems.append(f"--over {option}: {path} is varied twice; write all its values in one option")
        document.override(f"values=[{values}]", f"--over {option}:")
        grid[path] = document.data.get("values") or []
        if not document.problems and not grid[path]:
            problems.append(f"--over {option}: has no values; write them behind the =, with commas")
    found = [text for _, text in document.problems] + problems
    if found:
        raise RecipeError(found)
    return Sweep(grid=grid)


def _listed(sweep: Sweep) -> list[dict[str, Any]]:
    """Settings of each point; the ends of a search's range."""
    if sweep.search is not None:
        return [{sweep.search.over: value} for value in sweep.search.ends]
    rows = sweep.list or []
    if sweep.grid is not None:
        rows = [dict(zip(sweep.grid, values, strict=True)) for values in product(*sweep.grid.values())]
    problems = []
    for number, row in enumerate(rows):
        if row in rows[:number]:
            said = ", ".join(f"{path}={json.dumps(value)}" for path, value in row.items()) or "no settings"
            problems.append(f"sweep: the point {said} is there twice; keep one")
    for path in {path for row in rows for path in row}:
        if re.split(r"[.\[]", path.strip(), maxsplit=1)[0] in _OWN:
            problems.append(f"sweep: {path} can't be varied; it is the sweep's own")
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return rows


def _differs(path: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({json.dumps(row.get(path), sort_keys=True) for row in rows}) > 1


def _name(settings: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """A point's name, which hangs on its settings alone: points that are added later rename none."""
    if _NAME in settings:
        return _safe(str(settings[_NAME]))[:_LONGEST]
    parts = []
    for path, value in settings.items():
        shown = value if isinstance(value, str | int | float | bool) else fingerprint(value)[:8] if value else "null"
        parts.append(f"{labels.get(path, path)}={shown}")
    name = _safe(",".join(parts))
    return name if len(name) <= _LONGEST else fingerprint(dict(settings))[:16]


def _safe(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", text).strip("-.") or "point"


def _all_at_once(rows: Sequence[Mapping[str, Any]], at: Callable[[Mapping[str, Any]], Planned]) -> list[Planned]:
    """The points, or all problems of all of them."""
    points, problems = [], []
    for row in rows:
        try:
            points.append(at(row))
        except RecipeError as error:
            problems += error.problems
    names = [point.name for point in points]
    problems += [
        f"sweep: two points are called {name}; give them other names" for name in names if names.count(name) > 1
    ]
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return points


def _check_search(search: Search) -> None:
    problems = []
    for where, name in [("goal", search.goal), *(("subject_to", name) for name in search.subject_to)]:
        if figure_of(name) is None:
            known = ", ".join([*FIGURES, f"{TASKS}NAME"])
            problems.append(
                f"sweep.search: {where} {name} is no figure of a report{did_you_mean(name, FIGURES)} ({known})"
            )
    if problems:
        raise RecipeError(problems)
