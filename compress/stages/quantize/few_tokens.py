"""What is done where calibration has few tokens for the inputs of a matrix. Never imports torch.

A Hessian of N tokens knows N directions. In the others of its I inputs an error seems to cost nothing, and GPTQ puts
its errors there: it fits those tokens and loses to plain rounding on any other text. So the Hessian is shrunk towards a
multiple of the identity, under which GPTQ is plain rounding (Ledoit and Wolf 2004, "A well-conditioned estimator for
large-dimensional covariance matrices"), the more the fewer its tokens are:

    (1 - a) H + a mean(diag H) 1,   a = 2 I / (N + 2 I),    which up to a factor is    H + (2 I / N) mean(diag H) 1

and the correction of propagated errors, fitted to the same tokens, counts by 1 - a.

Left out: to estimate `a` from H, as the closed forms do that take tokens for independent, and to count a weighted
Hessian's effective tokens. Neither did better on held-out text.
"""

import math
import re
from collections.abc import Sequence

from compress.recipe.quantize import QuantizeStage
from compress.stages.quantize.matrix import Matrix

AMPLE = 8  # tokens for each input, from which on a Hessian is taken as it is: with fewer, it lost to rounding
_STRENGTH = 2.0


def is_few(tokens: int, inputs: int) -> bool:
    """Whether so many tokens say too little about the Hessian of so many inputs."""
    return tokens < AMPLE * inputs


def damping(tokens: int, inputs: int, damp: float) -> float:
    """Share of the Hessian's mean diagonal to add to its diagonal, where a recipe says `damp`."""
    return max(damp, _STRENGTH * inputs / tokens) if is_few(tokens, inputs) else damp


def trust(tokens: int, inputs: int) -> float:
    """How much a correction counts that was fitted to so many tokens: 1 - a."""
    return tokens / (tokens + _STRENGTH * inputs) if is_few(tokens, inputs) else 1.0


def few_tokens(spec: QuantizeStage, matrices: Sequence[Matrix], tokens: int, sequence_length: int) -> list[str]:
    """A warning for a stage that has few calibration tokens for its widest matrix, or none.

    Args:
        spec: the stage.
        matrices: of the stage.
        tokens: of the calibration, in all.
        sequence_length: tokens of one of its sequences.
    """
    widest = max(matrices, key=lambda matrix: matrix.shape[1])
    inputs = widest.shape[1]
    if spec.weight_rounding != "gptq" or not is_few(tokens, inputs):
        return []
    name = re.sub(r"\.\d+\.", ".*.", widest.name)
    fewer = "fewer than the" if tokens < inputs else f"fewer than {AMPLE:g} for each of the"
    samples = math.ceil(AMPLE * inputs / sequence_length)
    return [
        f"calibration: {tokens} tokens are {fewer} {inputs} inputs of {name}, so they count for less and rounding "
        f"stays less accurate than it could be; use samples: {samples} or more"
    ]
