"""A sweep from the command to its table: what is shared is made once, what is finished never, whoever makes it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import yaml
from command import invoke
from small_model import write_model
from stock_here import asking_within
from workers_here import Here

import compress
from compress.errors import UserError
from compress.recipe.schema import bundled_dir
from compress.records import Report
from compress.report.figures import duration
from compress.sweep_records import Sweep
from compress.sweeps.prepare import read_sweep

TEXT = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
OVER = ["--over", "stages.0.shape.intermediate_size=64,32", "--over", "stages.1.bits=4,8"]


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> type[Here]:
    Here.made, Here.said = [], []
    monkeypatch.setattr("compress.sweeps.driver.LocalWorkers", Here)
    return Here


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "small")


def write(folder: Path, model: Path, **more: Any) -> Path:
    recipe = {
        "name": "tiny", "model": str(model), "output": "out",
        "calibration": {"source": str(TEXT), "samples": 4, "sequence_length": 64},
        "stages": [
            {"kind": "prune", "shape": {"intermediate_size": 64}},
            {"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 32},
        ],
        "evaluate": {"sequence_length": 64, "windows": 2, "prompts": []},
    } | more  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def sweep(folder: Path, *arguments: object, code: int = 0) -> Sweep:
    result = invoke("sweep", folder / "r.yaml", "--device", "cpu", *arguments)
    assert result.exit_code == code, result.stderr
    found = read_sweep(folder / "out")
    assert found is not None
    return found


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.rglob("*.safetensors")) if file.is_file()}


def results(folder: Path) -> dict[str, dict[str, bytes]]:
    return {point.name: weights(point) for point in sorted((folder / "out" / "points").iterdir()) if point.is_dir()}


def table(found: Sweep) -> list[dict[str, Any]]:
    """What does not hang on how long things took."""
    timed = ("seconds", "peak_gpu_memory_bytes", "loaded_bytes", "decode", "prefill")
    rows = []
    for point in sorted(found.points, key=lambda each: each.name):
        figures = {name: value for name, value in point.figures.items() if name not in timed}
        rows.append(point.model_dump(exclude={"seconds", "figures", "folder", "key"}) | {"figures": figures})
    return rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A finished sweep of four points."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.sweeps.driver.LocalWorkers", Here)
        sweep(folder, *OVER)
    return folder


def test_points_are_what_runs_of_their_recipes_make(whole: Path, tmp_path: Path) -> None:
    record = read_sweep(whole / "out")
    assert record is not None and [point.status for point in record.points] == ["done"] * 4
    recipe = json.loads((whole / "out" / "points" / "intermediate_size=32,bits=8" / "report.json").read_text())[
        "recipe"
    ]
    alone = compress.run(recipe, output=tmp_path / "alone", work_dir=tmp_path / "work", device="cpu")
    assert alone is not None
    assert weights(tmp_path / "alone") == weights(whole / "out" / "points" / "intermediate_size=32,bits=8")
    (point,) = [point for point in record.points if point.name == "intermediate_size=32,bits=8"]
    assert alone.quality is not None
    assert point.figures["kl"] == alone.quality.kl.mean and point.figures["bytes"] == alone.compressed.bytes
    assert point.settings == {"stages.0.shape.intermediate_size": 32, "stages.1.bits": 8}
    assert record.base["kl"] == 0 and record.base["perplexity"] == alone.quality.perplexity.base


def test_what_points_share_is_made_once(whole: Path) -> None:
    stages = [path for path in (whole / ".dscompress" / "stages").iterdir() if path.is_dir()]
    assert len(stages) == 2 + 4  # pruned to two sizes, each quantized in two ways
    cached = []
    for point in ("intermediate_size=64,bits=4", "intermediate_size=64,bits=8"):
        report = Report.model_validate_json((whole / "out" / "points" / point / "report.json").read_text())
        cached.append([stage.cached for stage in report.stages])
    assert cached == [[False, False], [True, False]]
    hidden = list((whole / ".dscompress" / "evaluations").glob("*.safetensors"))
    assert len(hidden) == 1  # of the base


def test_the_same_command_makes_nothing_again_and_a_new_point_costs_itself_alone(whole: Path, here: type[Here]) -> None:
    before = results(whole)
    record = sweep(whole, *OVER)
    assert here.made == [] and [point.status for point in record.points] == ["done"] * 4
    more = ["--over", "stages.0.shape.intermediate_size=32", "--over", "stages.1.bits=4,8,3"]
    record = sweep(whole, *more)
    assert here.made == ["intermediate_size=32,bits=3"] and len(record.points) == 3
    assert {name: files for name, files in results(whole).items() if name in before} == before
    sweep(whole, *OVER)  # the table has what is asked for, and the others are made again only if they are not there
    assert here.made == ["intermediate_size=32,bits=3"]


def test_another_text_or_model_makes_points_again(model: Path, tmp_path: Path, here: type[Here]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One sentence after another fills the text. " * 400)
    calibration = {"source": str(text), "samples": 4, "sequence_length": 64}
    own = shutil.copytree(model, tmp_path / "model")
    write(tmp_path, own, calibration=calibration)
    over = ["--over", "stages.1.bits=8"]
    sweep(tmp_path, *over)
    sweep(tmp_path, *over)
    assert len(here.made) == 1
    text.write_text("Another sentence fills another text, as it were. " * 400)
    sweep(tmp_path, *over)
    assert len(here.made) == 2
    tensors = dict(np_tensors(own / "model.safetensors"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save(tensors, own / "model.safetensors")
    sweep(tmp_path, *over)
    assert len(here.made) == 3


def np_tensors(file: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(file)  # type: ignore[no-any-return]


def save(tensors: dict[str, Any], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, {"format": "pt"})


def test_a_point_that_fails_is_told_and_stops_no_other(
    model: Path, tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, model)
    run = compress.run

    def failing(recipe: dict[str, Any], **rest: Any) -> Any:
        if recipe["stages"][1].get("bits") == 8:
            raise ValueError("broken\nin two lines")
        return run(recipe, **rest)

    monkeypatch.setattr(compress, "run", failing, raising=False)
    record = sweep(tmp_path, "--over", "stages.1.bits=8,4", code=1)
    assert [(point.status, point.error) for point in record.points] == [
        ("failed", "ValueError: broken"), ("done", None),
    ]  # fmt: skip
    page = (tmp_path / "out" / "sweep.html").read_text()
    assert "ValueError: broken" in page and any("Traceback" in line for line in here.said)
    monkeypatch.setattr(compress, "run", run)
    here.made.clear()
    record = sweep(tmp_path, "--over", "stages.1.bits=8,4")
    assert here.made == ["bits=8"] and [point.status for point in record.points] == ["done", "done"]


def test_a_result_that_is_not_verified_is_no_point_of_the_frontier(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, model)
    monkeypatch.setattr("compress.runs.measure.opening", _failed)
    record = sweep(tmp_path, "--over", "stages.1.bits=4", code=1)
    (point,) = record.points
    assert point.status == "failed" and point.error is not None and point.error.startswith("verification failed")
    assert not point.on_frontier


@contextmanager
def _failed(*_: Any, **__: Any) -> Iterator[Any]:
    from compress.evaluation.verify import Opened
    from compress.records import Verified

    verified = Verified(loader="transformers", max_logit_difference=9.0, tolerance=0.1, passed=False)
    yield lambda expected: Opened(verified, None)


def test_keep_decides_whose_weights_stay_and_reports_always_do(model: Path, tmp_path: Path, here: type[Here]) -> None:
    write(tmp_path, model)
    over = ["--over", "stages.0.shape.intermediate_size=64,32", "--over", "stages.1.bits=8"]
    record = sweep(tmp_path, *over, "--keep", "none")
    assert [point.kept for point in record.points] == [False, False]
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert len(list((tmp_path / "out").rglob("report.html"))) == 2
    here.made.clear()
    sweep(tmp_path, *over, "--keep", "none")
    assert here.made == []
    refused = invoke("sweep", "promote", tmp_path / "out", "intermediate_size=64,bits=8", "--output", tmp_path / "best")
    assert refused.exit_code == 2 and "were not kept" in refused.stderr and "--keep all" in refused.stderr
    record = sweep(tmp_path, *over)
    assert len(here.made) == 2 and [point.kept for point in record.points] == [True, True]


def test_best_deletes_nothing_that_can_not_be_judged(model: Path, tmp_path: Path) -> None:
    write(tmp_path, model, evaluate=False)
    record = sweep(tmp_path, "--over", "stages.1.bits=4,8", "--keep", "best")
    assert [point.kept for point in record.points] == [True, True] and len(results(tmp_path)["bits=4"]) == 1
    with pytest.raises(UserError, match="'Best' is not known; use all, best, none"):
        compress.sweep(tmp_path / "r.yaml", over=["stages.1.bits=4"], keep="Best")  # type: ignore[arg-type]


def test_points_that_can_not_be_compared_are_refused(model: Path, tmp_path: Path, here: type[Here]) -> None:
    write(tmp_path, model)
    for over in ("evaluate.sequence_length=32,64", "revision=a,b"):
        result = invoke("sweep", tmp_path / "r.yaml", "--over", over)
        assert result.exit_code == 2 and "can't be compared" in result.stderr and here.made == []


def test_what_was_measured_otherwise_is_made_again(model: Path, tmp_path: Path, here: type[Here]) -> None:
    """As on another kind of device."""
    write(tmp_path, model)
    sweep(tmp_path, "--over", "stages.1.bits=4")
    file = tmp_path / "out" / "points" / "bits=4" / "report.json"
    report = json.loads(file.read_text())
    report["quality"]["dtype"] = "float64"
    file.write_text(json.dumps(report))
    record = sweep(tmp_path, "--over", "stages.1.bits=4,8")
    assert here.made == ["bits=4", "bits=8", "bits=4"] and [point.status for point in record.points] == ["done"] * 2


def test_a_point_that_is_made_again_is_not_finished_meanwhile(
    model: Path, tmp_path: Path, here: type[Here], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another recipe fails half-way; back at the first one, its point is not taken for what lies there."""
    write(tmp_path, model)
    over = ["--over", "stages.1.bits=4"]
    sweep(tmp_path, *over)
    monkeypatch.setattr("compress.runs.measure.opening", _failed)
    sweep(tmp_path, *over, "--set", "stages.1.damp=0.05", code=1)
    monkeypatch.undo()
    monkeypatch.setattr("compress.sweeps.driver.LocalWorkers", Here)
    record = sweep(tmp_path, *over)
    assert len(here.made) == 3 and record.points[0].status == "done"


def test_promote_refuses_half_a_checkpoint_and_the_sweep_itself(whole: Path, tmp_path: Path) -> None:
    inside = whole / "out" / "points" / "intermediate_size=32,bits=4"
    result = invoke("sweep", "promote", whole / "out", "intermediate_size=64,bits=4", "--output", inside)
    assert result.exit_code == 2 and "lies in the sweep" in result.stderr
    torn = shutil.copytree(whole / "out", tmp_path / "torn")
    (torn / "points" / "intermediate_size=64,bits=4" / "tokenizer.json").unlink()
    result = invoke("sweep", "promote", torn, "intermediate_size=64,bits=4", "--output", tmp_path / "best")
    assert result.exit_code == 2 and "were not kept" in result.stderr


def test_promote_makes_a_point_the_checkpoint(whole: Path, tmp_path: Path) -> None:
    result = invoke("sweep", "promote", whole / "out", "intermediate_size=64,bits=4", "--output", tmp_path / "best")
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "best") == weights(whole / "out" / "points" / "intermediate_size=64,bits=4")
    report = Report.model_validate_json((tmp_path / "best" / "report.json").read_text())
    assert report.compressed.path == str(tmp_path / "best") == report.recipe["output"]
    verified = invoke("verify", tmp_path / "best", "--device", "cpu")
    assert verified.exit_code == 0, verified.stdout
    unknown = invoke("sweep", "promote", whole / "out", "intermediate_size=64,bit=4", "--output", tmp_path / "other")
    assert unknown.exit_code == 2 and "did you mean intermediate_size=64,bits=4?" in unknown.stderr
    nowhere = invoke("sweep", "promote", tmp_path, "a", "--output", tmp_path / "other")
    assert nowhere.exit_code == 2 and "no sweep" in nowhere.stderr


def test_compare_puts_runs_and_sweeps_into_one_table(whole: Path, tmp_path: Path) -> None:
    single = whole / "out" / "points" / "intermediate_size=32,bits=4"
    result = invoke(
        "compare", single, whole / "out" / "points" / "intermediate_size=32,bits=8", "--output", tmp_path / "both"
    )
    assert result.exit_code == 0, result.stderr
    record = Sweep.model_validate_json((tmp_path / "both" / "compare.json").read_text())
    theirs = read_sweep(whole / "out")
    assert theirs is not None
    wanted = {point.name: point.figures for point in theirs.points if point.name.startswith("intermediate_size=32")}
    assert {point.name: point.figures for point in record.points} == wanted
    whole_sweep = invoke("compare", whole / "out", "--output", tmp_path / "all")
    assert whole_sweep.exit_code == 0 and (tmp_path / "all" / "compare.html").is_file()


def test_compare_refuses_what_was_not_measured_alike(whole: Path, tmp_path: Path) -> None:
    point = whole / "out" / "points" / "intermediate_size=32,bits=4"
    other = shutil.copytree(point, tmp_path / "other")
    report = json.loads((other / "report.json").read_text())
    report["quality"]["perplexity"]["sequence_length"] = 128
    (other / "report.json").write_text(json.dumps(report))
    result = invoke("compare", point, other, "--output", tmp_path / "both")
    assert result.exit_code == 2 and "was not measured like" in result.stderr and "--base MODEL" in result.stderr
    report["base"]["fingerprint"] = "another"
    (other / "report.json").write_text(json.dumps(report))
    result = invoke("compare", point, other, "--output", tmp_path / "both")
    assert result.exit_code == 2 and "was made of another model" in result.stderr
    assert invoke("compare", point, point, "--output", tmp_path / "both").exit_code == 2
    nothing = invoke("compare", tmp_path, "--output", tmp_path / "both")
    assert nothing.exit_code == 2 and "has no report.json" in nothing.stderr


def test_compare_measures_any_checkpoint_against_a_base(whole: Path, model: Path, tmp_path: Path) -> None:
    point = whole / "out" / "points" / "intermediate_size=32,bits=8"
    bare = shutil.copytree(point, tmp_path / "bare", ignore=shutil.ignore_patterns("report.*", "dscompress.json"))
    result = invoke(
        "compare", bare, "--base", model, "--sequence-length", "64", "--windows", "2", "--device", "cpu",
        "--output", tmp_path / "table",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = Sweep.model_validate_json((tmp_path / "table" / "compare.json").read_text())
    report = Report.model_validate_json((point / "report.json").read_text())
    assert report.quality is not None
    assert record.points[0].figures["kl"] == pytest.approx(report.quality.kl.mean, rel=1e-6)
    assert record.points[0].figures["bytes"] == report.compressed.bytes


def test_a_dry_run_prints_what_is_shared_and_writes_nothing(model: Path, tmp_path: Path, here: type[Here]) -> None:
    write(tmp_path, model)
    result = invoke("sweep", tmp_path / "r.yaml", *OVER, "--dry-run")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line for line in lines if "once for 2 points" in line] == [lines[0], lines[3]]
    assert "4 points, 6 stages to make instead of 8; the base is measured once" in lines
    assert lines[-1].startswith("time: not known before the first point is made")
    assert here.made == [] and {path.name for path in tmp_path.iterdir()} <= {"r.yaml", ".dscompress"}


def test_a_dry_run_says_how_long_the_rest_takes_by_what_is_done(whole: Path) -> None:
    result = invoke("sweep", whole / "r.yaml", *OVER, "--dry-run")
    assert result.stdout.splitlines()[-1] == "time: nothing is left to make"
    result = invoke("sweep", whole / "r.yaml", "--over", OVER[1], "--over", "stages.1.bits=8,4,2", "--dry-run")
    made = [f"intermediate_size={size},bits={bits}" for size in (64, 32) for bits in (4, 8)]
    taken = [json.loads((whole / "out" / "points" / f"{name}.json").read_text())["seconds"] for name in made]
    assert result.stdout.splitlines()[-1] == (
        f"time: about {duration(2 * median(taken))} for the 2 that are left, one at a time, as the others took"
    )


def test_a_search_finds_the_limit_and_a_warm_one_makes_nothing(
    tiny_model: Path, tmp_path: Path, here: type[Here]
) -> None:
    search = {
        "maximize": "sparsity", "over": "stages.0.target.sparsity", "range": [0.05, 0.5], "tolerance": 0.05,
        "subject_to": {"kl": 1.0},
    }  # fmt: skip
    stages = [{"kind": "prune", "axes": ["ffn"], "target": {"sparsity": 0.1}}]
    write(tmp_path, tiny_model, stages=stages, sweep={"search": search})
    first = sweep(tmp_path)
    assert first.search is not None
    made = list(here.made)
    assert 3 <= len(made) <= 8 and "are crossed between" in first.search.note
    rows = sorted((point.settings[search["over"]], point.figures["kl"], point.name) for point in first.points)  # type: ignore[index]
    inside = [row for row in rows if row[1] <= 1.0]
    assert first.search.best == inside[-1][2] and rows[len(inside)][0] - inside[-1][0] <= 0.05 + 1e-9
    again = sweep(tmp_path)
    assert here.made == made and again.search == first.search


def test_a_search_among_values_that_a_model_does_not_have_ends_and_says_so(
    model: Path, tmp_path: Path, here: type[Here]
) -> None:
    search = {
        "minimize": "bytes", "over": "stages.0.shape.intermediate_size", "range": [32, 64], "subject_to": {"kl": 0.1},
    }  # fmt: skip
    write(tmp_path, model, sweep={"search": search})  # groups of 32 behind it
    record = sweep(tmp_path)
    kl = {point.settings["stages.0.shape.intermediate_size"]: point.figures["kl"] for point in record.points}
    assert kl.keys() == {32, 64} and kl[64] <= 0.1 < kl[32], kl
    assert record.search is not None and record.search.best == "intermediate_size=64"
    assert "failed, so the search ends" in record.search.note


def test_two_sweeps_of_one_folder_do_not_meet(whole: Path) -> None:
    from compress.system.locks import FileLock

    with FileLock(whole / ".out.lock") as lock:
        lock.acquire(exclusive=True)
        result = invoke("sweep", whole / "r.yaml", *OVER)
    assert result.exit_code == 2 and "being written by" in result.stderr


def test_the_folder_of_a_run_is_no_folder_of_a_sweep(whole: Path, tmp_path: Path, model: Path) -> None:
    write(tmp_path, model)
    shutil.copytree(whole / "out" / "points" / "intermediate_size=64,bits=4", tmp_path / "out")
    result = invoke("sweep", tmp_path / "r.yaml", *OVER)
    assert result.exit_code == 2 and "holds the result of a run" in result.stderr


def test_all_points_are_checked_against_the_model_before_the_first_is_made(
    model: Path, tmp_path: Path, here: type[Here]
) -> None:
    write(tmp_path, model)
    result = invoke("sweep", tmp_path / "r.yaml", "--over", "stages.0.shape.intermediate_size=64,33", *OVER[2:])
    assert result.exit_code == 2 and here.made == []
    lines = result.stderr.splitlines()
    assert any("intermediate_size=33,bits=4" in line for line in lines) and any(
        "intermediate_size=33,bits=8" in line for line in lines
    )


def test_a_run_refuses_a_recipe_with_a_sweep(model: Path, tmp_path: Path) -> None:
    write(tmp_path, model, sweep={"grid": {"stages.1.bits": [4, 8]}})
    result = invoke("run", tmp_path / "r.yaml")
    assert result.exit_code == 2 and "use dscompress sweep" in result.stderr
    assert invoke("validate", tmp_path / "r.yaml").exit_code == 0


# Processes


def command(folder: Path, *more: object) -> list[str]:
    return [
        sys.executable, "-m", "compress.cli", "sweep", str(folder / "r.yaml"), "--device", "cpu", *OVER, *map(str, more)
    ]  # fmt: skip


def test_processes_make_the_same_bytes_and_the_same_table(whole: Path, model: Path, tmp_path: Path) -> None:
    """Two at a time, of which one is killed in the middle, and then the sweep itself."""
    write(tmp_path, model)
    support = tmp_path / "support"
    support.mkdir()
    environment = asking_within("'compress.sweeps.local' in sys.orig_argv", support)
    started = subprocess.Popen(command(tmp_path, "--jobs", 2), stderr=subprocess.DEVNULL, env=environment)
    killed = None
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and started.poll() is None:
        record = read_sweep(tmp_path / "out")
        done = sum(point.status == "done" for point in record.points) if record is not None else 0
        if killed is None and done >= 1:
            children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
            killed = int(children[0])
            os.kill(killed, signal.SIGKILL)
        if done >= 2:
            started.kill()
        time.sleep(0.05)
    assert started.wait(60) == -signal.SIGKILL
    assert killed is not None
    ended = subprocess.run(
        command(tmp_path, "--jobs", 2), capture_output=True, text=True, timeout=240, check=False, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    found, wanted = read_sweep(tmp_path / "out"), read_sweep(whole / "out")
    assert found is not None and wanted is not None
    names = {point.name for point in found.points}
    assert results(tmp_path) == {name: files for name, files in results(whole).items() if name in names}
    assert [row["name"] for row in table(found)] == sorted(names)
