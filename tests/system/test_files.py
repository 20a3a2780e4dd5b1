"""Files that are given another name."""

import os
from pathlib import Path

import pytest

from compress.system.files import link_or_copy


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A file of the hub's cache: a relative link from the folder of a revision to where the bytes are."""
    blob = tmp_path / "cache" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("weights")
    link = tmp_path / "cache" / "snapshots" / "main" / "model.safetensors"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path("..") / ".." / "blobs" / "0123")
    return link


@pytest.mark.parametrize("links", [True, False])
def test_what_a_relative_link_leads_to_gets_another_name(
    links: bool, snapshot: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise OSError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "out.safetensors"
    link_or_copy(snapshot, target)
    assert not target.is_symlink() and target.read_text() == "weights"
    assert target.samefile(snapshot) == links
