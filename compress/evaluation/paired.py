"""Statistics of two models on the same items: what a difference of scores is worth. Never imports torch.

An item that both models answer alike says nothing of their difference; those that flip do (Dutta et al. 2024, "Accuracy
is Not All You Need", arXiv:2407.09141). Under the null hypothesis a flip goes either way with the same probability, so
the number that turned wrong is binomial: McNemar's exact test, for one task or for all items of all tasks at once
(Kuebler et al. 2026, "When LLMs get significantly worse", arXiv:2602.10144). Scores that are not 0 or 1 get the
sign-flip test of the same paper, of which McNemar's is the case of right and wrong.

Differences are compressed - base. Items count as independent of each other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Two-sided error rate of every test here, and of the intervals."""
POWER = 0.8
DRAWS = 10_000
SEED = 0

_Z = NormalDist().inv_cdf(1 - LEVEL / 2)
_Z_POWER = NormalDist().inv_cdf(POWER)
_WIDTH = 1e-6  # to which bounds are closed in
_COUNTS = 41  # numbers of flips that a power is summed over


@dataclass(frozen=True)
class Comparison:
    """What two models' scores on the same items say.

    Args:
        items: how many.
        base: mean score.
        compressed: mean score.
        delta: compressed - base.
        ci95: of delta.
        p_value: two-sided, of no difference.
        flips: items that turned wrong and items that turned right; for scores between, those that fell and those that
            rose.
        smallest: the drop that this many items would have shown in 4 of 5 cases; None where no drop would.
    """

    items: int
    base: float
    compressed: float
    delta: float
    ci95: tuple[float, float]
    p_value: float
    flips: tuple[int, int]
    smallest: float | None


def compare_scores(base: Sequence[float], compressed: Sequence[float]) -> Comparison:
    """Compare two models by their scores on the same items, in the same order; more is better.

    Right and wrong (0 and 1) get McNemar's exact test and Tango's interval; other scores a sign-flip test and a
    percentile bootstrap.
    """
    one, other = np.asarray(base, np.float64), np.asarray(compressed, np.float64)
    assert one.shape == other.shape and one.ndim == 1 and len(one)
    change = other - one
    fell, rose, items = int((change < 0).sum()), int((change > 0).sum()), len(one)
    if set(np.unique(np.concatenate([one, other]))) <= {0.0, 1.0}:
        interval, p_value = tango_interval(fell, rose, items), mcnemar(fell, rose)
        smallest = smallest_difference(items, (fell + rose) / items)
    else:
        interval, p_value = bootstrap_interval(change), sign_flip(change)
        smallest = _smallest_mean(change)
    delta = float(change.mean())
    return Comparison(items, float(one.mean()), float(other.mean()), delta, interval, p_value, (fell, rose), smallest)


def mcnemar(wrong: int, right: int) -> float:
    """McNemar's exact test: the two-sided p-value of `wrong` flips one way and `right` the other.

    Twice the smaller tail of a binomial with probability 1/2, 1 at most (Fagerland, Lydersen and Laake 2013).
    """
    return min(1.0, 2 * _tail(min(wrong, right), wrong + right))


def _tail(most: int, flips: int) -> float:
    """P(X <= most) for X binomial of `flips` draws with probability 1/2."""
    return math.fsum(math.exp(_log_binomial(flips, k, 0.5)) for k in range(most + 1))


def tango_interval(wrong: int, right: int, items: int) -> tuple[float, float]:
    """Tango's 95 % score interval of (right - wrong) / items, a difference of two paired proportions.

    It holds every difference that the score test does not reject (Tango 1998, "Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", Statistics in Medicine 17); with flips
    of neither kind it still has a width.
    """
    centre = (right - wrong) / items
    low = _closed_in(lambda delta: _score(wrong, right, items, delta) > _Z, -1.0, centre)
    high = _closed_in(lambda delta: _score(wrong, right, items, delta) < -_Z, 1.0, centre)
    return low, high


def _score(wrong: int, right: int, items: int, delta: float) -> float:
    """The score statistic of a difference `delta`: how many standard errors what was seen lies above it.

    The share of flips to wrong, q, is the likeliest one beside `delta`: 2 items q^2 + linear q + constant = 0.
    """
    linear = (2 * items + wrong - right) * delta - wrong - right
    constant = -wrong * delta * (1 - delta)
    share = (math.sqrt(max(0.0, linear * linear - 8 * items * constant)) - linear) / (4 * items)
    variance = items * (2 * share + delta * (1 - delta))
    distance = right - wrong - items * delta
    if variance <= 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / math.sqrt(variance)


def _closed_in(outside: Callable[[float], bool], out: float, inside: float) -> float:
    """The bound between a point outside of an interval and one inside; `out` itself where it is not outside."""
    if not outside(out):
        return out
    while abs(out - inside) > _WIDTH:
        middle = (out + inside) / 2
        out, inside = (middle, inside) if outside(middle) else (out, middle)
    return (out + inside) / 2


def bootstrap_interval(changes: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of the mean of `changes` [N] (Efron and Tibshirani 1993); fixed seed."""
    generator, means = np.random.default_rng(SEED), []
    for _ in range(DRAWS // 100):  # a few draws at a time: N may be large
        means.append(generator.choice(changes, (100, len(changes))).mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def sign_flip(changes: NDArray[np.float64]) -> float:
    """The two-sided p-value of a mean of `changes` [N] this far from 0, were each as likely to have the other sign.

    By `DRAWS` random draws of signs, what was seen being one more, so that it never errs on the bold side
    (Phipson and Smyth 2010); fixed seed.
    """
    moved = changes[changes != 0]
    if not len(moved):
        return 1.0
    seen, generator, extreme = abs(moved.sum()), np.random.default_rng(SEED), 0
    for _ in range(DRAWS // 100):
        signs = generator.integers(0, 2, (100, len(moved))) * 2 - 1
        extreme += int((np.abs(signs @ moved) >= seen * (1 - 1e-12)).sum())
    return (extreme + 1) / (DRAWS + 1)


def smallest_difference(items: int, flips: float) -> float | None:
    """The smallest true difference that McNemar's exact test finds in 4 of 5 cases.

    By the test's own power, summed over how many items may flip and which way they may go (Connor 1987, "Sample size
    for testing differences in proportions for the paired-sample design", Biometrics 43, has the normal approximation).

    Args:
        items: of the comparison.
        flips: share of items that flip, as seen; a difference takes at least as many.

    Returns:
        A share of one; None where no difference would be found, however large.
    """

    def found(difference: float) -> bool:
        return power(items, max(flips, difference), difference) >= POWER

    if not found(1.0):
        return None
    return _closed_in(lambda difference: not found(difference), 0.0, 1.0)


def power(items: int, flips: float, difference: float) -> float:
    """How often McNemar's exact test finds a difference between two models.

    Args:
        items: of the comparison.
        flips: share of items that flip.
        difference: by how much more of them go one way; `flips` at most.
    """
    if not flips:
        return 0.0
    mean, spread = items * flips, math.sqrt(items * flips * (1 - flips))
    ends = max(0, math.floor(mean - 5 * spread)), min(items, math.ceil(mean + 5 * spread))
    counts = np.unique(np.linspace(*ends, _COUNTS).round().astype(int)).tolist()  # of flips, where they lie close
    weights = np.exp([_log_binomial(items, count, flips) for count in counts])
    one_way = min(1.0, (flips + difference) / (2 * flips))
    return float(weights @ [_found(count, one_way) for count in counts] / weights.sum())


def _found(flips: int, one_way: float) -> float:
    """The probability that so many flips, each of which goes one way with probability `one_way`, show just that."""
    least = _limit(flips)
    if least is None:
        return 0.0
    return math.fsum(math.exp(_log_binomial(flips, k, one_way)) for k in range((flips + least) // 2, flips + 1))


def _log_binomial(draws: int, count: int, share: float) -> float:
    """The logarithm of a binomial's probability of `count`."""
    if share in (0.0, 1.0):
        return 0.0 if count == draws * share else -math.inf
    ways = math.lgamma(draws + 1) - math.lgamma(count + 1) - math.lgamma(draws - count + 1)
    return ways + count * math.log(share) + (draws - count) * math.log1p(-share)


@cache
def _limit(flips: int) -> int | None:
    """The smallest |wrong - right| of so many flips with a p-value of `LEVEL` or less; None where there is none."""
    total, fewer = 0.0, 0
    while True:
        total += math.exp(_log_binomial(flips, fewer, 0.5))
        if 2 * total > LEVEL:
            return flips - 2 * (fewer - 1) if fewer else None
        fewer += 1


def _smallest_mean(changes: NDArray[np.float64]) -> float | None:
    """The same for a mean of `changes` [N], by the normal approximation; None where they show no spread."""
    if len(changes) < 2 or not changes.any():
        return None
    return float((_Z + _Z_POWER) * changes.std(ddof=1) / math.sqrt(len(changes)))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected so that any false alarm among them has the error rate (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
