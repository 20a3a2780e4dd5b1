"""What a precision cost where it was measured: KL divergence from the base, in nats a token. Nothing is reckoned.

From tests/benchmarks/RESULTS.md, on WikiText-2's test text. What is not here was not measured.
"""

from dataclasses import dataclass

_SMOLLM2 = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Measured:
    """A range of KL divergences.

    Args:
        least: the smallest figure.
        most: the largest; the same where there is one.
        model: it was measured on.
        how: what the figures are of.
    """

    least: float
    most: float
    model: str
    how: str


LOSSES = {
    "int8": Measured(0.0085, 0.0105, _SMOLLM2, "dynamic, smooth: auto; 128 x 2048 and 32 x 512 calibration tokens"),
    "fp8": Measured(0.0183, 0.0208, _SMOLLM2, "dynamic; 128 x 2048 and 32 x 512 calibration tokens"),
    "int4 g64": Measured(0.0607, 0.110, _SMOLLM2, "gptq; 128 x 2048 tokens of like text to 32 x 512 of other text"),
    "int3 g64": Measured(0.315, 0.315, _SMOLLM2, "gptq, drift_correction: 0; 128 x 2048 tokens of like text"),
}


def measured(precision: str) -> Measured | None:
    """What a precision cost, by its row's name; None: not measured."""
    return LOSSES.get(precision)
