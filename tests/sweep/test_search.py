"""Bisection finds where limits are crossed, in few points, and says when it can't."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.recipe.sweep import Search
from compress.sweeps.search import Bisection

Curve = Callable[[float], float]
RANGE = [0.05, 0.6]


def search(curve: Curve, limit: float = 0.1, **more: object) -> Bisection:
    given = {"maximize": "sparsity", "over": "x", "range": RANGE, "subject_to": {"kl": limit}, "points": 40}
    found = Bisection(Search.model_validate(given | more))
    while (value := found.next()) is not None:
        assert RANGE[0] <= value <= RANGE[1]
        found.tell(value, {"kl": curve(value), "sparsity": value})
    return found


@given(power=st.floats(1.0, 5.0), scale=st.floats(0.2, 10.0), offset=st.floats(0.0, 0.02))
def test_it_finds_the_crossing_within_the_tolerance(power: float, scale: float, offset: float) -> None:
    def kl(x: float) -> float:
        return scale * x**power + offset

    found = search(kl, tolerance=0.005)
    best = found.best()
    if kl(RANGE[0]) > 0.1:
        assert best is None and "neither end of the range keeps to" in found.note()
    elif kl(RANGE[1]) <= 0.1:
        assert best is not None and best.value == RANGE[1] and len(found.tried) == 2
    else:
        crossing = ((0.1 - offset) / scale) ** (1 / power)
        assert best is not None and best.value <= crossing * (1 + 1e-9) and crossing - best.value <= 0.005 * 1.001
        assert len(found.tried) <= 9


@pytest.mark.parametrize("curve", [lambda x: 0.5 * x, lambda x: 2 * x**3, lambda x: 0.004 * math.exp(9 * x)])
def test_a_smooth_curve_takes_at_most_seven_points(curve: Curve) -> None:
    assert len(search(curve, tolerance=0.005).tried) <= 7


@given(steps=st.integers(3, 60), power=st.floats(1.0, 4.0))
def test_steps_of_widths_do_not_mislead_it(steps: int, power: float) -> None:
    def kl(x: float) -> float:
        return 2 * (math.floor(x * steps) / steps) ** power + 1e-6

    found = search(kl, tolerance=0.01)
    if kl(RANGE[1]) > 0.1 >= kl(RANGE[0]):
        best = found.best()
        assert best is not None and kl(best.value) <= 0.1
        assert kl(min(best.value + 0.0101, RANGE[1])) > 0.1


def test_of_values_with_the_same_result_the_one_at_the_crossing_is_best() -> None:
    """Widths are multiples of 64: several sparsities give one shape."""
    found = Bisection(Search(maximize="sparsity", over="x", range=[0.0, 1.0], subject_to={"kl": 0.1}, tolerance=0.01))
    while (value := found.next()) is not None:
        shape = int(value * 4) / 4
        found.tell(value, {"kl": 0.05 + 0.2 * shape, "sparsity": shape})
    inside = [each.value for each in found.tried if each.value < 0.5]
    best = found.best()
    assert best is not None and len(inside) > 2 and best.value == max(inside)


def test_whole_numbers_stay_whole() -> None:
    given = {"minimize": "bytes", "over": "x", "range": [2, 16], "subject_to": {"kl": 0.1}}
    found = Bisection(Search.model_validate(given))
    while (value := found.next()) is not None:
        assert value == int(value)
        found.tell(value, {"kl": 1 / value**2, "bytes": value})
    best = found.best()
    assert best is not None and best.value == 4  # 1 / 9 is more than 0.1, 1 / 16 less


def test_several_limits_must_all_be_kept_and_large_is_good_for_some() -> None:
    given = {"maximize": "sparsity", "over": "x", "range": RANGE, "subject_to": {"kl": 1.0, "top1": 0.9}}
    found = Bisection(Search.model_validate(given))
    while (value := found.next()) is not None:
        found.tell(value, {"kl": value, "top1": 1 - value / 2, "sparsity": value})
    best = found.best()
    assert best is not None and 0.2 - 0.0056 <= best.value <= 0.2  # top1 is 0.9 there


def test_a_curve_that_is_not_monotone_ends_it_with_the_best_point_and_what_was_seen() -> None:
    found = search(lambda x: 0.05 if x < 0.1 else 0.02 if x < 0.4 else 0.2)
    note = found.note()
    assert "the figures go up and down (0.05: kl 0.05, " in note and "0.6: kl 0.2" in note
    best = found.best()
    assert best is not None and 0.1 < best.value < 0.4 and len(found.tried) == 3


@pytest.mark.parametrize(("figures", "words"), [({}, "failed"), ({"sparsity": 0.3}, "has no kl")])
def test_a_point_without_the_figure_ends_it(figures: dict[str, float], words: str) -> None:
    given = {"maximize": "sparsity", "over": "x", "range": RANGE, "subject_to": {"kl": 0.1}}
    found = Bisection(Search.model_validate(given))
    found.tell(0.05, {"kl": 0.01, "sparsity": 0.05})
    found.tell(0.6, figures)
    assert found.next() is None and words in found.note()
    best = found.best()
    assert best is not None and best.value == 0.05


def test_it_ends_with_its_points() -> None:
    found = search(lambda x: 2 * x**3, tolerance=1e-9, points=5)
    assert len(found.tried) == 5 and "5 points" in found.note()
