"""Which model a checkpoint is: by its content, so that a copy is the same and another fine-tune never is."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.model.checkpoint import Checkpoint
from compress.system.files import write_text
from compress.system.fingerprint import content_digest, fingerprint

DIGESTS = "digests.json"


def identity(checkpoint: Checkpoint, cache: Path) -> str:
    """A digest of config.json and of every byte of the weights.

    Args:
        checkpoint: the model.
        cache: folder in which files' digests are kept, by what changes with each write to a file: inode, size and both
            times. A large model is read through once.
    """
    kept, known = cache / DIGESTS, _known(cache)
    found = {}
    for file in checkpoint.files:
        name, state = str(file.absolute()), _state(file)
        earlier = known.get(name, [None, ""])
        found[name] = earlier if earlier[0] == state else [state, content_digest(file)]
    if any(known.get(name) != entry for name, entry in found.items()):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(known | found))
    return _identity(checkpoint, found)


def known_identity(checkpoint: Checkpoint, cache: Path) -> str | None:
    """The same where the cache has all digests, so that no file is read or written; else None."""
    known = _known(cache)
    found = {str(file.absolute()): known.get(str(file.absolute()), [None, ""]) for file in checkpoint.files}
    same = all(found[str(file.absolute())][0] == _state(file) for file in checkpoint.files)
    return _identity(checkpoint, found) if same else None


def _known(cache: Path) -> dict[str, list[Any]]:
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = json.loads((cache / DIGESTS).read_text(encoding="utf-8"))
    return known


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _identity(checkpoint: Checkpoint, found: Mapping[str, list[Any]]) -> str:
    return fingerprint("base", checkpoint.config, [[Path(name).name, digest] for name, (_, digest) in found.items()])
