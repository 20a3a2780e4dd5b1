"""What lies beside the weights goes with the result, and follows the base when a finished stage is taken again."""

import json
from pathlib import Path

import pytest
from command import invoke
from random_models import make_model
from stock_here import ask_here
from transformers import AutoTokenizer

from compress.evaluation.stock import Request
from compress.model.side_files import side_files
from compress.records import read_record
from compress.system.fingerprint import sha256

RECIPE = """\
name: side
model: model
evaluate: {text: text.txt, sequence_length: 32, windows: 1, prompts: [The library]}
output: out
stages:
  - {kind: quantize, method: rtn, group_size: 32}
"""
MORE = "additional_chat_templates"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The library stood at the corner of two quiet streets.\n" * 60)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    model = make_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (model / MORE).mkdir()
    (model / MORE / "tools.jinja").write_text("tools: {{ messages[0].content }}")
    (model / "LICENSE").write_text("whose model this is")
    return tmp_path


def run() -> str:
    result = invoke("run", "recipe.yaml", "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    return result.stderr


def test_templates_in_a_folder_of_their_own_go_with_the_result_and_adapters_do_not(folder: Path) -> None:
    (folder / "model" / "adapter_model.safetensors").write_bytes(b"")
    (folder / "model" / "adapter_notes.json").write_text("{}")
    (folder / "model" / "quantize_config.json").write_text("{}")
    run()
    assert not list((folder / "out").glob("adapter_*")) and not (folder / "out" / "quantize_config.json").exists()
    asked = {"conversation": [{"role": "user", "content": "Who?"}], "tokenize": False}
    for name in ("model", "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder / name)
        assert tokenizer.apply_chat_template(**asked) == "Who?"
        assert tokenizer.apply_chat_template(**asked, chat_template="tools") == "tools: Who?"
    record = read_record(folder / "out")
    assert record is not None and f"{MORE}/tools.jinja" in record.files


def test_what_is_corrected_in_the_base_reaches_a_run_again(folder: Path) -> None:
    run()
    first = json.loads((folder / "out" / "report.json").read_text())
    (folder / "out" / "notes.txt").write_text("mine")
    model = folder / "model"
    (model / "chat_template.jinja").write_text("{{ messages[0].content }} Once upon a time")
    (model / "generation_config.json").write_text('{"eos_token_id": 3, "max_new_tokens": 5}')
    (model / MORE / "tools.jinja").unlink()
    (model / MORE).rmdir()
    (model / "LICENSE").unlink()
    (model / "NOTICE").write_text("new")
    assert "quantize: finished before" in run()
    out, report = folder / "out", json.loads((folder / "out" / "report.json").read_text())
    assert report["verified"]["passed"] and report["quality"] == first["quality"]
    for name in ("chat_template.jinja", "generation_config.json", "NOTICE"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert not (out / "LICENSE").exists() and not (out / MORE).exists()
    assert (out / "notes.txt").read_text() == "mine"
    record = read_record(out)
    assert record is not None
    assert {name: sha256(out / name) for name in record.files} == record.files
    assert set(side_files(model)) < set(record.files) and "LICENSE" not in record.files
    for name, kind in (("model", "base"), ("out", "compressed")):
        asked = Request(name, "cpu", report["stages"][0]["dtype"], prompts=["The library"])
        assert [report["generations"][0][kind]] == ask_here(asked).continuations
        assert report["generations"][0][kind] != first["generations"][0][kind]


def test_another_tokenizer_does_not_make_a_finished_stage_a_wrong_one(folder: Path) -> None:
    """Without calibration the text is no part of a stage; it was probed with the tokens of its time."""
    run()
    file = folder / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(tokenizer))
    assert "quantize: finished before" in run()
    assert json.loads((folder / "out" / "report.json").read_text())["verified"]["passed"]
