"""Folders that exports write: which of them are ours, and may be replaced, and what is said of them."""

import json
import shlex
from pathlib import Path

from compress.errors import OutputError
from compress.system.units import size

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


def folder_facts(folder: Path, total: int, weights: int, graph: str, carried: int, code: str) -> list[tuple[str, str]]:
    """What was written, a word and what it says, for people.

    Args:
        folder: the folder.
        total: bytes of all its files.
        weights: bytes of the graph and its data.
        graph: the graph's file.
        carried: how many matrices have the checkpoint's own codes.
        code: Python that runs it, with {} where the folder goes.
    """
    rows = [
        ("folder", str(folder)),
        ("size", f"{size(total)} ({total:,} bytes, {weights:,} of them {graph} and its data)"),
    ]
    if carried:
        rows.append(("codes", f"{carried} matrices have the checkpoint's own codes, unchanged"))
    return [*rows, ("run", f"python -c {shlex.quote(code.format(json.dumps(str(folder))))}")]
