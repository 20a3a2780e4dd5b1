"""Where to compute and in what precision."""

import torch

from compress.errors import UserError
from compress.system.machine import fast_bf16


def pick_device(name: str, max_memory: int | None = None) -> torch.device:
    """The device that `--device` names; auto is the first GPU, or else the CPU.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:<n>".
        max_memory: bytes that torch may allocate on a GPU from here on.

    Raises:
        UserError: a device that is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if count else "cpu"
    there = ["cpu", *(f"cuda:{index}" for index in range(count))]
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise UserError(f"--device {name}: not there; this machine has {', '.join(there)}")
    device = torch.device(wanted)
    if max_memory is not None and device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max_memory / total), device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where Triton launches
    return device


def pick_dtype(device: torch.device, stored: torch.dtype) -> torch.dtype:
    """Precision of the forward passes.

    On a GPU the model's own 16 bits. On a CPU bf16 where it multiplies bf16 natively, else float32 (float16 is slow
    on every CPU).
    """
    if device.type == "cuda":
        return torch.float16 if stored == torch.float16 else torch.bfloat16
    return torch.bfloat16 if fast_bf16() else torch.float32
