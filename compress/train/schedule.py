"""The learning rate over a run."""

import math


def rate(step: int, steps: int, warm_up: float) -> float:
    """Share of the peak at a step, counted from 0: rising in the first `warm_up` of the steps, then a cosine to 0."""
    rising = round(warm_up * steps)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
