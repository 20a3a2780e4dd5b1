"""Paired statistics against exact sums, published figures, scipy-free references and simulation."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.evaluation import paired
from compress.evaluation.paired import (
    LEVEL,
    bootstrap_interval,
    compare_scores,
    holm,
    mcnemar,
    power,
    sign_flip,
    smallest_difference,
    tango_interval,
)

FLIPS = st.integers(0, 60)


@given(FLIPS, FLIPS)
def test_mcnemar_is_the_exact_binomial_test(wrong: int, right: int) -> None:
    flips = wrong + right
    tail = sum(Fraction(math.comb(flips, k), 2**flips) for k in range(min(wrong, right) + 1))
    assert mcnemar(wrong, right) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-12)
    assert mcnemar(wrong, right) == mcnemar(right, wrong)


def test_mcnemar_of_many_flips_is_the_normal_test_with_continuity() -> None:
    wrong, right = 40_400, 39_600
    z = (wrong - right - 1) / math.sqrt(wrong + right)
    assert mcnemar(wrong, right) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_published_example() -> None:
    """Airway hyper-responsiveness (Bentur et al. 2009) in Fagerland et al. 2014, 21 pairs, 1 and 7 flips."""
    assert mcnemar(1, 7) == pytest.approx(0.0703, abs=5e-5)
    assert tango_interval(7, 1, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)


@settings(deadline=None, max_examples=30)
@given(FLIPS, FLIPS, st.integers(0, 200))
def test_the_interval_is_where_the_score_test_accepts(wrong: int, right: int, same: int) -> None:
    """By another way: the likeliest share of flips beside a difference, found by search and not in closed form."""
    items = wrong + right + same
    if items == 0:
        return
    low, high = tango_interval(wrong, right, items)
    assert -1 <= low <= (right - wrong) / items <= high <= 1
    for bound in (low, high):
        if abs(bound) < 1:
            assert abs(_score_by_search(wrong, right, items, bound)) == pytest.approx(1.96, abs=0.02)


def _score_by_search(wrong: int, right: int, items: int, delta: float) -> float:
    shares = np.linspace(max(0.0, -delta), (1 - delta) / 2, 200_001)[1:-1]
    likelihood = wrong * np.log(shares) + (items - wrong - right) * np.log(1 - 2 * shares - delta)
    likelihood = likelihood + (right * np.log(shares + delta) if right else 0)
    share = shares[likelihood.argmax()]
    return float((right - wrong - items * delta) / math.sqrt(items * (2 * share + delta - delta**2)))


@pytest.mark.parametrize("items", [40, 300])
@pytest.mark.parametrize(("wrong", "right"), [(0.02, 0.02), (0.1, 0.05), (0.2, 0.2)])
def test_the_interval_holds_the_truth_19_times_of_20(items: int, wrong: float, right: float) -> None:
    generator, held = np.random.default_rng(1), 0
    for flips in generator.multinomial(items, [wrong, right, 1 - wrong - right], size=400):
        low, high = tango_interval(int(flips[0]), int(flips[1]), items)
        held += low <= right - wrong <= high
    assert held / 400 > 0.93


@pytest.mark.parametrize("flips", [0.005, 0.02, 0.1, 0.4])
def test_no_loss_is_claimed_of_models_that_are_equally_good(flips: float) -> None:
    """400 comparisons of two models on 1000 items. A test of both sides claims a loss half as often as its level."""
    generator = np.random.default_rng(0)
    counts = generator.binomial(1000, flips, 400)
    wrongs = generator.binomial(counts, 0.5)
    pairs = list(zip(wrongs.tolist(), (counts - wrongs).tolist(), strict=True))
    assert sum(mcnemar(wrong, right) <= LEVEL and wrong > right for wrong, right in pairs) <= 20


def test_the_error_rate_is_never_above_the_level() -> None:
    """By counting all ways in which so many flips may go."""
    for flips in range(0, 300, 7):
        chances = [math.comb(flips, wrong) / 2**flips for wrong in range(flips + 1)]
        assert sum(c for wrong, c in enumerate(chances) if mcnemar(wrong, flips - wrong) <= LEVEL) <= LEVEL


@pytest.mark.parametrize("flips", [0.05, 0.3])
def test_no_loss_is_claimed_of_equally_good_models_with_scores_between(
    flips: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paired, "DRAWS", 1000)
    generator = np.random.default_rng(0)
    changes = generator.normal(0, 0.2, (400, 150)) * (generator.random((400, 150)) < flips)
    assert sum(sign_flip(change) <= LEVEL and change.sum() < 0 for change in changes) <= 20


@pytest.mark.parametrize(("items", "flips"), [(100, 0.1), (500, 0.02), (500, 0.0), (2500, 0.03), (200, 0.3), (20, 0.1)])
def test_the_smallest_difference_is_found_in_4_of_5_cases(items: int, flips: float) -> None:
    smallest = smallest_difference(items, flips)
    assert smallest is not None
    share = max(flips, smallest)
    generator, found = np.random.default_rng(0), 0
    counts = generator.binomial(items, share, 4000)
    wrongs = generator.binomial(counts, min(1.0, (share + smallest) / (2 * share)))
    for count, wrong in zip(counts.tolist(), wrongs.tolist(), strict=True):
        found += 2 * wrong > count and mcnemar(wrong, count - wrong) <= LEVEL
    assert found / 4000 == pytest.approx(0.8, abs=0.025)


def test_few_items_show_nothing() -> None:
    """Five flips of five are as likely as 1 in 16 by chance."""
    assert mcnemar(5, 0) == 0.0625
    assert smallest_difference(5, 0.0) is None
    assert power(5, 1.0, 1.0) == 0.0
    assert compare_scores([1.0] * 4, [0.0] * 4).smallest is None


def test_more_items_show_less_and_more_flips_hide_more() -> None:
    found = [smallest_difference(items, 0.05) for items in (50, 200, 1000, 5000)]
    assert found == sorted(found, key=lambda value: -(value or 1))
    hidden = [smallest_difference(1000, flips) for flips in (0.0, 0.02, 0.1, 0.4)]
    assert hidden == sorted(hidden, key=lambda value: value or 1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
@settings(deadline=None, max_examples=50)
def test_right_and_wrong_are_compared_by_their_flips(answers: list[tuple[int, int]]) -> None:
    base, compressed = ([float(pair[side]) for pair in answers] for side in (0, 1))
    found = compare_scores(base, compressed)
    wrong, right = (sum(pair == flip for pair in answers) for flip in ((1, 0), (0, 1)))
    assert found.flips == (wrong, right)
    assert found.p_value == mcnemar(wrong, right)
    assert found.ci95 == tango_interval(wrong, right, len(answers))
    assert found.delta == pytest.approx((right - wrong) / len(answers))


def test_a_model_compared_with_itself_shows_no_difference() -> None:
    found = compare_scores([1.0, 0.0, 1.0] * 100, [1.0, 0.0, 1.0] * 100)
    assert (found.delta, found.p_value, found.flips) == (0.0, 1.0, (0, 0))
    assert found.ci95[0] < 0 < found.ci95[1]
    between = compare_scores([0.3, 0.7] * 50, [0.3, 0.7] * 50)
    assert (between.delta, between.p_value, between.ci95, between.smallest) == (0.0, 1.0, (0.0, 0.0), None)


def test_signs_are_flipped_as_mcnemar_counts_them() -> None:
    changes = np.array([-1.0] * 14 + [1.0] * 4 + [0.0] * 100)
    assert sign_flip(changes) == pytest.approx(mcnemar(14, 4), abs=0.006)
    assert sign_flip(-changes) == sign_flip(changes)


def test_the_bootstrap_interval_is_as_wide_as_the_mean_is_uncertain() -> None:
    changes = np.random.default_rng(3).normal(0.1, 0.5, 400)
    low, high = bootstrap_interval(changes)
    error = changes.std(ddof=1) / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.06)
    assert (high + low) / 2 == pytest.approx(changes.mean(), abs=0.1 * error)


def test_holm() -> None:
    """Holm 1979: the smallest times the number of tests, the next times one less, never falling."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
