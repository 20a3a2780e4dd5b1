"""`tracker:` of a recipe: the report's figures, once, at the end; the trackers' packages are stood in for."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command import invoke
from finished import FinishedRun
from small_model import write_model
from tracker_here import Package
from trained import context, log_of, spec, train, trained, write_text

from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import bundled_dir
from compress.records import Report
from compress.runs.tracked import track
from compress.served_records import Served, ServedPace, ServedSpeed
from compress.sweeps.points import load_sweep
from compress.sweeps.prepare import prepare
from compress.system.progress import Reporter


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package("wandb")
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_one_run_has_the_recipe_and_the_figures_of_the_report(
    finished_run: FinishedRun, tmp_path: Path, package: Package
) -> None:
    done = invoke(*finished_run.arguments, "--output", tmp_path / "out", "--set", "tracker=wandb")
    assert done.exit_code == 0 and "finished before" in done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (begun, defined, (logged, values, _), ended) = package.asked
    assert begun == ("init", {"project": "dscompress", "name": "finished", "config": report["recipe"]})
    assert report["recipe"]["tracker"] == "wandb" and report["recipe"]["stages"][0]["kind"] == "quantize"
    assert (defined[0], logged, ended) == ("define_metric", "log", ("finish", {}))
    assert all(isinstance(value, int | float) for value in values.values())
    stage, quality = report["stages"][0], report["quality"]
    expected = {f"stages/1_quantize/{name}": stage[name] for name in ("seconds", "bytes", "parameters", "kl")}
    expected |= {"stages/1_quantize/perplexity": stage["perplexity"], "result/size_ratio": report["size_ratio"]}
    expected |= {"stages/1_quantize/peak_memory_bytes": stage["peak_memory_bytes"], "step": 0}
    expected |= {"result/kl": quality["kl"]["mean"], "result/top1": quality["top1_agreement"]["mean"]}
    expected |= {"result/perplexity": quality["perplexity"]["compressed"]}
    expected |= {"base/perplexity": quality["perplexity"]["base"], "base/bytes": report["base"]["bytes"]}
    expected |= {"result/bits_per_weight": report["compressed"]["bits_per_weight"]}
    assert {name: values[name] for name in expected} == expected
    assert stage["peak_gpu_memory_bytes"] is None and "stages/1_quantize/peak_gpu_memory_bytes" not in values


def test_tasks_and_an_engines_speed_are_among_the_figures(finished_run: FinishedRun, package: Package) -> None:
    pace = ServedPace(
        prefill_tokens_per_second=900, decode_tokens_per_second=30, loaded_bytes=5, peak_bytes=7, waited=0
    )
    speed = ServedSpeed(
        prompt_tokens=1, new_tokens=1, rounds=1, threads=1, cache_bytes=0, base=pace, compressed=pace
    )  # fmt: skip
    given = json.loads(json.dumps(finished_run.report))
    task = {"base": 0.5, "compressed": 0.25, "delta": -0.25, "ci95": None, "p_value": None, "n": 4}
    given["quality"]["tasks"] = {"arc_easy": task}
    report = Report.model_validate(given).model_copy(
        update={"served": Served(engine="vLLM", opened=True, passed=True, speed=speed)}
    )
    track(report, "wandb", Path("nowhere"), Reporter(quiet=True))
    values = package.asked[2][1]
    assert (values["base/tasks.arc_easy"], values["result/tasks.arc_easy"]) == (0.5, 0.25)
    assert values["served/vLLM/decode_tokens_per_second"] == 30 and values["served/vLLM/peak_bytes"] == 7


@pytest.mark.parametrize("name", ["init", "log"])
def test_a_tracker_that_fails_loses_nothing(
    name: str, finished_run: FinishedRun, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nmore of it")

    setattr(package, name, fails)
    report = Report.model_validate(finished_run.report)
    track(report, "wandb", Path("nowhere"), Reporter(quiet=True))
    why = "ConnectionError: no route to host more of it"
    said = f"tracker: wandb did not take the figures ({why}); they are in {finished_run.output}"
    assert capsys.readouterr().err == f"warning: {said}\n"


def test_one_that_is_not_installed_is_refused_before_any_work(
    finished_run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.chdir(tmp_path)
    done = invoke(*finished_run.arguments, "--output", "out", "--work-dir", "work", "--set", "tracker=wandb")
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert done.stderr == "error: tracker: wandb is not installed; pip install wandb, or remove tracker\n"


@pytest.mark.parametrize(("own", "used"), [(None, "wandb"), ("trackio", "trackio")])
def test_stages_that_train_log_to_the_recipes_tracker_unless_they_name_one(
    own: str | None, used: str, tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Package("trackio")
    monkeypatch.setitem(sys.modules, "trackio", other)
    base = Checkpoint(write_model(tmp_path / "model"))
    there = replace(context(tmp_path / "work", base), tracker="wandb", tracked="a run")
    stage = spec(write_text(tmp_path / "text.jsonl"), steps=2, tracker=own)
    assert stage.identity() == spec(tmp_path / "text.jsonl", steps=2).identity()
    with torch.enable_grad():
        train(base, tmp_path / "out", stage, there)
    asked, unasked = (package, other) if used == "wandb" else (other, package)
    assert asked.asked[0][1]["name"] == "a run/finetune-out" and asked.asked[-1][0] == "finish" and not unasked.asked
    assert sum("loss" in values[0] for name, *values in asked.asked if name == "log") == 2


def test_each_stage_that_trains_is_a_run_of_its_own_and_the_report_another(tmp_path: Path, package: Package) -> None:
    """So that a second stage, which begins at step 0 again, hides nothing of the first."""
    stage = {
        "kind": "finetune", "data": {"source": str(write_text(tmp_path / "text.jsonl")), "sequence_length": 32},
        "batch_size": 2, "held_out": 2, "tokens": 128, "learning_rate": 1e-3,
    }  # fmt: skip
    recipe = {
        "name": "a run", "model": str(write_model(tmp_path / "model")), "stages": [stage, stage], "evaluate": False,
        "output": "out", "tracker": "wandb",
    }  # fmt: skip
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    done = invoke("run", tmp_path / "r.json", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    first, second, report = [values[0]["name"] for name, *values in package.asked if name == "init"]
    assert first != second and report == "a run"
    assert all(re.fullmatch(r"a run/finetune-[0-9a-f]{8}", name) for name in (first, second))


def test_tensorboard_has_a_folder_for_each_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders: list[str] = []

    class Writer:
        def __init__(self, folder: str, **_: int) -> None:
            folders.append(folder)

        def __getattr__(self, name: str) -> Any:
            return lambda *_: None

    package = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "here")
    base = Checkpoint(write_model(tmp_path / "model"))
    there = replace(context(tmp_path / "work", base), tracker="tensorboard", tracked="a run")
    stage = spec(write_text(tmp_path / "text.jsonl"), steps=1)
    with torch.enable_grad():
        for name in ("0123456789.part", "abcdef0123.part"):
            train(base, tmp_path / name, stage, there)
    runs = tmp_path / "work" / "tensorboard" / "a run"
    assert folders == [str(runs / "finetune-01234567"), str(runs / "finetune-abcdef01")]


@pytest.mark.parametrize("name", ["init", "log", "finish"])
def test_training_goes_on_without_a_tracker_that_fails(
    name: str, tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(package, name, fails)
    base = Checkpoint(write_model(tmp_path / "model"))
    there = replace(context(tmp_path / "work", base), tracker="wandb")
    with torch.enable_grad():
        record = train(base, tmp_path / "out", spec(write_text(tmp_path / "text.jsonl"), steps=2), there)
    assert trained(record).steps == 2
    assert [line["step"] for line in log_of(tmp_path / "out") if "loss" in line] == [1, 2]
    (warning,) = there.reporter.warnings
    assert warning.startswith(
        "tracker: wandb failed (ConnectionError: no route to host) and gets no more of this training; "
    )


def test_points_of_a_sweep_are_the_same_with_another_tracker(
    tmp_path: Path, tiny_model: Path, package: Package
) -> None:
    text = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
    keys = []
    for tracker in ("null", "wandb"):
        recipe = {"name": "r", "model": str(tiny_model), "calibration": {"source": str(text)}, "output": "out"}
        recipe["stages"] = [{"kind": "quantize", "method": "rtn"}]
        (tmp_path / "r.json").write_text(json.dumps(recipe))
        job = load_sweep(str(tmp_path / "r.json"), over=["stages.0.bits=3,4"], overrides=[f"tracker={tracker}"])
        assert job.points[0].recipe.tracker == (None if tracker == "null" else tracker)
        prepared = prepare(job, tmp_path / "work", Reporter(quiet=True))
        keys.append([prepared.key(point, prepared.plans[point.name]) for point in job.points])
    assert keys[0] == keys[1] and keys[0][0] != keys[0][1]


def test_tensorboard_reads_the_figures_in_its_files(finished_run: FinishedRun, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = Report.model_validate(finished_run.report)
    track(report, "tensorboard", tmp_path, Reporter(quiet=True))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "finished"))
    events.Reload()
    assert report.quality is not None
    (kl,) = events.Scalars("result/kl")
    assert (kl.step, kl.value) == (0, pytest.approx(report.quality.kl.mean, rel=1e-6))
    assert "stages/1_quantize/bytes" in events.Tags()["scalars"]
    (text,) = events.Tensors("settings/text_summary")
    assert "kind: quantize" in text.tensor_proto.string_val[0].decode()
