"""A limit of time and memory for code that came with a model and may never end: chat templates, tokenizers.

`limited` watches what runs in this process and is written in Python; `limit_process` ends a whole process, whatever it
is in. Where the system has no such limits (memory outside of Linux, time outside of the main thread), none is kept.
"""

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_STATM = Path("/proc/self/statm")


class LimitError(Exception):
    """More time or memory was taken than allowed; says which."""


@contextmanager
def limited(seconds: int, memory: int) -> Iterator[None]:
    """Stop what is inside when it takes too long, or too many bytes more than this process has.

    Raises:
        LimitError: saying which.
    """
    known, most = resource.getrlimit(resource.RLIMIT_AS)
    if _STATM.exists():
        allowed = int(_STATM.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (allowed if known < 0 else min(allowed, known), most))
    try:
        with _alarm(seconds):
            yield
    except MemoryError as error:
        raise LimitError(f"took more than {memory / 2**30:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (known, most))


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        raise LimitError(f"took more than {seconds} seconds")

    before, started = signal.signal(signal.SIGALRM, stop), time.monotonic()
    # again each second: what is raised inside a destructor is lost
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # an alarm of somebody else's
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.001), interval)


def limit_process(seconds: int, memory: int) -> None:
    """Let the system end this process when it takes more processor seconds from here on, or more bytes in all."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    until = int(used.ru_utime + used.ru_stime) + 1 + seconds
    for kind, wanted in ((resource.RLIMIT_CPU, until), (resource.RLIMIT_AS, memory)):
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (wanted if most < 0 else min(wanted, most), most))
