"""What a user sees while work goes on: bars with rate and time left on a terminal, plain lines anywhere else."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from compress.system import interrupts

_PLAIN_INTERVAL = 10.0  # seconds between plain lines


class Advance(Protocol):
    """Called once per unit."""

    def __call__(self, note: str = "") -> None:
        """One unit is done; the note says how."""


class Reporter:
    """Says what happens, on standard error, so that results alone go to standard output.

    Args:
        quiet: only warnings and errors.
        silent: nothing at all; for all but one of the processes that share a run.
    """

    def __init__(self, quiet: bool = False, silent: bool = False) -> None:
        self.quiet = quiet or silent
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=silent)
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """A line for the user."""
        if not self.quiet:
            self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A warning: shown at once, and kept for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            self.console.print(Text(f"warning: {text}", style="yellow"))

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """Show progress through `total` units; the body calls what it is given once per unit, where Ctrl-C stops it.

        Args:
            title: what is being done.
            total: how many units there are.
            unit: what one is called ("layer").
            done: how many were done before (by an earlier run).
        """
        if self.quiet:
            yield lambda note="": interrupts.check()
        elif self.console.is_terminal:
            columns = (
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn(f"{unit}s"), _Rate(unit), TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
            )  # fmt: skip
            with Progress(*columns, console=self.console, transient=False) as bars:
                task = bars.add_task(title, total=total, completed=done, before=done, note="")

                def advance(note: str = "") -> None:
                    interrupts.check()
                    bars.update(task, advance=1, note=note)

                yield advance
        else:
            yield _PlainTask(self.say, title, total, unit, done).advance


class _Rate(ProgressColumn):
    """Seconds per unit (or units per second) and time left."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["before"]
        if not done or not task.elapsed or task.total is None:
            return Text("")
        return Text(_pace(self.unit, task.elapsed / done, task.total - task.completed))


class _PlainTask:
    """Progress as lines: at most one in ten seconds, and one at the end."""

    def __init__(self, say: Callable[[str], None], title: str, total: int, unit: str, done: int) -> None:
        self.say, self.title, self.total, self.unit = say, title, total, unit
        self.before, self.done = done, done
        self.started = self.said = time.monotonic()

    def advance(self, note: str = "") -> None:
        interrupts.check()
        self.done += 1
        now = time.monotonic()
        if self.done < self.total and now - self.said < _PLAIN_INTERVAL:
            return
        self.said = now
        pace = _pace(self.unit, (now - self.started) / (self.done - self.before), self.total - self.done)
        self.say(f"{self.title}: {self.done}/{self.total} {self.unit}s, {pace}" + (f", {note}" if note else ""))


def _pace(unit: str, seconds: float, left: float) -> str:
    rate = f"{seconds:.2f} s/{unit}" if seconds >= 0.5 else f"{1 / max(seconds, 1e-9):.1f} {unit}s/s"
    return rate if not left else f"{rate}, {_duration(seconds * left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
