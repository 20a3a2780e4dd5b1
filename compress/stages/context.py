"""What a stage gets beside its spec: where to compute, what to calibrate on, whom to tell."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.errors import UserError
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
    """

    device: torch.device
    dtype: torch.dtype
    tokens: TokenSet | None
    probe: Tensor
    reporter: Reporter
    trust_remote_code: bool


def pick_device(name: str) -> torch.device:
    """The device that `--device` names; auto is the first GPU, or else the CPU.

    Raises:
        UserError: a device that is not there.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda:0" if count else "cpu")
    there = ["cpu", *(f"cuda:{index}" for index in range(count))]
    wanted = "cuda:0" if name == "cuda" else name
    if wanted not in there:
        raise UserError(f"--device {name}: not there; this machine has {', '.join(there)}")
    return torch.device(wanted)


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
