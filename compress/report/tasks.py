"""What base and result did in benchmark tasks, and whether the result is worse, as reports show it."""

from dataclasses import dataclass

from compress.records import Report
from compress.report.figures import percent, points
from compress.task_records import Task, TaskDecision

TASK_HEADS = [
    "Task", "Metric", "Items", "Examples", "Base", "Compressed", "Change (95 %)", "p", "p, corrected",
    "Turned wrong / right", "Smallest drop to be found",
]  # fmt: skip


@dataclass(frozen=True)
class TasksView:
    """The section `Tasks`.

    Args:
        words: the decision over all tasks.
        protocol: how it was measured, and what the columns mean.
        rows: of `TASK_HEADS`, one for each task.
    """

    words: str
    protocol: str
    rows: list[list[str]]


def tasks_view(report: Report) -> TasksView | None:
    """The section, where tasks were evaluated."""
    quality = report.quality
    if quality is None or quality.task_decision is None:
        return None
    decision = quality.task_decision
    protocol = (
        f"{decision.protocol} Decided by {decision.method}, at an error rate of {percent(decision.level)}: half "
        "of it for a loss where there is none, half for a gain. Intervals "
        "are Tango's score interval for right and wrong, a bootstrap otherwise; corrected p-values are Holm's. "
        "The smallest drop is the one that this many items would have shown in 4 of 5 cases. Items are taken to be "
        "independent."
    )
    skipped = "".join(f" {name} was not run: it {why}." for name, why in decision.skipped.items())
    rows = [_row(name, task) for name, task in quality.tasks.items()]
    return TasksView(_words(quality.tasks, decision), protocol + skipped, rows)


def tasks_line(report: Report) -> str:
    """The decision in one line for the terminal; empty where no tasks were evaluated."""
    view = tasks_view(report)
    return "" if view is None else view.words


def _row(name: str, task: Task) -> list[str]:
    wrong, right = task.flips or (None, None)
    return [
        name,
        task.metric or "–",
        f"{task.n:,}",
        "–" if task.fewshot is None else str(task.fewshot),
        percent(task.base),
        percent(task.compressed),
        points(task.delta) + ("" if task.ci95 is None else f" ({_bounds(task.ci95)})"),
        _p_value(task.p_value),
        _p_value(task.holm),
        "–" if wrong is None else f"{wrong} / {right}",
        _drop(task.smallest),
    ]


def _words(tasks: dict[str, Task], decision: TaskDecision) -> str:
    """What was found, what of it counts, and what would have been found."""
    wrong, right = decision.flips
    turned = "turned wrong" if decision.method.startswith("McNemar") else "scored less"
    other = "right" if decision.method.startswith("McNemar") else "more"
    seen = f"over {decision.n:,} items {wrong} {turned} and {right} {other} (p {_p(decision.p_value)})"
    head = {
        "worse": f"A loss: {seen}, {points(decision.delta)} (95 %: {_bounds(decision.ci95)})",
        "better": f"A gain: {seen}, {points(decision.delta)} (95 %: {_bounds(decision.ci95)})",
        "no difference shown": f"No loss shown: {seen}; {_power(decision)}",
    }[decision.verdict]
    return f"{head}.{_worst(tasks)}"


def _power(decision: TaskDecision) -> str:
    if decision.smallest is None:
        return "so few items would have shown no drop at all"
    return f"a drop of {100 * decision.smallest:.1f} points or more would have been found in 4 of 5 cases"


def _worst(tasks: dict[str, Task]) -> str:
    """The task that fell most surely, with its p-value corrected for how many there are."""
    fell = {name: task for name, task in tasks.items() if task.delta < 0 and task.holm is not None}
    if len(tasks) < 2 or not fell:
        return ""
    name, task = min(fell.items(), key=lambda item: (item[1].p_value or 0.0, item[1].delta))
    assert task.holm is not None
    return f" Worst task: {name}, {points(task.delta)} (p {_p(task.holm)}, corrected for {len(tasks)} tasks)."


def _bounds(bounds: tuple[float, float]) -> str:
    return f"{100 * bounds[0]:+.1f} to {100 * bounds[1]:+.1f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"= {_p_value(value)}"


def _p_value(value: float | None) -> str:
    """Two significant digits: 0.82, 0.0031, 2.4e-07."""
    return "–" if value is None else f"{value:.2g}"


def _drop(smallest: float | None) -> str:
    return "none" if smallest is None else f"{100 * smallest:.1f} points"
