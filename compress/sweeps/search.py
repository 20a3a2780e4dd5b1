"""The value of one setting at which a figure is as good as limits allow, in few points.

The limits are taken to be crossed once in the range. Where is guessed by a curve through the logarithms of the nearest
points, which is close to how divergence grows. What is tried lies a little to the side of the guess where more of the
range is left, so that two good guesses fence it in; where guesses do badly, the middle is tried.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from compress.recipe.sweep import Search
from compress.report.frontier import figure_of

_NOISE = 0.1  # of the whole way, that figures may go back from one value to the next


@dataclass(frozen=True)
class Tried:
    """A value and the figures of its point; none of a point that failed."""

    value: float
    figures: Mapping[str, float]


class Bisection:
    """Asked for the next value, and told what became of each.

    Args:
        search: what is looked for.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.tried: list[Tried] = []

    def tell(self, value: float, figures: Mapping[str, float]) -> None:
        """A point is made, or failed (without figures)."""
        self.tried.append(Tried(value, figures))

    def next(self) -> int | float | None:
        """The value to try; None where the search is at its end."""
        low, high = self.search.ends
        known = {each.value for each in self.tried}
        for end in (low, high):
            if end not in known:
                return end
        if self._broken() or len(self.tried) >= self.search.points:
            return None
        fence = self._fence()
        if fence is None:
            return None
        good, bad = fence
        if abs(bad.value - good.value) <= self.search.width * (1 + 1e-9):
            return None
        tries = (self.search.exact(value) for value in (self._guess(good, bad), (good.value + bad.value) / 2))
        return next((value for value in tries if value not in known), None)

    def best(self) -> Tried | None:
        """The feasible point whose goal is best; of equals the one nearest to where the limits are crossed."""
        figure = figure_of(self.search.goal)
        assert figure is not None
        there = [each for each in self.tried if self.margin(each) is not None and (self.margin(each) or 0) <= 0]
        there = [each for each in there if self.search.goal in each.figures]
        sign, fence = 1 if self.search.maximize is not None else -1, self._fence()

        def rank(each: Tried) -> tuple[float, float]:
            return sign * each.figures[self.search.goal], 0.0 if fence is None else -abs(each.value - fence[1].value)

        return max(there, key=rank, default=None)

    def note(self) -> str:
        """How it ended, in words."""
        if (said := self._broken()) is not None:
            return said
        fence = self._fence()
        limits = ", ".join(f"{name} {limit:g}" for name, limit in self.search.subject_to.items())
        if fence is None:
            said = ", ".join(f"{each.value:g}: {self._shown(each)}" for each in self.tried)
            ends = "neither end of the range keeps" if self.best() is None else "both ends of the range keep"
            return f"{ends} to the limits ({said})"
        good, bad = fence
        return f"the limits ({limits}) are crossed between {good.value:g} and {bad.value:g}; {len(self.tried)} points"

    def margin(self, tried: Tried) -> float | None:
        """How far a point is beyond the limits: 0 at one, negative inside; None where a figure is missing.

        Differences of logarithms where both numbers allow it, so that a line through them says where 0 is.
        """
        worst = None
        for name, limit in self.search.subject_to.items():
            figure = figure_of(name)
            assert figure is not None
            if name not in tried.figures:
                return None
            value = tried.figures[name]
            beyond = math.log(value / limit) if value > 0 and limit > 0 else value - limit
            beyond = -beyond if figure.larger_is_better else beyond
            worst = beyond if worst is None else max(worst, beyond)
        return worst

    def _broken(self) -> str | None:
        """What was seen that a search by bisection can't go on from."""
        ordered = sorted(self.tried, key=lambda each: each.value)
        for each in ordered:
            if self.margin(each) is None:
                missing = [name for name in self.search.subject_to if name not in each.figures]
                why = f"has no {', '.join(missing)}" if each.figures else "failed"
                return f"the point at {each.value:g} {why}, so the search ends"
        margins = [self.margin(each) or 0.0 for each in ordered]
        steps = [other - one for one, other in zip(margins, margins[1:], strict=False)]
        whole = sum(steps)
        if any(step * math.copysign(1, whole) < -_NOISE * abs(whole) for step in steps):
            said = ", ".join(f"{each.value:g}: {self._shown(each)}" for each in ordered)
            return f"the figures go up and down ({said}), so no bisection finds the best value; try a grid"
        return None

    def _shown(self, tried: Tried) -> str:
        return " and ".join(f"{name} {tried.figures[name]:.4g}" for name in self.search.subject_to)

    def _fence(self) -> tuple[Tried, Tried] | None:
        """The two neighbours of which one keeps to the limits and the other doesn't."""
        ordered = sorted(self.tried, key=lambda each: each.value)
        for one, other in zip(ordered, ordered[1:], strict=False):
            inside = [(self.margin(each) or 0) <= 0 for each in (one, other)]
            if inside[0] != inside[1]:
                return (one, other) if inside[0] else (other, one)
        return None

    def _guess(self, good: Tried, bad: Tried) -> float:
        """A value between the two, near where the limits are crossed, on the side of the end that is farther away."""
        low, high = sorted((good.value, bad.value))
        behind, width = len(self.tried) - 2, high - low
        if width > (self.search.range[1] - self.search.range[0]) * 0.5 ** (behind / 2):  # guesses do badly
            return (low + high) / 2
        crossed, half = self._crossing(good, bad), 0.45 * self.search.width
        crossed += half if high - crossed > crossed - low else -half
        return min(max(crossed, low + half), high - half) if width > 2 * half else (low + high) / 2

    def _crossing(self, good: Tried, bad: Tried) -> float:
        """Where a curve through the margins of the nearest points is 0."""
        near = sorted(self.tried, key=lambda each: abs(self.margin(each) or 0))[:3]
        points = [(self.margin(each) or 0.0, each.value) for each in near]
        if len(points) == 3 and len({margin for margin, _ in points}) == 3:  # inverse quadratic interpolation
            shares = [math.prod(-other / (own - other) for other, _ in points if other != own) for own, _ in points]
            found = sum(share * value for share, (_, value) in zip(shares, points, strict=True))
            low, high = sorted((good.value, bad.value))
            if low < found < high:
                return found
        one, other = self.margin(good) or 0.0, self.margin(bad) or 0.0
        return good.value - one * (bad.value - good.value) / (other - one)
