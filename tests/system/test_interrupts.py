"""Ctrl-C stops the work even where its exception is swallowed on the way."""

import signal
from contextlib import suppress

import pytest

from compress.system.interrupts import watched
from compress.system.progress import Reporter


@pytest.mark.parametrize("quiet", [True, False])
def test_a_swallowed_interrupt_stops_the_next_unit_of_work(quiet: bool) -> None:
    reporter = Reporter(quiet=quiet)
    with reporter.task("working", 3, "layer") as advance:
        with watched():
            advance()
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                advance()
        advance()  # what comes after is not stopped by it


def test_the_handler_that_was_there_comes_back() -> None:
    usual = signal.getsignal(signal.SIGINT)
    with watched():
        assert signal.getsignal(signal.SIGINT) is not usual
    assert signal.getsignal(signal.SIGINT) is usual


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As in the background of a shell, or under nohup."""
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with watched():
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, usual)
