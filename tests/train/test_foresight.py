"""How long training takes is foreseen from its first steps; a clock of the test's own says how long each takes."""

import pytest

from compress.train import progress
from compress.train.progress import Foresight


class Clock:
    """Seconds go by where it is told so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def train(clock: Clock, steps: list[float], every: int, measuring: float) -> tuple[float | None, float]:
    """Steps that take so long, measured in front of them and every so many; what was foreseen, and what it took."""
    foresight, began = Foresight(len(steps), every), clock.now
    for number, seconds in enumerate(steps):
        if number % every == 0:
            clock.now += measuring
            foresight.measured(measuring)
        clock.now += seconds
        foresight.took(seconds)
    clock.now += measuring
    return foresight.seconds, clock.now - began


def test_even_steps_are_foreseen_with_what_is_measured_between_them(clock: Clock) -> None:
    foreseen, took = train(clock, [2.0] * 100, every=10, measuring=7.0)
    assert foreseen == pytest.approx(took)


def test_steps_that_compile_do_not_count_for_those_behind(clock: Clock) -> None:
    foreseen, took = train(clock, [60.0, 30.0] + [0.5] * 98, every=50, measuring=0.0)
    assert foreseen == pytest.approx(took)


@pytest.mark.parametrize("steps", [2, 3, 9])
def test_few_steps_are_enough(clock: Clock, steps: int) -> None:
    foreseen, took = train(clock, [1.0] * steps, every=steps, measuring=0.0)
    assert foreseen == pytest.approx(took)


def test_nothing_is_foreseen_of_one_step(clock: Clock) -> None:
    assert train(clock, [1.0], every=1, measuring=0.0)[0] is None
