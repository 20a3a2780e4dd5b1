"""Locks on files of a work folder."""

import fcntl
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

from compress.errors import OutputError
from compress.system.files import make_writable, writing


class RunLock:
    """Held while a run uses a work folder; the operating system frees it when the process ends, however it ends.

    A run that fails before it has made anything else takes the folder with it.

    Raises:
        OutputError: another run holds it.
    """

    def __init__(self, work: Path) -> None:
        self.file = work / "lock"

    def __enter__(self) -> None:
        make_writable(self.file.parent)
        self._handle = self.file.open("ab+", buffering=0)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._handle.seek(0)
            holder = self._handle.read().decode() or "another process"
            self._handle.close()
            raise OutputError(
                f"{self.file.parent}: in use by {holder}; wait for that run, or give this one another --work-dir"
            ) from None
        with writing(self.file.parent):
            self._handle.truncate(0)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._handle.write(f"process {os.getpid()} since {now}".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder = self.file.parent
        if error is not None and not any(
            path.is_file() and not path.name.endswith("lock") for path in folder.rglob("*")
        ):
            shutil.rmtree(folder, ignore_errors=True)
        self._handle.close()
