"""Locks: alone or shared, told who holds them, freed with their process, and a stand-in where there is no flock."""

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compress.errors import OutputError
from compress.system.locks import FileLock, InUseError, remove_unused_locks


@pytest.fixture(params=["flock", "no flock"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock's file on a file system with or without flock."""
    if request.param == "no flock":

        def refuse(*_: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
    return tmp_path / "deep" / "artefact.lock"


def test_who_holds_it_alone_keeps_all_others_out(file: Path) -> None:
    with FileLock(file) as one, FileLock(file) as other:
        one.acquire(exclusive=True)
        for exclusive in (True, False):
            with pytest.raises(InUseError, match=rf"artefact\.lock: in use by process {os.getpid()}"):
                other.acquire(exclusive=exclusive)
        one.release()
        other.acquire(exclusive=True)


def test_those_who_share_it_do_not_mind_each_other(file: Path) -> None:
    with FileLock(file) as one, FileLock(file) as other, FileLock(file) as third:
        one.acquire(exclusive=True)
        one.acquire(exclusive=False)  # made, and used from now on
        other.acquire(exclusive=False)
        third.acquire(exclusive=False)


def test_a_shared_one_keeps_out_who_wants_it_alone(tmp_path: Path) -> None:
    with FileLock(tmp_path / "a.lock") as one, FileLock(tmp_path / "a.lock") as other:
        one.acquire(exclusive=False)
        with pytest.raises(InUseError):
            other.acquire(exclusive=True)


def test_waiting_is_told_once_and_ends(file: Path) -> None:
    told: list[str] = []
    with FileLock(file) as one, FileLock(file) as other:
        one.acquire(exclusive=True)
        threading.Timer(0.7, one.release).start()
        other.acquire(exclusive=True, waiting=told.append)
    assert len(told) == 1 and told[0].startswith(f"process {os.getpid()} ")


def test_it_is_free_when_its_process_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    code = f"""
import os, signal
from pathlib import Path
from compress.system.locks import FileLock
FileLock(Path({str(file)!r})).acquire(exclusive=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    with FileLock(file) as lock:
        lock.acquire(exclusive=True)


def test_without_flock_a_claim_of_a_process_that_is_gone_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    claim = tmp_path / "a.lock.held"
    gone = subprocess.Popen(["true"])
    gone.wait()
    claim.write_text(f"{socket.gethostname()} {gone.pid}\n")
    with FileLock(tmp_path / "a.lock") as lock:
        lock.acquire(exclusive=True)
    assert not claim.exists()
    claim.write_text("elsewhere 1\n")  # nobody here can tell
    with FileLock(tmp_path / "a.lock") as lock, pytest.raises(InUseError) as caught:
        lock.acquire(exclusive=True)
    holder = f"process 1 on elsewhere (if it has ended, delete {claim})"
    assert str(caught.value) == f"{tmp_path}/a.lock: in use by {holder}; wait for that run to end"


def test_a_lock_whose_file_was_removed_is_taken_on_a_new_file(tmp_path: Path) -> None:
    file = tmp_path / "a.lock"
    with FileLock(file) as one, FileLock(file) as other, FileLock(file) as third:
        one.acquire(exclusive=True)
        one.remove()
        other.acquire(exclusive=True)
        assert file.exists()
        with pytest.raises(InUseError):
            third.acquire(exclusive=True)


def test_other_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with FileLock(tmp_path / "a.lock") as lock, pytest.raises(OutputError, match=r"cannot be written \(Input/output"):
        lock.acquire(exclusive=True)


def test_unused_locks_go_and_used_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "work" / "stages").mkdir(parents=True)
    used, unused = (tmp_path / "work" / "stages" / f"{name}.lock" for name in ("used", "unused"))
    unused.touch()
    with FileLock(used) as lock:
        lock.acquire(exclusive=False)
        remove_unused_locks(tmp_path / "work")
        assert used.exists() and not unused.exists()
    remove_unused_locks(tmp_path / "work")
    assert not any((tmp_path / "work").iterdir())
