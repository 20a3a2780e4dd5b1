"""Typed records of a sweep: `sweep.json`, its points and what each came to.

Figures go by the names of `compress.report.frontier`; one that is not there was not measured.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from compress.record_types import Typed

SWEEP = "sweep.json"
Status = Literal["waiting", "running", "done", "failed"]


class Point(Typed):
    """One recipe of a sweep.

    `settings` are the values that make it this point, by their paths in the recipe. `key` is a digest of the recipe,
    the model and the texts: what is finished under another one is made again. `folder` holds checkpoint and report,
    relative to the sweep's (absolute for what lies elsewhere); `kept` says whether the weights are still there.
    `seconds` is what this point took here, with work that it shared and found done left out. `on_frontier`: no other
    point is both smaller and closer to the base.
    """

    name: str
    settings: dict[str, Any]
    folder: str
    key: str
    status: Status = "waiting"
    error: str | None = None
    seconds: float | None = None
    figures: dict[str, float] = {}
    warnings: list[str] = []
    on_frontier: bool = False
    kept: bool = True


class Searched(Typed):
    """What a search looked for, and found: `best` is a point's name, `note` how it ended, in words."""

    over: str
    goal: str
    subject_to: dict[str, float]
    best: str | None = None
    note: str = ""


class Sweep(Typed):
    """`sweep.json`. `axes` are the paths that differ between points; `base` has the figures of the model itself."""

    name: str
    model: str
    axes: list[str]
    recipe: dict[str, Any] = {}
    points: list[Point]
    base: dict[str, float] = {}
    protocol: str | None = None
    search: Searched | None = None
    created: str
    seconds: Annotated[float, Field(ge=0)] = 0.0
    version: str
