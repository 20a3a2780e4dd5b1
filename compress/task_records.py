"""Typed records of benchmark tasks in `report.json`: each task's scores, and one decision over all of them.

Differences are compressed - base, shares of one.
"""

from typing import Literal

from compress.record_types import Count, Typed

Verdict = Literal["worse", "better", "no difference shown"]


class Task(Typed):
    """One benchmark on the same items by both models.

    `delta` is the difference of the scores, with its paired 95 % interval and the p-value of no difference (McNemar's
    exact test for right and wrong). `flips` are the items that turned wrong and those that turned right, `smallest` is
    the drop that so many items would have shown in 4 of 5 cases. `holm` is the p-value corrected for how many tasks
    there are.
    """

    base: float
    compressed: float
    delta: float
    ci95: tuple[float, float] | None
    p_value: float | None
    n: Count
    metric: str | None = None
    flips: tuple[Count, Count] | None = None
    smallest: float | None = None
    holm: float | None = None
    fewshot: Count | None = None
    version: str | None = None


class TaskDecision(Typed):
    """Whether the result is worse than its base, over all items of all tasks: one test, with error rate `level`.

    `delta` is over all items; `flips`, `smallest` as for a task. `method` and `protocol` say how, in words; `skipped`
    has the tasks that were not run, and why.
    """

    verdict: Verdict
    n: Count
    delta: float
    ci95: tuple[float, float]
    p_value: float
    flips: tuple[Count, Count]
    smallest: float | None
    level: float
    method: str
    protocol: str
    skipped: dict[str, str] = {}
