"""One point's work, wherever it is done, and what those who do it look like to the one who hands it out."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import compress
from compress.errors import DscompressError
from compress.system.progress import Reporter


@dataclass(frozen=True)
class Task:
    """A point to be made.

    Args:
        name: the point's.
        recipe: its recipe, as JSON can hold it, with absolute paths.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work: the work folder, which all points share.
        version: of dscompress, which must be the worker's too.
    """

    name: str
    recipe: dict[str, Any]
    device: str
    work: str
    version: str = compress.__version__


@dataclass(frozen=True)
class Event:
    """What became of a point, or what it says while it is made.

    Args:
        name: the point's.
        kind: `said` on the way; `done` with a report in its output; `failed` by an error; `lost` with its worker, which
            may be tried again.
        text: a line: what was said, or why it failed.
        seconds: that it took.
    """

    name: str
    kind: Literal["said", "done", "failed", "lost"]
    text: str = ""
    seconds: float = 0.0


class Workers(Protocol):
    """Those who make points: processes here, or Ray's."""

    @property
    def free(self) -> int:
        """How many more points can be begun now."""

    def start(self, task: Task) -> None:
        """Begin a point; there is a free worker."""

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened since the last call; waits at most so long for something to happen."""

    def close(self) -> None:
        """Stop all, whatever they are at."""


class Saying(Reporter):
    """A reporter whose lines somebody else gets."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def say(self, text: str) -> None:
        """A line."""
        self._say(text)

    def warn(self, text: str) -> None:
        """A warning: kept for the report too."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._say(f"warning: {text}")


def make(task: Task, say: Callable[[str], None]) -> Event:
    """Make a point in this process: done or failed, never an exception.

    Args:
        task: the point.
        say: gets what a user would read.
    """
    began = time.monotonic()

    def ended(kind: Literal["done", "failed"], text: str = "") -> Event:
        return Event(task.name, kind, text, time.monotonic() - began)

    if task.version != compress.__version__:
        return ended(
            "failed",
            f"the worker has dscompress {compress.__version__} and the sweep {task.version}; install the same on both",
        )
    try:
        compress.run(task.recipe, device=task.device, work_dir=task.work, reporter=Saying(say))
    except DscompressError as error:
        return ended("failed", str(error))
    except Exception as error:  # a point must not stop the others
        say(traceback.format_exc())
        return ended("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    return ended("done")
