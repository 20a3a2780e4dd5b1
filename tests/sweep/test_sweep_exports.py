"""Points of a sweep that export: refused and counted before any work, promoted with what they have, or not kept."""

import json
import re
from pathlib import Path

import pytest
import yaml
from command import invoke
from gguf import GGUFReader
from onnx_files import refusing
from small_model import write_model
from workers_here import Here

from compress.records import Report, read_record
from compress.system.fingerprint import sha256
from compress.system.units import parse_size


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


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_no_point_could_export_is_refused_of_all_at_once(folder: Path, dry: list[str]) -> None:
    recipe = yaml.safe_load((folder / "r.yaml").read_text())
    recipe["export"] = ["gguf", {"to": "onnx", "python": str(refusing(folder / "python", "no").python)}]
    recipe["stages"][0]["ignore"] = ["*.down_proj"]
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = invoke("sweep", folder / "r.yaml", "--device", "cpu", "--over", "stages.0.bits=4,8", *dry)
    assert done.exit_code == 2 and Here.made == []
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition(": export.1: ")[0] for line in said] == ["error: bits=4", "error: bits=8"]
    assert all("model.layers.0.mlp.down_proj and " in line and "kept their weights" in line for line in said)
    assert not (folder / "out").exists() or not any((folder / "out").iterdir())


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_llama_cpp_can_not_have_is_refused_of_all_at_once(folder: Path, dry: list[str]) -> None:
    recipe = yaml.safe_load((folder / "r.yaml").read_text())
    recipe["stages"] = [{"kind": "quantize", "format": "gguf", "type": "q8_0", "method": "rtn"}]
    recipe["export"] = []
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    file = Path(recipe["model"]) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    done = invoke("sweep", folder / "r.yaml", "--device", "cpu", "--over", "stages.0.type=q8_0,q4_0", *dry)
    assert done.exit_code == 2 and Here.made == []
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition(" can't hold")[0] for line in said] == [
        f"error: type={kind}: stages.0.format: gguf" for kind in ("q8_0", "q4_0")
    ]


def test_something_of_the_users_in_a_points_place_is_told_by_its_name(folder: Path) -> None:
    file = folder / "out" / "points" / "bits=4" / "tiny-bits=4.gguf"
    file.parent.mkdir(parents=True)
    file.write_text("years of work")
    done = invoke("sweep", folder / "r.yaml", "--device", "cpu", "--over", "stages.0.bits=4,8", "--dry-run")
    assert done.exit_code == 2 and f"error: bits=4: {file}: exists, and was not written by dscompress" in done.stderr
    assert file.read_text() == "years of work"


def test_a_dry_run_counts_them(folder: Path) -> None:
    """In the work folder and beside the checkpoints: the bytes of the tensors that are there in the end."""
    arguments = ["sweep", folder / "r.yaml", "--over", "stages.0.bits=4,8", "--dry-run"]
    (found,) = [line for line in invoke(*arguments).stdout.splitlines() if line.startswith("disk: ")]
    (bare,) = [
        line for line in invoke(*arguments, "--set", "export=[]").stdout.splitlines() if line.startswith("disk: ")
    ]
    line = (
        r"disk: about (.+) in the work folder while it runs; the 2 checkpoints are ([^,]+)"
        r"(?:, their exports about (.+))?"
    )
    sizes, alone = [
        [parse_size(each or "") or 0 for each in re.fullmatch(line, text).groups()]  # type: ignore[union-attr]
        for text in (found, bare)
    ]
    assert sizes[1] == alone[1] and alone[2] == 0
    assert sizes[0] - alone[0] == pytest.approx(sizes[2], rel=0.02)  # .gguf files want no room but their own
    sweep(folder)
    written = [tensor.n_bytes for file in (folder / "out").rglob("*.gguf") for tensor in GGUFReader(file).tensors]
    assert sizes[2] == pytest.approx(sum(written), rel=0.01)


def test_what_is_not_kept_has_none(folder: Path) -> None:
    sweep(folder, "--keep", "none")
    assert len(list((folder / "out").rglob("report.html"))) == 2
    assert not [file for file in folder.rglob("*") if file.suffix == ".gguf"]
    refused = invoke("sweep", "promote", folder / "out", "bits=8", "--output", folder / "best")
    assert refused.exit_code == 2 and "were not kept" in refused.stderr
