"""Ctrl-C that is not lost: C code that clears errors may swallow the exception that it is raised as."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def watched() -> Iterator[None]:
    """Inside, Ctrl-C is noted beside being raised; a handler of somebody else's is left alone."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        _asked.clear()


def check() -> None:
    """Raise the KeyboardInterrupt that was asked for and lost on its way."""
    if _asked.is_set():
        raise KeyboardInterrupt


def _note(number: int, frame: FrameType | None) -> None:
    _asked.set()
    raise KeyboardInterrupt
