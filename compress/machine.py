"""Where a run runs, for its report."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from compress.memory import physical
from compress.report.schema import Machine

if TYPE_CHECKING:
    import torch


def machine(device: "torch.device") -> Machine:
    """This machine, and its GPU where the run uses one."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(cpu=_cpu_name(), cores=os.cpu_count() or 1, memory_bytes=physical(), gpu=gpu)


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    rows = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
