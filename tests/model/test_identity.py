"""Which model it is: the same wherever it lies, another one whatever its size and time."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from small_model import write_model

from compress.model import identity as identity_module
from compress.model.checkpoint import Checkpoint
from compress.model.identity import identity


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


def of(folder: Path, tmp_path: Path) -> str:
    return identity(Checkpoint(folder), tmp_path / "cache")


def test_a_copy_is_the_same_model(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    os.utime(tmp_path / "elsewhere" / "copy" / "model.safetensors", (1, 1))
    assert of(model, tmp_path) == of(tmp_path / "elsewhere" / "copy", tmp_path)
    assert of(model, tmp_path) == identity(Checkpoint(model), tmp_path / "another cache")


def test_one_other_number_is_another_model_whatever_size_and_time_say(model: Path, tmp_path: Path) -> None:
    file, before = model / "model.safetensors", of(model, tmp_path)
    stat = file.stat()
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] += 1
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert of(model, tmp_path) != before


def test_config_counts(model: Path, tmp_path: Path) -> None:
    before = of(model, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert of(model, tmp_path) != before


def test_a_file_is_read_through_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(model, tmp_path)

    def refuse(file: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(identity_module, "content_digest", refuse)
    assert of(model, tmp_path) == before
    (tmp_path / "cache" / "digests.json").write_text("damaged")
    with pytest.raises(AssertionError, match="read again"):
        of(model, tmp_path)
