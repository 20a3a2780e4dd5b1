"""Digests: of values, of files, of many files at once."""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_BLOCK, _PIECE = 1 << 26, 1 << 20


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


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all files of a folder, by their paths inside it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor() as pool:
        names = (file.relative_to(folder).as_posix() for file in files)
        return dict(zip(names, pool.map(sha256, files), strict=True))


def content_digest(file: Path) -> str:
    """Digest of all of a file's bytes, in hexadecimal digits, computed on all cores.

    It is the BLAKE2b of the BLAKE2b digests of the file's blocks of 64 MiB.
    """
    with file.open("rb") as opened, ThreadPoolExecutor() as pool:
        descriptor, length = opened.fileno(), os.fstat(opened.fileno()).st_size

        def block_digest(start: int) -> bytes:
            digest = hashlib.blake2b(digest_size=32)
            for piece in _pieces(start, min(start + _BLOCK, length)):
                digest.update(os.pread(descriptor, piece.stop - piece.start, piece.start))
            return digest.digest()

        blocks = list(pool.map(block_digest, range(0, length, _BLOCK)))
    return hashlib.blake2b(b"".join(blocks), digest_size=32).hexdigest()


def _pieces(start: int, stop: int) -> Iterator[range]:
    """What is read at once: little, since every core reads."""
    yield from (range(first, min(first + _PIECE, stop)) for first in range(start, stop, _PIECE))
