"""Whether training has gone wrong: a loss or gradient that is no number, or a loss far above those before it."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

_WINDOW, _LEAST = 32, 8  # losses that are looked back at; how many there must be
_TIMES, _NATS = 3.0, 0.5  # a loss this many times the median, and so far above it, is a spike


class Guard:
    """Looks at each step's loss, in order.

    Args:
        losses: of the steps before, as `losses` of an earlier one had them.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.losses: deque[float] = deque(losses, maxlen=_WINDOW)

    def problem(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step, in a few words; None where nothing is, and the loss is remembered."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        if len(self.losses) >= _LEAST:
            usual = median(self.losses)
            if loss > max(_TIMES * usual, usual + _NATS):
                return f"the loss is {loss:.3g} where it was {usual:.3g}"
        self.losses.append(loss)
        return None


def held_out_problem(loss: float) -> str | None:
    """What is wrong with a measurement, in a few words."""
    return None if math.isfinite(loss) else f"the held-out loss is {loss}"
