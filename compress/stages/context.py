"""What a stage gets beside its spec: where to compute, what to calibrate on, whom to tell."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import distributed
from compress.data.calibration import TokenSet
from compress.errors import UserError
from compress.memory import available
from compress.model.stream import TOKENS_PER_BATCH
from compress.progress import Reporter


@dataclass(frozen=True)
class Context:
    """Shared by the stages of a run.

    Args:
        device: where layers run and solvers work.
        dtype: precision of the forward passes.
        tokens: calibration sequences; None where no stage needs them.
        probe: token ids [1, S] on which the written checkpoint is compared with the model in memory.
        reporter: progress and warnings.
        trust_remote_code: as in transformers.
        max_memory: bytes of the device's memory (of the machine's, on a CPU) that may be used; None is what is free.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: TokenSet | None
    probe: Tensor
    reporter: Reporter
    trust_remote_code: bool
    max_memory: int | None = None

    def room(self, layer_bytes: int, widest: int, hidden: int) -> float:
        """Bytes left for activations beside the weights, the largest Hessian's solution and one batch.

        Args:
            layer_bytes: of a layer's weights, as often as they are held, and of the next layer's.
            widest: most inputs of a linear.
            hidden: width of the hidden states.
        """
        batch = TOKENS_PER_BATCH[self.device.type] * (3 * widest + 6 * hidden) * self.dtype.itemsize
        free = available(self.device, self.max_memory)
        if self.device.type == "cpu":
            free //= distributed.here()  # the processes on one machine share its memory
        return free - layer_bytes - 20 * widest**2 - batch


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
    return torch.bfloat16 if _fast_bf16() else torch.float32


def _fast_bf16() -> bool:
    if platform.system() != "Linux":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    return bool(words & {"amx_bf16", "avx512_bf16", "bf16"})
