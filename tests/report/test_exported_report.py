"""The section `Exported` and its lines: the same figures everywhere, and no way to miss that something is wrong."""

from pathlib import Path
from typing import Any

import pytest

from compress.recipe.export import TARGETS
from compress.records import Report
from compress.report.write import export_lines, write_model_card, write_report

PACE = {"prefill_tokens_per_second": 1260.4, "decode_tokens_per_second": 40.12, "loaded_bytes": 1_900_000_000,
        "peak_bytes": 2_100_000_000, "waited": 0.01}  # fmt: skip
CHECKS = [
    {"name": "tokens", "passed": True, "detail": "the same in 200 odd texts"},
    {"name": "llama.cpp", "passed": True, "detail": "log-probabilities of 63 tokens differ by 0.025 nats"},
]
GGUF = {"to": "gguf", "type": "auto", "name": "a.gguf", "files": 1, "bytes": 4_900_000, "carried": 42,
        "program": "llama.cpp", "version": "2026.10", "checks": CHECKS, "pace": PACE}  # fmt: skip
SPLIT = GGUF | {"name": "a-00001-of-00003.gguf", "files": 3, "carried": 0}
FAILED = {"name": "onnx runtime", "passed": False, "detail": "differ by <b>2 nats</b> | 3"}
ONNX = GGUF | {"to": "onnx", "name": "onnx", "files": 5, "program": "ONNX Runtime GenAI", "version": "0.18.0",
               "checks": [CHECKS[0]]}  # fmt: skip


def report(*exports: dict[str, Any]) -> Report:
    size = {"bytes": 1000, "parameters": 500}
    return Report.model_validate(
        {"name": "a", "recipe": {}, "created": "2026-03-04T05:06:07+00:00", "seconds": 1.0, "size_ratio": 1.0,
         "base": {"model": "m", **size}, "compressed": {"path": "out", "bits_per_weight": 16.0, **size},
         "quality": None, "stages": [], "verified": None, "versions": {}, "exports": exports}
    )  # fmt: skip


def written(folder: Path, *exports: dict[str, Any]) -> tuple[str, str, str]:
    """report.md, report.html and the card."""
    write_report(report(*exports), folder)
    write_model_card(report(*exports), folder)
    md, html, card = ((folder / name).read_text() for name in ("report.md", "report.html", "README.md"))
    return md, html, card


def test_all_figures_of_those_that_pass(tmp_path: Path) -> None:
    md, html, card = written(tmp_path, GGUF, ONNX)
    for text in (md, html, card):
        assert "Exported" in text and "llama.cpp 2026.10 opens it: the same but for rounding" in text
        assert "1,260" in text and "40.1" in text and "2.10 GB" in text and "4.90 MB" in text
        assert "log-probabilities of 63 tokens differ by 0.025 nats" in text and "the same in 200 odd texts" in text
        assert "42 matrices have the checkpoint's own codes, unchanged" in text.replace("&#39;", "'")
        assert "busy" not in text and 'class="bad"' not in text
    assert md.count("| a.gguf | 4.90 MB | llama.cpp 2026.10 opens it: the same but for rounding | 1,260 | 40.1 |") == 1
    assert export_lines(report(GGUF, ONNX)) == [
        "a.gguf, 4.90 MB: llama.cpp 2026.10 opens it: the same but for rounding; 1,260 tokens/s prefill, 40.1 decode",
        "onnx, 4.90 MB: ONNX Runtime GenAI 0.18.0 opens it: the same but for rounding; 1,260 tokens/s prefill, 40.1 "
        "decode",
    ]


def test_the_card_says_how_to_run_them(tmp_path: Path) -> None:
    _, html, card = written(tmp_path, SPLIT, ONNX)
    for text in (card, html):
        assert "llama-server -m path/to/out/a-00001-of-00003.gguf --port 8080" in text
        assert 'onnxruntime_genai.Model("path/to/out/onnx")' in text.replace("&#34;", '"')
    assert card.split("---")[1].count("- gguf\n- onnx\n") == 1
    assert "3 files, of which programs are given the first" in card


LINES = {
    "gguf": ["llama-cli -m {place}", "llama-server -m {place} --port 8080"],
    "onnx": ["pip install onnxruntime-genai", 'model = onnxruntime_genai.Model("{place}")'],
    "openvino": ["pip install openvino-genai", 'pipe = openvino_genai.LLMPipeline("{place}", "CPU")'],
}


@pytest.mark.parametrize("to", TARGETS)
def test_each_is_opened_by_its_own_program(to: str, tmp_path: Path) -> None:
    """As the page has it, and the card that goes with the checkpoint."""
    name = "a.gguf" if to == "gguf" else to
    _, html, card = written(tmp_path, GGUF | {"to": to, "name": name, "program": TARGETS[to].program})
    for text in (card, html.replace("&#34;", '"')):
        for other, lines in LINES.items():
            found = [line.format(place=f"path/to/out/{name}") in text for line in lines]
            assert found == [other == to] * 2, other


def test_one_that_fails_can_not_be_missed(tmp_path: Path) -> None:
    md, html, card = written(tmp_path, GGUF, ONNX | {"checks": [*CHECKS[:1], FAILED]})
    assert '<li class="bad">onnx: onnx runtime: differ by &lt;b&gt;2 nats&lt;/b&gt; | 3</li>' in html
    for text in (md, card):
        assert "- onnx: onnx runtime: differ by \\<b\\>2 nats\\</b\\> | 3" in text
        assert "| onnx | 4.90 MB | FAILS in ONNX Runtime GenAI 0.18.0; do not use it |" in text
    for text in (md, html, card):
        assert "onnxruntime_genai.Model" not in text and "llama-server" in text


def test_one_that_is_not_there_can_not_be_missed(tmp_path: Path) -> None:
    lost = {"name": "onnx", "to": "onnx", "type": "auto", "files": 0, "bytes": 0, "carried": 0,
            "program": "ONNX Runtime GenAI", "failure": "MemoryError: of 7 GB"}  # fmt: skip
    md, html, card = written(tmp_path, GGUF, lost)
    assert '<li class="bad">onnx: could not be written: MemoryError: of 7 GB</li>' in html
    for text in (md, card):
        assert "- onnx: could not be written: MemoryError: of 7 GB" in text
        assert "| onnx |  | COULD NOT BE WRITTEN |" in text
    assert "onnxruntime_genai.Model" not in card and "- onnx\n" not in card.split("---")[1]
    assert export_lines(report(lost)) == ["onnx: COULD NOT BE WRITTEN: MemoryError: of 7 GB"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checks": [], "pace": None, "version": None, "note": "it is not installed"},
         "llama.cpp was not asked: it is not installed"),
        ({"pace": PACE | {"waited": 0.3}}, "The machine was busy with other work, so they say little."),
        ({"remarks": ["12 of 42 matrices lie on no grid"]}, "a.gguf: 12 of 42 matrices lie on no grid"),
        ({"checks": [CHECKS[0] | {"passed": None, "detail": "others in 2"}]}, "a.gguf: tokens: others in 2"),
    ],
)  # fmt: skip
def test_what_else_may_be_said(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    md, html, card = written(tmp_path, GGUF | change)
    assert words in md and words in html and words in card and 'class="bad"' not in html


def test_speeds_of_a_busy_machine_are_not_in_the_line() -> None:
    (line,) = export_lines(report(GGUF | {"pace": PACE | {"waited": 0.3}}))
    assert line.endswith("rounding; its speed says little, for the machine was busy with other work")


def test_nothing_without_exports_as_in_older_reports(tmp_path: Path) -> None:
    assert all("Exported" not in text for text in written(tmp_path))
    older = report().model_dump(mode="json")
    del older["exports"]
    assert export_lines(Report.model_validate(older)) == []
