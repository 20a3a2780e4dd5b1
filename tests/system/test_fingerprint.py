"""Digests of files."""

import hashlib
from pathlib import Path

import pytest

from compress.system import fingerprint
from compress.system.fingerprint import content_digest


@pytest.mark.parametrize("size", [0, 1, 100, 101, 1000])
def test_a_content_digest_is_that_of_the_digests_of_blocks(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 100)
    content = bytes(i % 251 for i in range(size))
    (tmp_path / "file").write_bytes(content)
    of_blocks = [hashlib.blake2b(content[i : i + 100], digest_size=32).digest() for i in range(0, size, 100)]
    assert content_digest(tmp_path / "file") == hashlib.blake2b(b"".join(of_blocks), digest_size=32).hexdigest()


@pytest.mark.parametrize("place", [0, 150, 999])
def test_each_byte_counts(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_BLOCK", 100)
    content = bytearray(1000)
    (tmp_path / "a").write_bytes(content)
    content[place] = 1
    (tmp_path / "b").write_bytes(content)
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")
