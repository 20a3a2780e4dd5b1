"""An evaluation on several texts: one set of figures for each, and chats too for a model that is made for them."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import invoke
from random_models import make_model

from compress.records import Report

TEXTS = {
    "one.txt": "The library stood at the corner of two quiet streets.\n" * 60,
    "two.txt": "A river ran behind the mill, and nobody crossed it at night.\n" * 60,
}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    make_model(tmp_path / "model")
    return tmp_path


def write(**evaluate: Any) -> None:
    recipe = {
        "name": "texts",
        "model": "model",
        "output": "out",
        "evaluate": {"sequence_length": 32, "prompts": []} | evaluate,
        "stages": [{"kind": "quantize", "method": "rtn", "group_size": 32}],
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))


def run(**evaluate: Any) -> Report:
    write(**evaluate)
    result = invoke("run", "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    return Report.model_validate_json(Path("out/report.json").read_text())


def test_each_text_has_figures_of_its_own(folder: Path) -> None:
    both = run(text=["one.txt", "two.txt"], windows=3)
    single = {name: run(text=name, windows=3).quality for name in TEXTS}
    assert [both.quality, *both.further] == list(single.values())
    assert both.quality is not None and both.quality.perplexity.dataset == "one.txt"
    run(text=["one.txt", "two.txt"], windows=3)
    for file in ("report.md", "report.html"):
        page = Path("out", file).read_text()
        assert "KL divergence (two.txt, 32 tokens)" in page and "Where the two differ most" in page


def test_a_chat_model_is_judged_on_chats_too_unless_texts_are_named(folder: Path) -> None:
    assert run(windows=2).further == []
    (folder / "model" / "chat_template.jinja").write_text(CHAT)
    report = run(windows=2)
    assert report.quality is not None and report.quality.perplexity.dataset == "wikitext2"
    (chats,) = report.further
    assert (chats.perplexity.dataset, chats.perplexity.windows) == ("chat_en", 2)
    assert run(text="wikitext2", windows=2).further == []


def test_a_template_that_can_not_write_the_chats_costs_those_figures_alone(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text("{{ raise_exception('only for robots') }}")
    report = run(windows=2)
    assert report.quality is not None and report.further == []
    assert any(line.startswith("not measured on chats: ") and "only for robots" in line for line in report.warnings)
    write(text=["one.txt", "chat_en"], windows=2)
    result = invoke("run", "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 2 and "only for robots" in result.stderr


def test_texts_that_are_not_there_are_all_named(folder: Path) -> None:
    write(text=["one.txt", "three.txt", "wikitxt2"])
    result = invoke("validate", "recipe.yaml")
    assert result.exit_code == 2
    assert "evaluate.text.1: three.txt: no such file" in result.stderr
    assert "evaluate.text.2: wikitxt2: no such spec; did you mean wikitext2?" in result.stderr
    write(text=[])
    assert "evaluate.text" in invoke("validate", "recipe.yaml").stderr
