"""Files that appear whole or not at all, and what the system says against writing them, as one line."""

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.errors import OutputError


def write_text(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def make_writable(folder: Path) -> None:
    """Make a folder where there is none, and try whether a file can be written in it.

    Raises:
        OutputError: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says against writing into one line, about the file that it names or else the folder.

    Raises:
        OutputError: no space, or no right to write there.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(Path(error.filename or folder), error) from error


def unwritable(path: Path, error: Exception) -> OutputError:
    """The error for a path that could not be written, with what to do about it."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return OutputError(f"{path}: a file is where a folder should be; choose another --output or --work-dir")
    if "No space left" in reason or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: no space left on the disk; free some and run the same command again to continue")
    return OutputError(
        f"{path}: cannot be written ({reason}); choose another --output or --work-dir, or make it writable"
    )


def commit(finished: Path, final: Path) -> None:
    """Give a finished folder its final name, in place of what had it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    finished.replace(final)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A folder beside a path that is gone afterwards; those of processes that were killed go too."""
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        number = old.name.split(".")[-2]
        if number.isdigit() and not runs(int(number)):
            shutil.rmtree(old, ignore_errors=True)
    folder = path.with_name(f".{path.name}.{os.getpid()}.part")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def runs(process: int) -> bool:
    """Whether a process with this number runs here, whoever it belongs to."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def link_or_copy(file: Path, target: Path) -> None:
    """Make `target` another name of `file`, or a copy where the file system has no hard links.

    A link, as in the hub's cache, is followed: another name of the link itself would lead nowhere from another folder.
    """
    try:
        os.link(file.resolve(), target)
    except OSError:
        shutil.copy2(file, target)
