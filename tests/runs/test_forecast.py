"""What a run is expected to take: said by a dry run, kept in the record beside what was measured."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from command import invoke
from finished import FinishedRun

from compress.records import Stage
from compress.runs import foreseen
from compress.runs.foreseen import place_of
from compress.stages.contract import Place


def dry(run: FinishedRun, *more: object) -> dict[str, str]:
    """Lines of a dry run by their labels."""
    result = invoke(*run.arguments, *more, "--dry-run")
    assert result.exit_code == 0, result.stderr
    return dict(line.split(maxsplit=1) for line in result.stdout.splitlines())


def test_the_record_has_both(finished_run: FinishedRun) -> None:
    stage = Stage.model_validate(finished_run.report["stages"][0])
    found = stage.forecast
    assert found is not None and found.memory_bytes and stage.peak_memory_bytes and found.seconds
    stored = sum(file.stat().st_size for file in finished_run.output.glob("*.safetensors"))
    assert found.output_bytes == stage.bytes == stored and not found.about
    assert found.memory_bytes == pytest.approx(stage.peak_memory_bytes, rel=0.4)  # other tests' memory is in it
    assert found.seconds == pytest.approx(stage.seconds, rel=0.9) and found.gpu_memory_bytes is None
    assert "Planned and measured" in (finished_run.output / "report.md").read_text()


def test_a_dry_run_says_what_an_earlier_run_took(finished_run: FinishedRun, tmp_path: Path) -> None:
    assert "when it ran before" in dry(finished_run)["time"]
    nothing = "not known before its first layer is done"
    assert dry(finished_run, "--work-dir", tmp_path)["time"] == nothing
    assert dry(finished_run, "--set", "stages.0.bits=3")["time"] == nothing
    assert dry(finished_run, "--device", "cuda")["time"] == nothing
    work = shutil.copytree(finished_run.work, tmp_path / "work")
    for record in work.glob("stages/*/dscompress.json"):
        record.write_text("{}")  # of a version that says something else
    assert dry(finished_run, "--work-dir", work)["time"] == nothing


def test_a_dry_run_says_the_memory_of_the_device(finished_run: FinishedRun) -> None:
    assert "GPU" not in dry(finished_run)["memory"]
    words = dry(finished_run, "--device", "cuda")["memory"]
    assert "on the GPU (8 x 128 calibration tokens)" in words
    assert dry(finished_run, "--device", "cuda:1", "--set", "stages.0.method=rtn")["memory"].endswith("on the GPU")


@pytest.mark.parametrize(
    ("device", "limit", "tool", "bf16", "place"),
    [
        ("cpu", None, True, True, Place("cpu", 2, 1000)),
        ("cpu", 400, True, False, Place("cpu", 4, 400)),
        ("cpu", 4000, False, True, Place("cpu", 2, 1000)),
        ("auto", None, False, True, Place("cpu", 2, 1000)),
        ("auto", None, True, False, Place("cuda", 2, None)),
        ("cuda:1", 400, False, False, Place("cuda", 2, 400)),
    ],
)
def test_where_a_run_would_happen(
    device: str, limit: Any, tool: bool, bf16: bool, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreseen.shutil, "which", lambda name: "/bin/nvidia-smi" if tool else None)
    monkeypatch.setattr(foreseen, "free_here", lambda: 1000)
    monkeypatch.setattr(foreseen, "fast_bf16", lambda: bf16)
    assert place_of(device, limit) == place
