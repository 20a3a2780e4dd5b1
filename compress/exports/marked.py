"""Folders that exports write: which of them are ours, and may be replaced."""

from pathlib import Path

from compress.errors import OutputError

MARK = "dscompress-export.json"  # a folder with this file is ours


def check_replaceable(folder: Path) -> None:
    """Refuse to write over what is not ours.

    Raises:
        OutputError: naming the folder.
    """
    if folder.is_file():
        raise OutputError(f"{folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise OutputError(f"{folder}: exists, and was not written by dscompress; name another folder, or remove it")
