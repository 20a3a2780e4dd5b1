"""Which model a checkpoint is: by its content, so that a copy is the same and another fine-tune never is."""

import json
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
    kept = cache / DIGESTS
    known: dict[str, list[Any]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(kept.read_text(encoding="utf-8"))
    found = {}
    for file in checkpoint.files:
        stat = file.stat()
        state = [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
        name = str(file.absolute())
        earlier = known.get(name, [None, ""])
        found[name] = earlier if earlier[0] == state else [state, content_digest(file)]
    if any(known.get(name) != entry for name, entry in found.items()):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, json.dumps(known | found))
    return fingerprint("base", checkpoint.config, [[Path(name).name, digest] for name, (_, digest) in found.items()])
