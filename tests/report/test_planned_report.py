"""The report's table of what was planned and what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest

from compress.records import Report
from compress.report.planned import planned_rows
from compress.report.write import write_report

FORECAST = {"output_bytes": 4000, "memory_bytes": 1_250_000_000, "disk_bytes": 8000, "seconds": 62.0}


def changed(**stage: Any) -> Report:
    """A report of one stage."""
    made = {
        "kind": "quantize", "spec": {"method": "gptq", "bits": 4}, "seconds": 71.2, "cached": False, "bytes": None,
        "peak_memory_bytes": 1_312_000_000, "forecast": FORECAST,
    }  # fmt: skip
    return Report.model_validate(
        {
            "name": "tiny", "recipe": {}, "created": "2026-03-04T05:06:07+00:00", "seconds": 192.4, "size_ratio": 2.5,
            "base": {"model": "owner/tiny", "bytes": 10_000, "parameters": 5000},
            "compressed": {"path": "out/tiny", "bytes": 4000, "parameters": 5000, "bits_per_weight": 6.4},
            "quality": None, "stages": [made | stage], "verified": None, "versions": {},
        }
    )  # fmt: skip


def test_every_figure_that_has_both_has_a_row() -> None:
    assert planned_rows(changed()) == [
        ["quantize gptq 4-bit", "Bytes written", "4,000", "4,000", "none"],
        ["", "Peak memory", "1.25 GB", "1.31 GB", "+5.0 %"],
        ["", "Time", "1 min 02 s", "1 min 11 s", "+14.8 %"],
    ]
    on_gpu = FORECAST | {"gpu_memory_bytes": 40_000_000_000, "seconds": None}
    rows = planned_rows(changed(forecast=on_gpu, peak_gpu_memory_bytes=34_000_000_000, bytes=5000))
    assert [row[1:] for row in rows] == [
        ["Bytes written", "4,000", "5,000", "+25.0 %"],
        ["Peak memory", "1.25 GB", "1.31 GB", "+5.0 %"],
        ["Peak GPU memory", "40.0 GB", "34.0 GB", "-15.0 %"],
    ]


@pytest.mark.parametrize("forecast", [None, {}, {"disk_bytes": 5, "gpu_memory_bytes": 7}])
def test_without_both_there_is_no_table(forecast: Any, tmp_path: Path) -> None:
    report = changed(forecast=forecast)
    assert planned_rows(report) == []
    write_report(report, tmp_path)
    assert "Planned" not in (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()


def test_a_record_of_an_older_version_has_no_forecast() -> None:
    record = json.loads(changed().model_dump_json())
    del record["stages"][0]["forecast"]
    assert Report.model_validate(record).stages[0].forecast is None


def test_the_table_stands_below_what_it_is_evidence_for(tmp_path: Path) -> None:
    write_report(changed(), tmp_path)
    page, text = ((tmp_path / name).read_text() for name in ("report.html", "report.md"))
    for content in (page, text):
        assert content.index("How it was made") < content.index("Planned and measured") < content.index("Base model")
        assert "1 min 02 s" in content
