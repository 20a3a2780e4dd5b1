"""Where training stands, and how long it will take: what the loop keeps beside each state, and what it foresees."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

_FIRST = 8  # steps after which the whole is foreseen; the first half of them may compile


@dataclass
class Progress:
    """Where training stands, and what has been seen: kept beside each state."""

    step: int = 0
    slower: float = 1.0  # factor of the rate
    scored: int = 0
    seconds: float = 0.0  # of the steps up to here
    earlier: float = 0.0  # seconds that earlier processes trained, measured and saved
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    rolled_back: list[int] = field(default_factory=list)
    stopped: str | None = None
    ended: bool = False

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best measurement."""
        return best_of(self.held_out)


def best_of(held_out: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Step and loss of the best measurement; of equals the later one."""
    return min(reversed(held_out), key=lambda each: each[1], default=None)


def pairs(rows: Sequence[Sequence[Any]]) -> list[tuple[int, float]]:
    """Pairs of (step, value), as they were before they went through JSON."""
    return [(int(step), float(value)) for step, value in rows]


class Foresight:
    """Foresees from the first steps how long all of them take.

    Args:
        left: steps that are to be done from here on.
        evaluate_every: steps between two measurements.

    Attributes:
        seconds: from here to the end, once that is foreseen.
    """

    def __init__(self, left: int, evaluate_every: int) -> None:
        self.seconds: float | None = None
        self._left, self._every, self._began = left, evaluate_every, time.monotonic()
        self._steps: list[float] = []
        self._measurement = 0.0

    def took(self, seconds: float) -> None:
        """A step is done."""
        self._steps.append(seconds)
        done = len(self._steps)
        if self.seconds is None and done == min(_FIRST, max(2, self._left // 4)):
            left = self._left - done
            later = left * median(self._steps[done // 2 :]) + -(-left // self._every) * self._measurement
            self.seconds = time.monotonic() - self._began + later

    def measured(self, seconds: float) -> None:
        """The loss on what is held out has been measured."""
        self._measurement = seconds
