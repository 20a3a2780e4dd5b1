"""Triton kernels of the GPTQ solver, for NVIDIA GPUs. Each has a plain-torch twin in compress.quant, the reference.

Triton is no dependency: torch's CUDA builds bring it, and without it (or without a GPU) the twins run.
"""

from functools import cache
from importlib.util import find_spec

from torch import Tensor


def usable(tensor: Tensor) -> bool:
    """Whether the kernels run where this tensor is."""
    return tensor.device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
