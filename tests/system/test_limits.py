"""What takes too much time or memory is stopped, and nothing of the limit is left behind."""

import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from compress.system.limits import LimitError, limited

MIB = 1 << 20


def state() -> tuple[object, object]:
    return resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGALRM)


@pytest.fixture(autouse=True)
def other_alarm() -> Iterator[None]:
    """Somebody else's alarm, which goes on."""
    before = signal.setitimer(signal.ITIMER_REAL, 300)
    try:
        yield
        assert 280 < signal.getitimer(signal.ITIMER_REAL)[0] < 300
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def test_what_does_not_end_is_stopped() -> None:
    before, started = state(), time.monotonic()
    with pytest.raises(LimitError, match=r"^took more than 1 seconds$"), limited(1, MIB):
        while True:
            pass
    assert time.monotonic() - started < 3
    assert state() == before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much address space is used")
def test_what_takes_too_much_memory_is_stopped() -> None:
    before = state()
    with pytest.raises(LimitError, match=r"^took more than 0.25 GiB of memory$"), limited(60, 256 * MIB):
        bytearray(512 * MIB)
    assert state() == before


def test_what_keeps_to_the_limits_is_left_alone() -> None:
    before = state()
    with limited(60, 512 * MIB):
        assert len(bytearray(MIB)) == MIB
    with pytest.raises(ZeroDivisionError), limited(60, 512 * MIB):
        _ = 1 / 0
    assert state() == before


def test_a_thread_has_no_alarm_but_is_no_error() -> None:
    seen: list[int] = []

    def work() -> None:
        with limited(60, 512 * MIB):
            seen.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]


@pytest.mark.parametrize(("body", "code"), [("while True: pass", -signal.SIGXCPU), ("bytearray(1 << 31)", 1)])
def test_a_process_that_takes_too_much_ends(body: str, code: int) -> None:
    program = f"from compress.system.limits import limit_process\nlimit_process(0, 1 << 30)\n{body}"
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False).returncode == code
