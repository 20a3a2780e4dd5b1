"""Locks on files: one process makes an artefact, others wait for it or use it; the system frees them however one ends.

Where the file system has no `flock` (some network ones), a file with the holder's name stands for the exclusive lock.
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from compress.errors import OutputError
from compress.system.files import make_writable, runs, unwritable

_NO_FLOCK = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_LOOK = 0.2  # seconds between two tries


class InUseError(OutputError):
    """Another process holds a lock.

    Args:
        file: the lock.
        holder: who holds it, in words.
    """

    def __init__(self, file: Path, holder: str) -> None:
        super().__init__(f"{file}: in use by {holder}; wait for that run to end")
        self.holder = holder


class FileLock:
    """A lock by the name of a file, which is made where it is not there.

    Used in a `with`, it is let go at the end.

    Args:
        file: what stands for the lock; its folder is made too.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._handle: BinaryIO | None = None
        self._claim: Path | None = None

    def acquire(self, exclusive: bool, waiting: Callable[[str], None] | None = None) -> None:
        """Take the lock, alone or together with others that share it; one that is held already is changed.

        Args:
            exclusive: whether alone.
            waiting: told once who holds it, before that one is waited for; None: don't wait.

        Raises:
            InUseError: another process holds it and there is no waiting.
            OutputError: nothing can be written there.
        """
        told = False
        while not self._try(exclusive):
            holder = self._holder()
            if waiting is None:
                self.release()
                raise InUseError(self.file, holder)
            if not told:
                waiting(holder)
                told = True
            time.sleep(_LOOK)

    def _try(self, exclusive: bool) -> bool:
        self._open()
        assert self._handle is not None
        kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        try:
            fcntl.flock(self._handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise unwritable(self.file, error) from error
            return self._try_claim(exclusive)
        if not self._is_current():  # its last holder has removed the file
            self.release()
            return self._try(exclusive)
        if exclusive:
            self._sign(self._handle)
        return True

    def _open(self) -> None:
        if self._handle is None:
            make_writable(self.file.parent)
            try:
                self._handle = self.file.open("ab+", buffering=0)
            except OSError as error:
                raise unwritable(self.file, error) from error

    def _is_current(self) -> bool:
        assert self._handle is not None
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._handle.fileno()), self.file.stat())
        return False

    def _try_claim(self, exclusive: bool) -> bool:
        """Without flock: the file `*.held` is the exclusive lock; those who share only see that there is none."""
        claim = self.file.with_suffix(self.file.suffix + ".held")
        if self._claim is not None:
            if not exclusive:
                self._drop_claim()
            return True
        with suppress(FileNotFoundError):
            host, _, process = claim.read_text(encoding="utf-8").splitlines()[0].partition(" ")
            if host == socket.gethostname() and not runs(int(process)):
                claim.unlink(missing_ok=True)
        if not exclusive:
            return not claim.exists()
        try:
            with claim.open("xb") as made:
                made.write(f"{socket.gethostname()} {os.getpid()}\n".encode())
        except FileExistsError:
            return False
        self._claim = claim
        return True

    def _sign(self, handle: BinaryIO) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        with suppress(OSError):  # a full disk is no reason not to hold it
            handle.truncate(0)
            handle.write(f"process {os.getpid()} since {now}".encode())

    def _holder(self) -> str:
        claim = self.file.with_suffix(self.file.suffix + ".held")
        with suppress(OSError, IndexError):
            host, _, process = claim.read_text(encoding="utf-8").splitlines()[0].partition(" ")
            return f"process {process} on {host} (if it has ended, delete {claim})"
        assert self._handle is not None
        self._handle.seek(0)
        return self._handle.read().decode() or "another process"

    def _drop_claim(self) -> None:
        if self._claim is not None:
            self._claim.unlink(missing_ok=True)
            self._claim = None

    @property
    def descriptor(self) -> int:
        """Of the open file, for a child process that is to hold the lock too."""
        assert self._handle is not None
        return self._handle.fileno()

    def remove(self) -> None:
        """Let an exclusive lock go, and its file with it."""
        self.file.unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Let the lock go."""
        self._drop_claim()
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def __enter__(self) -> "FileLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@contextmanager
def made_once(file: Path, waiting: Callable[[str], None]) -> Iterator[bool]:
    """Inside, whether this process has to make a file; others that want it wait until it is there.

    Args:
        file: what appears whole or not at all.
        waiting: told who is making it, where it has to be waited for.
    """
    if file.exists():
        yield False
        return
    with FileLock(file.with_name(f"{file.name.partition('.')[0]}.lock")) as lock:
        lock.acquire(exclusive=True, waiting=waiting)
        yield not file.exists()


def remove_unused_locks(folder: Path) -> None:
    """Remove the lock files under a folder that nobody holds, and folders in it that are empty then."""
    for file in sorted(folder.rglob("*.lock")):
        lock = FileLock(file)
        with suppress(OutputError):
            lock.acquire(exclusive=True)
            lock.remove()
        lock.release()
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            empty.rmdir()
