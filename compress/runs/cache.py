"""Looks after a work folder: what it holds, and deleting what no run is using."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import OutputError
from compress.model.identity import DIGESTS
from compress.system.locks import FileLock, InUseError, remove_unused_locks

_KINDS = ("base", "stages", "scores", "texts", "teachers", "evaluations", "answers", "gguf", "exports")


@dataclass(frozen=True)
class CacheEntry:
    """One thing in a work folder."""

    kind: str
    path: Path
    bytes: int


def cache_entries(work: Path) -> list[CacheEntry]:
    """What a work folder holds.

    Raises:
        OutputError: no such work folder.
    """
    there = work.is_dir() and not (any(work.iterdir()) and not any((work / kind).is_dir() for kind in _KINDS))
    if not there:
        raise OutputError(f"{work}: no work folder of dscompress; give the .dscompress beside an output")
    entries = [(kind, path) for kind in _KINDS if (work / kind).is_dir() for path in sorted((work / kind).iterdir())]
    return [CacheEntry(kind, path, _size(path)) for kind, path in entries if path.suffix != ".lock"]


def clean_cache(work: Path) -> int:
    """Delete everything in a work folder that no run is using; returns the bytes freed."""
    freed = 0
    for entry in cache_entries(work):
        key = entry.path.name.partition(".")[0]
        lock = FileLock(entry.path.with_name(f"{key}.lock"))
        with lock:
            try:
                lock.acquire(exclusive=True)
            except InUseError:
                continue
            if entry.path.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                entry.path.unlink(missing_ok=True)
            freed += entry.bytes
    (work / DIGESTS).unlink(missing_ok=True)
    remove_unused_locks(work)
    return freed


def drop_artefact(work: Path, key: str) -> None:
    """Delete what a stage has made, and what was exported of it, unless a run is using it."""
    for note in (work / "exports").glob("*.json"):
        kept = json.loads(note.read_text(encoding="utf-8"))
        if kept.get("stage") == key:
            _drop(work / "exports", note.stem, [note, note.with_name(f"{note.stem}.said.json")])
    _drop(work / "stages", key, [work / "stages" / f"{key}.probe.safetensors"])


def _drop(folder: Path, key: str, files: Sequence[Path]) -> None:
    """Delete a folder called by its key, and files beside it."""
    with FileLock(folder / f"{key}.lock") as lock:
        try:
            lock.acquire(exclusive=True)
        except InUseError:
            return
        shutil.rmtree(folder / key, ignore_errors=True)
        for file in files:
            file.unlink(missing_ok=True)


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
