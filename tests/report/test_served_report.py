"""The section `As served` and its line: the same figures everywhere, and no way to miss that something is wrong."""

from pathlib import Path
from typing import Any

import pytest

from compress.records import Report
from compress.report.write import served_line, write_report

APART = {"tokens": 63, "max": 0.0731, "mean": 0.01603, "rounding": 0.01541, "tolerance": 0.03082}
PACE = {"prefill_tokens_per_second": 1260.4, "decode_tokens_per_second": 40.12, "loaded_bytes": 1_900_000_000,
        "peak_bytes": 2_100_000_000, "waited": 0.01}  # fmt: skip
FASTER = PACE | {"decode_tokens_per_second": 60.18, "loaded_bytes": 1_700_000_000}
SPEED = {"prompt_tokens": 512, "new_tokens": 32, "rounds": 3, "threads": 2, "cache_bytes": 2**30,
         "base": PACE, "compressed": FASTER}  # fmt: skip
OPENED = {"engine": "vLLM", "version": "0.32.0", "device": "cpu", "dtype": "bfloat16", "opened": True, "passed": True,
          "prompt": APART, "continuation": APART | {"tokens": 48, "mean": 0.0122}, "agreed": 10, "gap": 0.0155,
          "speed": SPEED}  # fmt: skip
REFUSED = {"engine": "vLLM", "version": "0.32.0", "opened": False, "passed": False, "note": "ValueError: <b>no</b> | 3"}


def report(served: dict[str, Any] | None) -> Report:
    size = {"bytes": 1000, "parameters": 500}
    return Report.model_validate(
        {"name": "a", "recipe": {}, "created": "2026-03-04T05:06:07+00:00", "seconds": 1.0, "size_ratio": 1.0,
         "base": {"model": "m", **size}, "compressed": {"path": "out", "bits_per_weight": 16.0, **size},
         "quality": None, "stages": [], "verified": None, "versions": {}, "served": served}
    )  # fmt: skip


def written(served: dict[str, Any] | None, folder: Path) -> tuple[str, str]:
    write_report(report(served), folder)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def test_all_figures_of_one_that_passes(tmp_path: Path) -> None:
    md, html = written(OPENED, tmp_path)
    for text in (md, html):
        assert "As served" in text and "vLLM 0.32.0 on a CPU opens it and computes the same." in text
        assert "63 tokens of a prompt differ by 0.016 nats on average and 0.0731 at most" in text
        assert "48 tokens of its greedy continuation differ by 0.0122 nats on average" in text
        assert "The first 10 tokens of the continuation are those that our reader ranks first; the next is" in text
        assert "40.1" in text and "60.2" in text and "1.50x" in text and "1.70 GB" in text
        assert "medians of 3 rounds" in text and "2 CPU threads" in text and "busy" not in text
    assert served_line(report(OPENED)) == (
        "vLLM 0.32.0 on a CPU opens it and computes the same: prompt and continuation differ by 0.016 (allowed 0.0308) "
        "and 0.0122 (allowed 0.0308) nats; 60.2 tokens/s, base 40.1"
    )


def test_a_refusal_is_quoted_as_it_is(tmp_path: Path) -> None:
    md, html = written(REFUSED, tmp_path)
    assert "vLLM 0.32.0 does not open it: ValueError: \\<b\\>no\\</b\\> | 3" in md
    assert "vLLM 0.32.0 does not open it: ValueError: &lt;b&gt;no&lt;/b&gt; | 3" in html
    assert "Memory, peak" not in md + html
    assert served_line(report(REFUSED)) == "vLLM 0.32.0 does not open it: ValueError: <b>no</b> | 3"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"passed": False}, "DIFFERS by more than rounding explains; do not serve it there"),
        (
            {"passed": False, "prompt": None, "continuation": None, "note": "it gives no numbers"},
            "Do not serve it there.",
        ),
    ],
)
def test_something_else_can_not_be_missed(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    md, html = written(OPENED | change, tmp_path)
    assert words in md and words in html
    assert '<li class="bad">vLLM 0.32.0' in html


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gap": None, "agreed": 48}, "All 48 tokens of the continuation are those that our reader ranks first."),
        ({"speed": SPEED | {"base": PACE | {"waited": 0.3}}}, "The machine was busy with other work"),
        ({"speed": None, "note": "speed was not compared"}, "Here speed was not compared."),
        ({"device": "cuda"}, "vLLM 0.32.0 on a GPU opens it"),
        ({"opened": False, "version": None, "note": "there is none"}, "vLLM was not asked: there is none"),
    ],
)
def test_what_else_may_be_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    md, html = written(OPENED | change, tmp_path)
    assert words in md and words in html


def test_speeds_of_a_busy_machine_are_not_in_the_line() -> None:
    busy = OPENED | {"speed": SPEED | {"base": PACE | {"waited": 0.3}}}
    assert served_line(report(busy)).endswith(" nats; its speed says little, for the machine was busy with other work")


def test_nothing_without_serve(tmp_path: Path) -> None:
    md, html = written(None, tmp_path)
    assert "As served" not in md + html and served_line(report(None)) == ""


def test_a_command_that_vllm_has_just_refused_is_not_recommended(tmp_path: Path) -> None:
    for name, served, there in (("opened", OPENED, True), ("refused", REFUSED, False), ("unasked", None, True)):
        (tmp_path / name).mkdir()
        assert all(("vllm serve" in text) == there for text in written(served, tmp_path / name)), name
