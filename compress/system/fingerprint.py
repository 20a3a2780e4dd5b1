"""Digests: of values, of files, of many files at once."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BLOCK = 64 << 20


def fingerprint(*parts: Any) -> str:
    """A short digest of anything that JSON can hold; equal parts give equal digests in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files, by their names."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))


def content_digest(file: Path) -> str:
    """Digest of a file's bytes, made of those of its blocks of 64 MiB, which are hashed on all cores (BLAKE2b)."""

    def of_block(start: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(start)
            return hashlib.blake2b(opened.read(_BLOCK), digest_size=32).digest()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.blake2b(
            b"".join(pool.map(of_block, range(0, file.stat().st_size, _BLOCK))), digest_size=32
        ).hexdigest()
