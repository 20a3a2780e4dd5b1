"""Where a run runs, for its report."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compress.records import Machine
from compress.system.memory import physical

if TYPE_CHECKING:
    import torch

_PACKAGES = ("dscompress", "torch", "transformers", "compressed-tensors", "torchao", "safetensors", "accelerate")
# What products of 8-bit integers and of bf16 are made with, on x86 and ARM.
_MATTERS = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip


def machine(device: "torch.device") -> Machine:
    """This machine, and its GPU where the run uses one."""
    import torch

    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return Machine(cpu=_name(_cpuinfo()), cores=os.cpu_count() or 1, memory_bytes=physical(), gpu=gpu)


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor() -> tuple[str, list[str]]:
    """This machine's CPU, and what it has of the instructions that matter here."""
    found = _cpuinfo()
    flags = (found.get("flags") or found.get("Features") or "").split()
    version = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    return _name(found) + version, [flag for flag in _MATTERS if flag in flags]


def fast_bf16() -> bool:
    """Whether this machine's CPU multiplies bf16 natively."""
    found = _cpuinfo()
    flags = (found.get("flags") or found.get("Features") or "").split()
    return bool({"amx_bf16", "avx512_bf16", "bf16"} & set(flags))


def waited() -> float:
    """Seconds so far that this process's threads were ready to run while others had the cores, as Linux counts them."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that just ended
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e9


def _name(cpuinfo: Mapping[str, str]) -> str:
    return cpuinfo.get("model name") or platform.processor() or platform.machine()


def _cpuinfo() -> dict[str, str]:
    """What Linux says of a core; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    rows = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    pairs = (row.partition(":") for row in rows)
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}
