"""Tasks by the command: a run, a sweep point that shares the base's answers, a model beside itself, mistakes."""

import json
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from command import invoke
from tasks_here import answer_here

from compress.evaluation.tasks import names

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that lm-eval brings
FILES = Path(__file__).parent.parent / "data" / "tasks"
RECIPE = f"""\
name: small
model: MODEL
stages:
  - {{kind: quantize, method: rtn, bits: BITS, group_size: 64}}
evaluate: {{sequence_length: 64, windows: 2, prompts: [], tasks: [endings, last_words], task_files: {FILES}, limit: 6}}
output: OUTPUT
"""


@pytest.fixture(scope="module", autouse=True)
def _names_read_once() -> Iterator[None]:
    """lm-eval reads thousands of files to tell its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names, "_lm_eval_names", cache(names._lm_eval_names))
        yield


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread: single requests to a small model gain nothing from a second."""
    monkeypatch.setattr("compress.evaluation.tasks.ask._answer", answer_here)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def recipe(folder: Path, model: Path, bits: int) -> Path:
    file = folder / f"{bits}.yaml"
    filled = (
        RECIPE.replace("MODEL", str(model)).replace("BITS", str(bits)).replace("OUTPUT", str(folder / f"out{bits}"))
    )
    file.write_text(filled)
    return file


def tasks_of_a_dry_run(recipe: Path, work: Path) -> list[str]:
    planned = invoke("run", recipe, "--device", "cpu", "--work-dir", work, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    return [line.removeprefix("tasks").strip() for line in planned.stdout.splitlines() if line.startswith("tasks")]


def test_a_dry_run_says_what_is_asked_and_opens_no_data(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # what reads them
    file, work = recipe(tmp_path, tiny_model, 8), tmp_path / "work"
    (asked, kept) = tasks_of_a_dry_run(file, work)
    assert asked == (
        "endings, last_words: at most 6 items of each task, by base and result; their time is not foreseen"
    )
    assert kept == f"answers of the base are kept in {work / 'answers'} for all runs with it: none are there yet"
    file.write_text(file.read_text().replace("limit: 6", "fewshot: 2"))
    (asked, _) = tasks_of_a_dry_run(file, work)
    assert asked.startswith("endings, last_words: all items of each task, by base and result, 2 examples before each;")
    file.write_text(file.read_text().replace("tasks: [endings, last_words], task_files", "text: wikitext2} #"))
    assert tasks_of_a_dry_run(file, work) == [] and not work.exists()


def test_runs_report_tasks_and_share_what_the_base_answered(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")  # whose files nobody else touches
    written: dict[Path, int] = {}
    for bits in (8, 3):
        result = invoke("run", recipe(tmp_path, model, bits), "--device", "cpu", "--work-dir", tmp_path / "work")
        assert result.exit_code == 0, result.stderr
        report = json.loads((tmp_path / f"out{bits}" / "report.json").read_text())
        tasks, decision = report["quality"]["tasks"], report["quality"]["task_decision"]
        assert list(tasks) == ["endings", "last_words"]
        for task in tasks.values():
            assert {"base", "compressed", "delta", "ci95", "p_value", "n"} <= task.keys()
            assert task["n"] == 6
            assert task["delta"] == pytest.approx(task["compressed"] - task["base"])
            assert task["ci95"][0] <= task["delta"] <= task["ci95"][1]
        assert decision["n"] == 12
        assert "one request at a time" in decision["protocol"]
        assert f"over 12 items {decision['flips'][0]} turned wrong" in result.stdout
        files = {file: file.stat().st_mtime_ns for file in (tmp_path / "work" / "answers").rglob("*.jsonl")}
        assert files.items() >= written.items(), "nothing was asked of the base again"
        assert len(files) == len(written) + (2 if not written else 1)
        written = files
    (_, kept) = tasks_of_a_dry_run(recipe(tmp_path, model, 2), tmp_path / "work")
    assert kept.endswith(f"for all runs with it: {4 * 6 + 6} are there, and none of them is asked for again")
    (model / "model.safetensors").touch()  # the same to a run, which reads it to know that
    (_, kept) = tasks_of_a_dry_run(recipe(tmp_path, model, 2), tmp_path / "work")
    assert kept.endswith("for all runs with it: those that are there are not asked for again")
    listed = invoke("cache", "ls", tmp_path / "work")
    assert listed.stdout.count("answers") == 3


def test_a_model_beside_itself_shows_no_difference(tiny_model: Path, tmp_path: Path) -> None:
    arguments = ["--sequence-length", 64, "--windows", 2, "--device", "cpu", "--work-dir", tmp_path / "work", "-q"]
    asked = ["--tasks", "endings,last_words", "--task-files", FILES, "--limit", 12, "--fewshot", 0]
    result = invoke("eval", tiny_model, tiny_model, *arguments, *asked)
    assert result.exit_code == 0, result.stderr
    decision = json.loads(result.stdout)["task_decision"]
    assert (decision["verdict"], decision["p_value"]) == ("no difference shown", 1.0)
    assert (decision["delta"], decision["flips"], decision["n"]) == (0.0, [0, 0], 24)
    assert decision["smallest"] > 0.2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "evaluate.tasks=[endigns]",
            f"evaluate.tasks: endigns is no task of lm-eval or of {FILES}; did you mean endings?",
        ),
        ("evaluate.task_files=/nowhere", "evaluate.tasks: /nowhere: no such folder of task files"),
        ("evaluate.tasks=null", "evaluate.task_files: is for tasks, and there are none; add tasks: [arc_easy, ...]"),
        ("evaluate.limit=0", "evaluate.limit: 0 is not allowed; use 1 or more"),
        ("evaluate.tasks=[]", "evaluate.tasks: is empty; add at least one item"),
        ("evaluate.tasks=endings", "evaluate.tasks: 'endings' is not a list; write [a, b]"),
        ("evaluate.task=[a]", "evaluate.task: unknown key; did you mean tasks?"),
    ],
)
def test_mistakes_are_said_before_anything_is_computed(
    change: str, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    result = invoke("validate", recipe(tmp_path, tiny_model, 8), "--set", change)
    assert result.exit_code == 2
    assert said in result.stderr


def test_options_of_tasks_need_tasks(tiny_model: Path, tmp_path: Path) -> None:
    result = invoke("eval", tiny_model, tiny_model, "--limit", 3, "--work-dir", tmp_path / "work")
    assert result.exit_code == 2
    assert "--task-files, --limit, --fewshot and --chat are for tasks; name some with --tasks" in result.stderr
    result = invoke("eval", tiny_model, tiny_model, "--tasks", "endigns", "--task-files", FILES)
    assert result.exit_code == 2
    assert f"--tasks: endigns is no task of lm-eval or of {FILES}; did you mean endings?" in result.stderr
