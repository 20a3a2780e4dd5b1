"""Points of a sweep that export: what is promoted has the exports, what is not kept has none."""

from pathlib import Path

import pytest
import yaml
from command import invoke
from small_model import write_model
from workers_here import Here

from compress.records import Report, read_record
from compress.system.fingerprint import sha256


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    Here.made, Here.said = [], []
    monkeypatch.setattr("compress.sweeps.driver.LocalWorkers", Here)
    monkeypatch.setattr("compress.evaluation.llama_cpp.llama_cpp_missing", lambda: "it is not here")
    recipe = {
        "name": "tiny", "model": str(write_model(tmp_path / "model")), "output": "out", "evaluate": False,
        "stages": [{"kind": "quantize", "method": "rtn", "group_size": 32, "format": "gptq"}],
        "export": ["gguf", {"to": "gguf", "type": "q8_0", "split": "200kB"}],
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def sweep(folder: Path, *more: object) -> None:
    done = invoke("sweep", folder / "r.yaml", "--device", "cpu", "--over", "stages.0.bits=4,8", *more)
    assert done.exit_code == 0, done.stderr


def test_what_is_promoted_has_its_exports(folder: Path) -> None:
    sweep(folder)
    done = invoke("sweep", "promote", folder / "out", "bits=8", "--output", folder / "best")
    assert done.exit_code == 0, done.stderr
    report = Report.model_validate_json((folder / "best" / "report.json").read_bytes())
    point = folder / "out" / "points" / "bits=8"
    names = sorted(file.name for file in point.glob("*.gguf"))
    assert names == ["tiny-bits=8-Q8_0-00001-of-00002.gguf", "tiny-bits=8-Q8_0-00002-of-00002.gguf", "tiny-bits=8.gguf"]
    assert sorted(file.name for file in (folder / "best").glob("*.gguf")) == names
    assert [export.name for export in report.exports] == [names[2], names[0]]
    record = read_record(folder / "best")
    assert record is not None and set(names) < set(record.files)
    assert {name: sha256(folder / "best" / name) for name in record.files} == record.files
    assert all((folder / "best" / name).stat().st_ino == (point / name).stat().st_ino for name in names)


def test_what_is_not_kept_has_none(folder: Path) -> None:
    sweep(folder, "--keep", "none")
    assert len(list((folder / "out").rglob("report.html"))) == 2
    assert not [file for file in folder.rglob("*") if file.suffix == ".gguf"]
    refused = invoke("sweep", "promote", folder / "out", "bits=8", "--output", folder / "best")
    assert refused.exit_code == 2 and "were not kept" in refused.stderr
