"""Workers of a sweep that make its points in the test's own process."""

from collections.abc import Sequence
from typing import Any

from compress.sweeps.work import Event, Task, make


class Here:
    """Makes points in the test's own process, one at a time, and notes which."""

    made: list[str] = []
    said: list[str] = []

    def __init__(self, *_: Any) -> None:
        self._events: list[Event] = []

    @property
    def free(self) -> int:
        return int(not self._events)

    def start(self, task: Task) -> None:
        Here.made.append(task.name)
        self._events.append(make(task, Here.said.append))

    def events(self, seconds: float) -> Sequence[Event]:
        found, self._events = self._events, []
        return found

    def close(self) -> None:
        pass
