"""How much arithmetic training takes, and what a named GPU does in a second. Never imports torch.

Counted as in "Training Compute-Optimal Large Language Models" (arXiv 2203.15556, appendix F) but for the embeddings,
whose lookup costs nothing: 2 operations for each weight of a matrix and each token, forward; twice that backward.
"""

import re

from compress.train.body import Body

# Dense bf16, by the makers' data sheets.
PEAKS = {
    "B200": 2.25e15, "H200": 9.89e14, "H100 PCIe": 7.56e14, "H100 NVL": 8.35e14, "H100": 9.89e14, "A100": 3.12e14,
    "L40S": 3.62e14, "L40": 1.81e14, "L4": 1.21e14, "A10G": 7.0e13, "A10": 1.25e14, "RTX 5090": 2.09e14,
    "RTX 4090": 1.65e14, "RTX 3090": 7.1e13,
}  # fmt: skip


def step_flops(student: Body, teacher: Body | None, length: int, trainable: float = 1.0, again: bool = False) -> float:
    """Operations for one token: forward and backward of the student, forward of the teacher.

    Args:
        student: what is trained.
        teacher: what is asked beside; None: nobody.
        length: tokens of a sequence.
        trainable: share of the weights that get a gradient.
        again: whether layers are computed again in the backward pass; not counted as work for the MFU.
    """
    passes = 2.0 + trainable + (1.0 if again else 0.0)
    return passes * student.forward(length) + (0.0 if teacher is None else teacher.forward(length))


def peak_of(gpu: str | None) -> float | None:
    """Operations per second of a GPU by its name; None where it is not known."""
    if gpu is None:
        return None
    named = [name for name in PEAKS if re.search(rf"(?<![\w]){re.escape(name)}(?![\w])", gpu, re.IGNORECASE)]
    return PEAKS[max(named, key=len)] if named else None
