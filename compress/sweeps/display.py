"""What a user sees of a sweep under way: a table kept up to date on a terminal, a line for each point elsewhere."""

import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType

from rich.live import Live
from rich.table import Table
from rich.text import Text

from compress.report.figures import duration
from compress.report.frontier import FIGURES
from compress.sweep_records import Point, Sweep
from compress.system import interrupts
from compress.system.progress import Reporter

_SHOWN = ("bytes", "kl", "perplexity")
_MOST_ROWS = 24
_PLAIN_INTERVAL = 10.0  # seconds between plain lines of a point


class Board:
    """The points of a sweep, with what each is at, those on the frontier so far, and the time that is left.

    Args:
        reporter: where to say it.
        record: gives the sweep as it stands.
    """

    def __init__(self, reporter: Reporter, record: Callable[[], Sweep]) -> None:
        self._reporter, self._record = reporter, record
        self._at: dict[str, str] = {}
        self._began = time.monotonic()
        self._ended: list[float] = []
        self._said: dict[str, float] = {}  # when each point last had a plain line
        live = reporter.console.is_terminal and not reporter.quiet
        self._live = Live(console=reporter.console, refresh_per_second=4, transient=True) if live else None

    def said(self, name: str, text: str) -> None:
        """What a point says on the way."""
        self._at[name] = text.strip().splitlines()[-1] if text.strip() else ""
        now = time.monotonic()
        if self._live is None and now - self._said.get(name, self._began) >= _PLAIN_INTERVAL:
            self._said[name] = now
            self._reporter.say(f"{name}: {self._at[name]}")

    def ended(self, point: Point) -> None:
        """A point is done, or has failed."""
        if point.status == "done":
            self._ended.append(point.seconds or 0.0)
        if self._live is not None:
            return
        sweep = self._record()
        count = sum(each.status in ("done", "failed") for each in sweep.points)
        said = f"done in {duration(point.seconds or 0)}{_figures(point)}" if point.status == "done" else "failed"
        if point.error:
            said += f": {point.error}"
        mark = ", on the frontier" if point.on_frontier else ""
        self._reporter.say(f"[{count}/{len(sweep.points)}] {point.name}: {said}{mark}{self._left(sweep)}")

    def refresh(self) -> None:
        """Show how things stand; Ctrl-C stops the sweep here."""
        interrupts.check()
        if self._live is not None:
            self._live.update(self._table(self._record()))

    def _left(self, sweep: Sweep) -> str:
        """How much time the points that are left take, by those that are done."""
        left = sum(each.status in ("waiting", "running") for each in sweep.points)
        if not left or not self._ended:
            return ""
        busy = max(1, sum(each.status == "running" for each in sweep.points))
        return f"; about {duration(left * sum(self._ended) / len(self._ended) / busy)} left"

    def _table(self, sweep: Sweep) -> Table:
        counts = Counter(point.status for point in sweep.points)
        title = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        table = Table(title=f"{sweep.name}: {title}{self._left(sweep)}", box=None, title_justify="left", pad_edge=False)
        for head in ("", "point", *(FIGURES[name].label for name in _SHOWN), "at"):
            table.add_column(head)
        order = {"running": 0, "failed": 1, "done": 2, "waiting": 3}
        for point in sorted(sweep.points, key=lambda each: order[each.status])[:_MOST_ROWS]:
            mark = "*" if point.on_frontier else {"running": ">", "failed": "x"}.get(point.status, "")
            shown = [FIGURES[name].show(point.figures[name]) if name in point.figures else "" for name in _SHOWN]
            at = point.error or (self._at.get(point.name, "") if point.status == "running" else point.status)
            table.add_row(mark, point.name, *shown, Text(at, overflow="ellipsis", no_wrap=True))
        return table

    def __enter__(self) -> "Board":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _figures(point: Point) -> str:
    shown = [(FIGURES[name], point.figures[name]) for name in _SHOWN if name in point.figures]
    said = [f"{figure.label} {figure.show(value)}" for figure, value in shown]
    return f" ({', '.join(said)})" if said else ""
