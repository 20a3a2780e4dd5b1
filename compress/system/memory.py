"""Peak memory of this process and of its GPU."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import DscompressError

if TYPE_CHECKING:
    import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from when it is made; where the system can't start over (not Linux), from the process's start."""

    def __init__(self, device: "torch.device") -> None:
        self.device = device
        with suppress(OSError):
            _RESET.write_text("5")  # proc(5): resets the resident set's high-water mark
        if device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(device)

    def peak(self) -> tuple[int, int | None]:
        """Bytes resident at most, and bytes allocated on the GPU at most (None without one)."""
        gpu = None
        if self.device.type == "cuda":
            import torch

            gpu = int(torch.cuda.max_memory_allocated(self.device))
        return _status("VmHWM:"), gpu


def resident() -> tuple[int, int]:
    """Bytes of this process that are resident now, and at most so far (both times that, if this is not Linux)."""
    return _status("VmRSS:"), _status("VmHWM:")


def _status(field: str) -> int:
    """Bytes that Linux states of this process; elsewhere the most that was resident."""
    with suppress(OSError):
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def available(device: "torch.device", limit: int | None = None) -> int:
    """Bytes that can still be allocated: free on the GPU, or in this machine and its memory limit, `limit` at most."""
    free = _free(device)
    return free if limit is None else min(free, limit)


def _free(device: "torch.device") -> int:
    if device.type == "cuda":
        import torch

        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # held by torch, and free
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return free_here()


def free_here() -> int:
    """Bytes that can still be allocated in this machine's memory, within the limits of the process."""
    free = physical()
    with suppress(OSError, StopIteration, ValueError):
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(row for row in rows if row.startswith("MemAvailable:")).split()[1]) * 1024
    with suppress(OSError, ValueError):  # a container's limit (cgroup v2)
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii")))
    for kind, used in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):  # `ulimit -v` and `-d`
        allowed = resource.getrlimit(kind)[0]
        if allowed != resource.RLIM_INFINITY:
            free = min(free, allowed - _status(used))
    return max(0, free)


def physical() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextmanager
def fitting() -> Iterator[None]:
    """Turn running out of memory into one line; torch says it as a RuntimeError, by its words on a CPU.

    Raises:
        DscompressError: memory has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in words and "can't allocate memory" not in words:
            raise
        raise DscompressError(
            f"out of memory ({words.splitlines()[0] if words else 'MemoryError'}); use fewer or shorter calibration "
            "sequences (--set calibration.samples=32), a smaller micro_batch in a stage that trains, or a device with "
            "more, then run again to continue"
        ) from error
