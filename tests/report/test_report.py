"""The report's record and its four files: the same figures everywhere, nothing loaded, nothing unescaped."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from pictures import assert_pictures_belong
from pydantic import ValidationError

from compress.errors import OutputError
from compress.records import Report
from compress.report import figures
from compress.report.serving import ways
from compress.report.write import speed_words, summary_table, write_model_card, write_report

KINDS = {"q": [64, 64], "k": [32, 64], "v": [32, 64], "o": [64, 64], "gate": [96, 64], "up": [96, 64], "down": [64, 96]}
HOSTILE = """<script>alert("x")</script> & </pre> {{ 7 * 7 }} ```\n| a | "b" 'c' \U0001f600 $x_1$"""


def _layers(count: int) -> list[dict[str, Any]]:
    def module(layer: int, index: int, kind: str) -> dict[str, Any]:
        part = "self_attn" if kind in "qkvo" else "mlp"
        return {
            "name": f"model.layers.{layer}.{part}.{kind}_proj", "shape": KINDS[kind], "bits": 4, "group_size": 32,
            "symmetric": True, "error": 0.01 * (1 + index + math.sin(layer)) + 0.001, "weight_error": 0.008,
            "damp": 0.01, "fallback": "rounded to nearest: singular" if (layer, kind) == (1, "o") else None,
            "dtype": "int", "inputs": None, "errors": {}, "smooth": None,
        }  # fmt: skip

    return [
        {"layer": layer, "seconds": 1.5, "modules": [module(layer, i, kind) for i, kind in enumerate(KINDS)]}
        for layer in range(count)
    ]


def _record(layers: int = 3) -> dict[str, Any]:
    weights = layers * sum(rows * columns for rows, columns in KINDS.values())
    parameters = weights + 20_000
    compressed = weights * 4.5 / 8 + 40_000
    return {
        "name": "tiny",
        "recipe": {"name": "tiny", "model": "owner/tiny", "stages": [{"kind": "quantize", "bits": 4}], "output": "out"},
        "created": "2026-03-04T05:06:07+00:00",
        "seconds": 192.4,
        "base": {"model": "owner/tiny", "bytes": 2 * parameters, "parameters": parameters, "fingerprint": "f00d"},
        "compressed": {
            "path": "out/tiny", "bytes": int(compressed), "parameters": parameters,
            "bits_per_weight": 8 * compressed / parameters, "quantized_bits_per_weight": 4.5,
            "format": "compressed-tensors", "file": None, "files": None,
        },
        "size_ratio": 2 * parameters / compressed,
        "quality": {
            "perplexity": {
                "base": 21.913, "compressed": 23.741, "dataset": "wikitext2", "sequence_length": 512, "windows": 4,
                "tokens": 2044,
            },
            "kl": {"mean": 0.08312, "ci95": [0.07941, 0.08678], "p99": 0.7123},
            "top1_agreement": {"mean": 0.8621, "ci95": [0.8574, 0.8666]},
            "tasks": {},
            "task_decision": None,
            "kl_per_window": [0.08, 0.07, 0.09, 0.0925],
            "worst": [],
            "dtype": "float32",
            "protocol": "4 windows of 512 tokens from wikitext2, without overlap.",
        },
        "further": [],
        "served": None,
        "exports": [],
        "stages": [
            {
                "kind": "quantize", "seconds": 71.2, "peak_memory_bytes": 1_312_000_000, "peak_gpu_memory_bytes": None,
                "spec": {"kind": "quantize", "method": "gptq", "bits": 4, "overrides": {"*.down_proj": {"bits": 8}}},
                "cached": False, "device": "cpu", "dtype": "float32", "resumed_layers": 1, "layers": _layers(layers),
                "pruned": None, "trained": None, "parameters": None, "bytes": None, "perplexity": None, "kl": None,
                "format": "compressed-tensors", "quantized_bits_per_weight": 4.5,
                "forecast": {
                    "output_bytes": int(compressed), "about": False, "memory_bytes": 1_250_000_000,
                    "gpu_memory_bytes": None, "disk_bytes": 2 * int(compressed), "seconds": 62.0,
                },
            }
        ],
        "calibration": {
            "name": "general_en", "source": "general_en.jsonl.gz", "licence": "CC-BY-SA-4.0", "sequences": 128,
            "sequence_length": 512, "tokens": 65536, "sha256": "ab" * 32,
        },
        "generations": [{"prompt": "Once", "base": " upon a time", "compressed": " upon a midnight"}],
        "generations_note": "Greedy, 48 tokens.",
        "verified": {
            "loader": "transformers", "max_logit_difference": 0.0012, "tolerance": 0.05, "passed": True, "note": None,
        },
        "speed": {
            "cpu": "Some CPU (family 1, model 2)", "cpu_flags": ["avx2", "amx_int8"], "threads": 2,
            "prompt_tokens": 512, "new_tokens": 24, "rounds": 2, "base": _pace(895.4, 15.04),
            "compressed": _pace(1340.6, 22.51),
        },
        "speed_note": None,
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_bytes": 16_800_000_000, "gpu": None},
        "versions": {"torch": "2.13.0"},
        "warnings": ["fewer tokens than asked"],
    }  # fmt: skip


def _pace(prefill: float, decode: float, waited: float = 0.01) -> dict[str, Any]:
    return {
        "dtype": "bfloat16", "prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode,
        "loaded_bytes": 443_000_000, "peak_bytes": 759_000_000, "waited": waited,
    }  # fmt: skip


def _bare() -> dict[str, Any]:
    """A record that holds nothing but what a record must."""
    record = _record()
    record |= {"quality": None, "verified": None, "stages": [], "versions": {}}
    for optional in (
        "calibration", "generations", "generations_note", "machine", "warnings", "speed", "speed_note",
    ):  # fmt: skip
        del record[optional]
    record["base"] = {"model": "/data/local", "bytes": 100, "parameters": 50}
    record["compressed"] = {"path": "out/tiny", "bytes": 40, "parameters": 50, "bits_per_weight": 6.4}
    return record


def _written(record: dict[str, Any], folder: Path) -> tuple[Report, str, str, str]:
    report = Report.model_validate(record)
    write_report(report, folder)
    write_model_card(report, folder)
    html, md, card = ((folder / name).read_text(encoding="utf-8") for name in ("report.html", "report.md", "README.md"))
    return report, html, md, card


class _Page(HTMLParser):
    """Tags and attributes of a page, what is not closed, and its text without style and pictures."""

    VOID = {"meta", "br", "img", "link", "path", "use", "rect"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.text += data


def test_the_record_has_the_agreed_fields_and_survives_a_round_trip(tmp_path: Path) -> None:
    record = _record()
    report, *_ = _written(record, tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(record))
    assert Report.model_validate_json((tmp_path / "report.json").read_bytes()) == report


def test_a_record_of_an_older_version_loads_and_an_unknown_field_does_not() -> None:
    older = Report.model_validate_json(json.dumps(_bare()))
    assert older.warnings == [] and older.machine is None and older.speed is None and older.speed_note is None
    with pytest.raises(ValidationError, match="surprise"):
        Report.model_validate(_record() | {"surprise": 1})


def test_a_figure_that_is_no_number_is_written_as_null(tmp_path: Path) -> None:
    record = _record()
    record["stages"][0]["layers"][0]["modules"][0]["weight_error"] = math.nan
    _written(record, tmp_path)
    layers = json.loads((tmp_path / "report.json").read_text())["stages"][0]["layers"]
    assert layers[0]["modules"][0]["weight_error"] is None


def test_all_files_state_the_same_figures(tmp_path: Path) -> None:
    report, html, md, card = _written(_record(), tmp_path)
    text = _Page(html).text
    quality = json.loads((tmp_path / "report.json").read_text())["quality"]
    expected = {
        "perplexity": f"{quality['perplexity']['compressed']:.2f}",
        "kl": f"{quality['kl']['mean']:.3g}",
        "kl interval": "{:.3g} to {:.3g}".format(*quality["kl"]["ci95"]),
        "p99": f"{quality['kl']['p99']:.3g}",
        "agreement": f"{100 * quality['top1_agreement']['mean']:.1f} %",
        "agreement interval": "{:.1f} % to {:.1f} %".format(*(100 * x for x in quality["top1_agreement"]["ci95"])),
        "size": f"{report.size_ratio:.2f}x smaller",
        "bits": f"{report.compressed.bits_per_weight:.2f}",
        "change": f"{100 * (23.741 / 21.913 - 1):+.1f} %",
        "prefill": "1,341",
        "decode": "22.5",
        "speed": f"{22.51 / 15.04:.2f}x",
    }
    terminal = " ".join(cell for row in summary_table(report) for cell in row)
    for name, figure in expected.items():
        for place, content in {"html": text, "md": md, "card": card, "terminal": terminal}.items():
            assert figure in content, (name, place)


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    _, html, _, _ = _written(_record(), tmp_path)
    page = _Page(html)
    assert page.open == []
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "xlink:href") and not name.startswith("on")
            assert name != "href" or (value or "").startswith("#"), (tag, value)
    assert re.findall(r"https?:|@import|@font-face|url\((?!#)", html) == []


def test_pictures_have_their_own_ids_and_the_colours_of_the_page(tmp_path: Path) -> None:
    _, html, _, _ = _written(_record(), tmp_path)
    assert_pictures_belong(html, 3)


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _written(_record(), tmp_path / name)
    for file in ("report.json", "report.md", "report.html", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == [
        "README.md",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    record = _record()
    record |= {"name": HOSTILE, "warnings": [HOSTILE], "generations_note": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    record["generations"] = [{"prompt": HOSTILE, "base": HOSTILE, "compressed": HOSTILE}]
    record["recipe"]["name"] = HOSTILE
    record["quality"]["protocol"] = HOSTILE
    record["stages"][0]["layers"][2]["modules"][0] |= {"name": HOSTILE, "fallback": HOSTILE}
    _, html, md, card = _written(record, tmp_path)
    page = _Page(html)
    assert page.open == [] and "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("{{ 7 * 7 }}") >= 6  # shown as it is, never evaluated
    for content in (md, card):
        outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?\n\1$", "", content)  # what is not in a code block
        assert "<script>" not in outside and outside.count("{{ 7 \\* 7 }}") >= 3


def test_everything_absent_is_said_and_nothing_breaks(tmp_path: Path) -> None:
    report, html, md, card = _written(_bare(), tmp_path)
    page = _Page(html)
    assert page.open == [] and "<svg" not in html
    for content in (page.text, md, card):
        assert "not evaluated" in content and "not verified" in content
        assert "None" not in content and "nan" not in content
    assert "base_model" not in card and summary_table(report)[-1][2] == "not verified"


@pytest.mark.parametrize("missing", ["quality", "verified", "calibration", "generations_note", "machine", "speed"])
def test_each_part_may_be_absent(missing: str, tmp_path: Path) -> None:
    _, html, md, card = _written(_record() | {missing: None}, tmp_path)
    assert _Page(html).open == []
    assert not re.search(r"\bNone\b", _Page(html).text + md + card)


def test_matrices_without_calibration_have_no_output_error(tmp_path: Path) -> None:
    record = _record()
    for layer in record["stages"][0]["layers"]:
        for module in layer["modules"]:
            module |= {"error": None, "damp": None}
    _, html, md, _ = _written(record, tmp_path)
    assert html.count("<svg") == 2 and "Largest" not in html + md
    assert "All 21 matrices" in html


def test_one_window_is_shown_without_an_interval(tmp_path: Path) -> None:
    record = _record()
    record["quality"] |= {"kl": {"mean": 0.08, "ci95": None, "p99": 0.7}, "kl_per_window": [0.08]}
    record["quality"]["top1_agreement"] = {"mean": 0.9, "ci95": None}
    _, html, md, _ = _written(record, tmp_path)
    assert html.count("<svg") == 2 and "95 %" not in md


def test_a_failed_verification_is_said_first(tmp_path: Path) -> None:
    record = _record()
    record["verified"] |= {"passed": False, "max_logit_difference": 3.5}
    report, html, md, card = _written(record, tmp_path)
    for content in (_Page(html).text, md, card):
        assert "NOT verified" in content and "differ by up to 3.5 (allowed: 0.05)" in content
    assert summary_table(report)[-1][2] == "FAIL"


def test_a_checkpoint_that_the_loader_cannot_open_is_said_first(tmp_path: Path) -> None:
    record = _record()
    record["verified"] |= {"passed": False, "max_logit_difference": None, "note": "KeyError: 'x'"}
    report, html, md, card = _written(record, tmp_path)
    for content in (_Page(html).text, md, card):
        assert "NOT verified: transformers can't open it." in content
        assert "Verification failed: transformers can't open it (KeyError: 'x'). Do not use this" in content
    assert summary_table(report)[-1][2] == "FAIL"


@pytest.mark.parametrize(
    ("prefill", "decode", "waited", "words"),
    [
        (1200.0, 18.0, 0.0, ""),
        (545.0, 7.5, 0.04, "No faster than bf16 on this CPU: prefill 0.55x, decode 0.50x."),
        (1020.0, 15.1, 0.0, "No faster than bf16 on this CPU: prefill 1.02x, decode 1.01x."),
        (1800.0, 12.0, 0.0, "No faster than bf16 on this CPU in decode: prefill 1.80x, decode 0.80x."),
        (500.0, 30.0, 0.0, "No faster than bf16 on this CPU in prefill: prefill 0.50x, decode 2.00x."),
        (1800.0, 30.0, 0.4, "These speeds say little, for the machine was busy with other work: run the same "
         "command while it is idle."),
        (545.0, 7.5, 0.4, "These speeds say little, for the machine was busy with other work: run the same command "
         "while it is idle."),
    ],
)  # fmt: skip
def test_a_format_that_is_no_faster_is_said_to_be(
    prefill: float, decode: float, waited: float, words: str, tmp_path: Path
) -> None:
    record = _record()
    record["speed"] |= {"base": _pace(1000.0, 15.0), "compressed": _pace(prefill, decode, waited)}
    if waited == 0.04:
        record["speed"]["base"] = _pace(1000.0, 15.0) | {"peak_bytes": 1_518_000_000}
    report, html, md, card = _written(record, tmp_path)
    assert speed_words(report) == words
    how = "Speed of transformers in eager mode on Some CPU (family 1, model 2), with avx2, amx"
    for content in (_Page(html).text, md, card):
        assert words in content and how in content
        assert ("No faster" in content, "was busy" in content) == ("No faster" in words, "was busy" in words)
        assert ("-50.0 %" in content) == (waited == 0.04)


def test_why_speed_was_not_measured_is_said(tmp_path: Path) -> None:
    _, html, md, _ = _written(_record() | {"speed": None, "speed_note": "8 GiB are free"}, tmp_path)
    for content in (_Page(html).text, md):
        assert "Speed was not measured: 8 GiB are free." in content


def test_fallbacks_are_counted_and_flagged(tmp_path: Path) -> None:
    _, html, md, _ = _written(_record(), tmp_path)
    assert "1 of 21 matrices fell back" in _Page(html).text and "1 of 21 matrices fell back" in md
    assert 'class="flagged"' in html and "rounded to nearest: singular" in html


def test_matrices_are_sorted_by_layer_and_the_worst_by_error() -> None:
    record = _record()
    head = {"name": "lm_head", "shape": [8, 8], "bits": 8, "group_size": -1, "symmetric": True}
    layers = record["stages"][0]["layers"]
    record["stages"][0]["layers"] = [{"layer": None, "seconds": 0.1, "modules": [head]}, *reversed(layers)]
    rows = figures.matrices(Report.model_validate(record))
    assert [row.layer for row in rows] == [0] * 7 + [1] * 7 + [2] * 7 + [None]
    assert (rows[3].name, rows[3].kind, rows[-1].name) == ("self_attn.o_proj", "o", "lm_head")
    errors = sorted((row.module.error or 0.0 for row in rows), reverse=True)
    assert [row.module.error for row in figures.worst(Report.model_validate(record))] == errors[:5]


def test_size_parts_add_up_to_the_measured_bytes_or_are_not_shown() -> None:
    record = _record()
    report = Report.model_validate(record)
    parts = figures.size_parts(report)
    assert parts is not None
    assert [sum(part) for part in parts] == pytest.approx([report.base.bytes, report.compressed.bytes])
    record["base"]["parameters"] += 1  # another stage changed the shape
    assert figures.size_parts(Report.model_validate(record)) is None


def test_a_large_model_is_drawn_once_per_kind(tmp_path: Path) -> None:
    _, html, _, _ = _written(_record(layers=80), tmp_path)
    assert "All 560 matrices" in html
    plot = next(svg for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL) if "over the layers" in svg)
    assert all(f">{kind}</text>" in plot for kind in [*KINDS, "fallback"])
    assert len(html) < 600_000


def test_the_model_card_names_a_hub_base_and_how_to_load(tmp_path: Path) -> None:
    _, _, _, card = _written(_record(), tmp_path)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == "owner/tiny" and front["library_name"] == "transformers"
    assert front["tags"] == ["dscompress", "compressed-tensors", "gptq", "4-bit"]
    assert "vllm serve path/to/tiny" in card and "pip install transformers compressed-tensors" in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert yaml.safe_load(card.split("```yaml\n")[1].split("```")[0]) == _record()["recipe"]


@pytest.mark.parametrize("model", ["/data/tiny", "./tiny", "tiny.gguf", "package:llm_tiny/tiny.gguf", "a/b/c"])
def test_the_model_card_of_a_local_base_claims_no_hub_id(model: str, tmp_path: Path) -> None:
    record = _record()
    record["base"]["model"] = model
    card = _written(record, tmp_path)[3]
    assert "base_model" not in card and "/data/" not in card


def test_a_folder_that_reads_like_a_hub_id_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "tiny").mkdir(parents=True)
    assert "base_model" not in _written(_record(), tmp_path)[3]


@pytest.mark.parametrize(
    ("change", "expected", "served"),
    [
        ({"format": "gptq"}, "optimum gptqmodel", True),
        ({"format": "torchao"}, "pip install transformers torchao\n", False),
        ({"format": None}, "pip install transformers\n", True),
    ],
)
def test_the_model_card_of_other_formats_names_what_opens_them(
    change: dict[str, Any], expected: str, served: bool, tmp_path: Path
) -> None:
    record = _record()
    record["compressed"] |= change
    card = _written(record, tmp_path)[3]
    assert expected in card and ("vllm serve path/to/tiny" in card) == served


@pytest.mark.parametrize(("spec", "opens"), [({"lm_head": True}, True), ({"embeddings": True}, False)])
def test_the_model_card_names_vllm_only_for_what_it_opens(spec: dict[str, Any], opens: bool, tmp_path: Path) -> None:
    record = _record()
    record["stages"][0]["spec"] |= spec
    assert ("vllm" in _written(record, tmp_path)[3]) == opens


def test_a_folder_that_can_not_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    with pytest.raises(OutputError) as caught:
        write_report(Report.model_validate(_record()), missing)
    assert str(missing / "report.json") in str(caught.value) and "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(Report.model_validate(_record()), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"] and (tmp_path / "report.json").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (figures.size(999), "999 B"), (figures.size(92_340_000), "92.3 MB"), (figures.size(999_600), "1.00 MB"),
        (figures.count(134_515_008), "135M"), (figures.count(8_030_000_000), "8.03B"),
        (figures.duration(9.96), "10 s"), (figures.duration(59.6), "1 min 00 s"),
        (figures.duration(3840), "1 h 04 min"),
        (figures.percent(0.0123), "1.23 %"), (figures.number(None), "–"), (figures.perplexity(7.12345), "7.123"),
        (figures.interval((0.5, 0.625), share=True), "50.0 % to 62.5 %"),
    ],
)  # fmt: skip
def test_figures_read_well(text: str, expected: str) -> None:
    assert text == expected


def test_writing_a_report_never_imports_torch_and_reading_one_imports_no_plots() -> None:
    code = "import sys, compress.report.write; print([m for m in ('torch', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_8_bits_became_is_said_with_the_error_of_the_other_choice(tmp_path: Path) -> None:
    record = _record()
    chosen = {"dtype": "int", "inputs": "static", "errors": {"static": 0.0052, "dynamic": 0.005}, "bits": 8}
    for layer in record["stages"][0]["layers"]:
        for module in layer["modules"]:
            module |= chosen
    record["stages"][0]["spec"] = {"kind": "quantize", "method": "auto", "dtype": "int8"}
    _, html, md, card = _written(record, tmp_path)
    assert "int8 static (dynamic 0.5 %)" in html and "int8 static (dynamic 0.5 %)" in md
    assert "A quantization of weights and activations to INT8 (static or dynamic activation scales) of" in card
    assert "- int8\n" in card


@pytest.mark.parametrize(
    ("format", "bits", "spec", "names", "note"),
    [
        ("compressed-tensors", 4, {}, ["vLLM", "transformers"], ""),
        ("compressed-tensors", 8, {}, ["vLLM", "transformers"], "on a GPU"),
        ("compressed-tensors", 3, {}, ["transformers"], None),
        ("gptq", 4, {"symmetric": True}, ["vLLM", "ONNX Runtime GenAI", "transformers"], ""),
        ("gptq", 4, {"symmetric": False}, ["ONNX Runtime GenAI", "transformers"], None),
        ("gptq", 4, {"ignore": ["*.down_proj"]}, ["vLLM", "transformers"], ""),
        ("gptq", 3, {}, ["vLLM", "transformers"], "on a GPU"),
        ("torchao", 4, {}, ["transformers"], None),
        (None, 4, {}, ["vLLM", "transformers"], ""),
    ],
)
def test_the_report_names_the_programs_that_open_the_checkpoint(
    format: str | None, bits: int, spec: dict[str, Any], names: list[str], note: str | None, tmp_path: Path
) -> None:
    """As the README's table has them."""
    record = _record()
    record["compressed"]["format"] = format
    record["stages"][0]["spec"] |= spec
    for layer in record["stages"][0]["layers"]:
        for module in layer["modules"]:
            module |= {"bits": bits, "group_size": 64}
    found = ways(Report.model_validate(record))
    assert [way.name for way in found] == names
    assert next((way.note for way in found if way.name == "vLLM"), None) == note
    _, html, markdown, _ = _written(record, tmp_path)
    for page in (html, markdown):
        assert all(way.command.splitlines()[0] in page for way in found)


def test_a_checkpoint_that_failed_verification_is_not_to_be_served(tmp_path: Path) -> None:
    record = _record()
    record["verified"] |= {"passed": False}
    assert all("How to serve it" not in page for page in _written(record, tmp_path))


def test_every_marker_of_the_layers_and_windows_says_what_it_is(tmp_path: Path) -> None:
    record = _record(layers=5)
    html = _written(record, tmp_path)[1]
    titles = re.findall(r"<use [^>]*><title>([^<]*)</title></use>", html)
    layers = [title for title in titles if title.startswith("layer ")]
    assert len(layers) == len(set(layers)) == 5 * len(KINDS)
    for layer in record["stages"][0]["layers"]:
        for module in layer["modules"]:
            kind = module["name"].rpartition(".")[2].removesuffix("_proj")
            assert f"layer {layer['layer']}, {kind}: {figures.percent(module['error'])}" in layers
    assert [title for title in titles if title.startswith("window ")] == [
        f"window {n}: {figures.number(kl)}" for n, kl in enumerate(record["quality"]["kl_per_window"])
    ]
