"""What a sweep would do, as a tree: stages that points share once, and what each point adds. Never imports torch."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from compress.errors import ModelError, OutputError, RecipeError
from compress.exports.plan import disk_bytes, export_bytes
from compress.report.figures import duration
from compress.runs.foreseen import foreseen_result
from compress.runs.plan import RunPlan, plan_run
from compress.sweeps.points import Planned
from compress.system.fingerprint import fingerprint
from compress.system.units import size


@dataclass
class Node:
    """A stage, behind those above it."""

    key: str
    title: str
    bytes: int
    points: list[str] = field(default_factory=list)
    children: "dict[str, Node]" = field(default_factory=dict)


def plan_points(points: Sequence[Planned], folder: Path, models: dict[str, Path]) -> dict[str, RunPlan]:
    """Check each point against the model, and what it exports.

    Args:
        points: all.
        folder: the model's.
        models: folders of other models that stages name.

    Raises:
        RecipeError: every problem of every point.
    """
    plans, problems = {}, []
    for point in points:
        try:
            plans[point.name] = plan = plan_run(point.recipe, folder, models)
            if plan.recipe.export:
                from compress.runs.exported import check_exports  # here, because it imports torch

                check_exports(plan)
            if plan.recipe.writes_gguf:
                from compress.runs.gguf_file import planned_files  # likewise

                planned_files(plan)
        except RecipeError as error:
            problems += [f"{point.name}: {problem}" for problem in error.problems]
        except (ModelError, OutputError) as error:
            problems.append(f"{point.name}: {error}")
    if problems:
        raise RecipeError(problems)
    return plans


def chain(plan: RunPlan) -> list[str]:
    """A key for each stage and all before it: equal keys are the same work."""
    text = plan.text.model_dump(mode="json") if plan.calibrates else None
    keys: list[str] = []
    for spec in plan.specs:
        used = text if spec.calibrates else None
        keys.append(fingerprint(keys[-1:], spec.identity(), used))
    return keys


def tree(plans: dict[str, RunPlan]) -> dict[str, Node]:
    """The stages of all points, shared ones once."""
    roots: dict[str, Node] = {}
    for name, plan in plans.items():
        level = roots
        for key, part in zip(chain(plan), plan.parts, strict=True):
            spec, foreseen = part.plan.spec or part.spec, part.plan.forecast
            disk = 0 if foreseen is None else foreseen.disk_bytes or 0
            node = level.setdefault(key, Node(key, spec.title, disk))
            node.points.append(name)
            level = node.children
    return roots


def lines(points: Sequence[Planned], plans: dict[str, RunPlan], finished: Mapping[str, float]) -> list[str]:
    """What a dry run prints: the tree, and what it comes to.

    Args:
        points: of the sweep.
        plans: theirs.
        finished: seconds of those that are done, by name.
    """
    roots = tree(plans)
    settings = {
        point.name: {
            f"{path}={value}"
            for path, value in point.settings.items()
            if path != "name" and isinstance(value, str | int | float)
        }
        for point in points
    }
    found: list[str] = []

    def walk(nodes: dict[str, Node], depth: int, said: set[str]) -> None:
        for node in nodes.values():
            common = set.intersection(*(settings[name] for name in node.points)) - said
            mine = f" ({', '.join(sorted(common))})" if common else ""
            shared = f", once for {len(node.points)} points" if len(node.points) > 1 else ""
            leaf = "" if node.children else f" -> {', '.join(node.points)}"
            done = ", finished before" if set(node.points) <= finished.keys() else ""
            found.append(f"{'  ' * depth}{node.title}{mine}: about {size(node.bytes)} on disk{shared}{leaf}{done}")
            walk(node.children, depth + 1, said | common)

    walk(roots, 0, set())
    every = sum(len(plan.parts) for plan in plans.values())
    once = len(found)
    exports, disk = _exports(plans.values())
    disk += sum(node.bytes for node in _all(roots))
    results = sum(plan.stages[-1].shapes.bytes for plan in plans.values() if plan.stages[-1].shapes is not None)
    further = f", their exports about {size(exports)}" if exports else ""
    return [
        *found,
        f"{len(plans)} points, {once} stages to make instead of {every}; the base is measured once",
        f"disk: about {size(disk)} in the work folder while it runs; the {len(plans)} checkpoints are {size(results)}"
        f"{further}",
        f"time: {_time(len(plans) - len(finished), sorted(finished.values()))}",
    ]


def _exports(plans: Iterable[RunPlan]) -> tuple[int, int]:
    """Bytes of all points' exports, and those that they want in the work folder; no two points share one."""
    written = wanted = 0
    for plan in plans:
        for spec in plan.recipe.export:
            result = foreseen_result(plan)
            written, wanted = written + export_bytes(spec, result), wanted + disk_bytes(spec, result)
    return written, wanted


def _time(left: int, taken: Sequence[float]) -> str:
    """How long the points that are left take, one at a time, by those that are done."""
    if not taken:
        return "not known before the first point is made; further ones take less, by what they share"
    if not left:
        return "nothing is left to make"
    return f"about {duration(left * median(taken))} for the {left} that are left, one at a time, as the others took"


def _all(nodes: dict[str, Node]) -> list[Node]:
    return [each for node in nodes.values() for each in (node, *_all(node.children))]
