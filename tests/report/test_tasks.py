"""What reports say of tasks: the table, and the decision in one plain sentence."""

from pathlib import Path
from typing import Any

import pytest

from compress.records import Report
from compress.report.frontier import figure_of, figures_of
from compress.report.tasks import TASK_HEADS, tasks_line, tasks_view
from compress.report.write import summary_table, write_model_card, write_report
from compress.task_records import Task, TaskDecision

TASK = {
    "base": 0.416, "compressed": 0.402, "delta": -0.014, "ci95": (-0.0312, 0.0031), "p_value": 0.1153, "n": 1500,
    "metric": "acc_norm", "flips": (101, 80), "smallest": 0.0251, "holm": 0.2306, "fewshot": 0, "version": "1.0",
}  # fmt: skip
OTHER = {**TASK, "base": 0.5, "compressed": 0.505, "delta": 0.005, "p_value": 0.7, "holm": 0.7, "flips": (3, 8)}
DECISION = {
    "verdict": "no difference shown", "n": 3000, "delta": -0.0053, "ci95": (-0.0142, 0.0036), "p_value": 0.2727,
    "flips": (104, 88), "smallest": 0.0134, "level": 0.05, "method": "McNemar's exact test, two-sided, on all items",
    "protocol": "Prompts and scoring by lm-eval 0.4.13.",
}  # fmt: skip


def report_of(finished_run: Any, tasks: dict[str, Any], **decision: Any) -> Report:
    record = dict(finished_run.report)
    found = {name: Task(**task).model_dump() for name, task in tasks.items()}
    said = TaskDecision(**(DECISION | decision)).model_dump()
    record["quality"] = record["quality"] | {"tasks": found, "task_decision": said}
    return Report.model_validate(record)


@pytest.fixture
def report(finished_run: Any) -> Report:
    return report_of(finished_run, {"hellaswag": TASK, "arc_easy": OTHER})


def test_no_loss_is_said_with_what_would_have_been_found(report: Report) -> None:
    assert tasks_line(report) == (
        "No loss shown: over 3,000 items 104 turned wrong and 88 right (p = 0.27); a drop of 1.3 points or more would "
        "have been found in 4 of 5 cases. Worst task: hellaswag, -1.4 points (p = 0.23, corrected for 2 tasks)."
    )


def test_a_loss_is_said_with_its_size(finished_run: Any) -> None:
    decided = {"verdict": "worse", "p_value": 3e-9, "delta": -0.03, "ci95": (-0.041, -0.019), "flips": (160, 70)}
    assert tasks_line(report_of(finished_run, {"hellaswag": TASK}, **decided)) == (
        "A loss: over 3,000 items 160 turned wrong and 70 right (p < 0.0001), -3.0 points (95 %: -4.1 to -1.9)."
    )
    gained = decided | {"verdict": "better", "p_value": 0.004, "delta": 0.03, "ci95": (0.019, 0.041)}
    assert tasks_line(report_of(finished_run, {"hellaswag": TASK}, **gained)).startswith("A gain: over 3,000 items")


def test_too_few_items_are_said_to_show_nothing(finished_run: Any) -> None:
    words = tasks_line(report_of(finished_run, {"hellaswag": OTHER}, n=4, flips=(0, 0), p_value=1.0, smallest=None))
    assert words == (
        "No loss shown: over 4 items 0 turned wrong and 0 right (p = 1); so few items would have shown no drop at all."
    )


def test_the_table_has_a_row_for_each_task(report: Report) -> None:
    view = tasks_view(report)
    assert view is not None
    assert [len(row) for row in view.rows] == [len(TASK_HEADS)] * 2
    assert view.rows[0] == [
        "hellaswag", "acc_norm", "1,500", "0", "41.6 %", "40.2 %", "-1.4 points (-3.1 to +0.3)", "0.12", "0.23",
        "101 / 80", "2.5 points",
    ]  # fmt: skip
    assert "at an error rate of 5 %" in view.protocol


def test_tasks_that_were_not_run_are_named(finished_run: Any) -> None:
    view = tasks_view(report_of(finished_run, {"hellaswag": TASK}, skipped={"gsm8k": "generates text"}))
    assert view is not None
    assert view.protocol.endswith("gsm8k was not run: it generates text.")


def test_all_files_have_the_section(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path)
    write_model_card(report, tmp_path)
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "## Tasks" in text
    for said in ("No loss shown: over 3,000 items", "101 / 80", "2.5 points"):
        assert said in page
        assert said in text
    assert "hellaswag" in (tmp_path / "README.md").read_text()
    rows = {label: cells for label, *cells in summary_table(report)}
    assert rows["hellaswag (1,500 items)"] == ["41.6 %", "40.2 %", "-1.4 points"]


def test_reports_without_tasks_and_of_older_versions(finished_run: Any, tmp_path: Path) -> None:
    record = dict(finished_run.report)
    assert tasks_view(Report.model_validate(record)) is None
    assert tasks_line(Report.model_validate(record)) == ""
    old = {name: TASK[name] for name in ("base", "compressed", "delta", "ci95", "p_value", "n")}
    quality = {key: value for key, value in record["quality"].items() if key != "task_decision"}
    report = Report.model_validate(record | {"quality": quality | {"tasks": {"hellaswag": old}}})
    write_report(report, tmp_path)
    assert "## Tasks" not in (tmp_path / "report.md").read_text()


def test_a_tasks_score_is_a_figure(report: Report) -> None:
    ours, base = figures_of(report)
    assert (ours["tasks.hellaswag"], base["tasks.hellaswag"]) == (0.402, 0.416)
    figure = figure_of("tasks.hellaswag")
    assert figure is not None
    assert figure.larger_is_better
