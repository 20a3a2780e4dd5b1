"""Conversations in the forms that data sets have them: each is what the chat template makes of plain messages."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.data.calibration import load_calibration
from compress.data.documents import Record, Renderer, select
from compress.data.sources import Row
from compress.recipe.text import CalibrationSpec

MODEL = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
PLAIN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
ASKS_TYPE = (  # as those of models with images do
    "{% for m in messages %}[{{ m.role }}] {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text | trim }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
)
MAPPING = (  # Qwen's and Llama's way: arguments are a mapping
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% for c in m.tool_calls or [] %}"
    '<call>{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}</call>{% endfor %}'
    "{{ '\n' }}{% endfor %}"
)
TEXT = (  # DeepSeek's way: arguments are a text
    "{% for m in messages %}[{{ m['role'] }}] {% if m['tool_calls'] %}{% for c in m['tool_calls'] %}"
    "{{ '<call>' + c['function']['name'] + ' ' + c['function']['arguments'] + '</call>' }}{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
)
ADDS = "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + '\n' }}{% endfor %}"
PYTHON = "{% for m in messages %}[{{ m.role }}] {{ m.content or '' }}{{ m.tool_calls or '' }}\n{% endfor %}"
ASKED, SAID = "Which fox?", "The red one."
MESSAGES = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
WRITTEN = "[user] Which fox?\n[assistant] The red one.\n"


def parts(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, **more}]


def tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODEL)
    loaded.chat_template = template
    return loaded


def written(row: Any, template: str | None, field: str | None = None) -> tuple[list[str], tuple[str, ...]]:
    """The documents of a row, and what is said of them."""
    renderer = Renderer(tokenizer(template))
    return [document.text for document in renderer.render(select([Row("c:1", row)], field))], renderer.warnings


ROWS: dict[str, Any] = {
    "messages": {"messages": MESSAGES},
    "null text": {"text": None, "messages": MESSAGES},
    "empty text": {"text": " ", "content": "", "messages": MESSAGES},
    "typed parts": {"messages": [m | {"content": parts(m["content"])} for m in MESSAGES]},
    "parts with nulls": {"messages": [m | {"content": parts(m["content"], image_url=None)} for m in MESSAGES]},
    "parts of bare text": {"messages": [m | {"content": [m["content"]]} for m in MESSAGES]},
    "nulls for absent keys": {"messages": [m | {"name": None, "tool_calls": None} for m in MESSAGES]},
    "JSON": {"messages": json.dumps(MESSAGES)},
    "JSON in another column": {"text": json.dumps(MESSAGES, indent=1)},
    "JSON of ShareGPT": {"conversations": json.dumps(SHAREGPT)},
    "Python": {"messages": str(MESSAGES)},
    "list as a row": MESSAGES,
    "JSON as a row": json.dumps(MESSAGES),
    "mapping of lists": {"messages": {"role": ["user", "assistant"], "content": [ASKED, SAID]}},
    "mapping of lists, ShareGPT": {"conversations": {"from": ["human", "gpt"], "value": [ASKED, SAID]}},
    "prompt and completion": {"prompt": ASKED, "completion": SAID},
    "prompt and response": {"prompt": ASKED, "response": SAID, "category": "qa"},
    "prompt and completion of messages": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
    "Alpaca": {"instruction": ASKED, "input": "", "output": SAID},
    "Alpaca without input": {"instruction": ASKED, "output": SAID},
    "Dolly": {"instruction": ASKED, "context": "", "response": SAID},
    "question and answer": {"id": 7, "question": ASKED, "answer": SAID},
    "null text beside Alpaca": {"text": None, "instruction": ASKED, "input": None, "output": SAID},
}


@pytest.mark.parametrize("template", [PLAIN, ASKS_TYPE, MAPPING, TEXT, PYTHON, ADDS])
@pytest.mark.parametrize("case", ROWS)
def test_every_form_is_written_as_plain_messages_are(case: str, template: str) -> None:
    assert written(ROWS[case], template) == ([WRITTEN], ())


@pytest.mark.parametrize("case", [name for name in ROWS if isinstance(ROWS[name], dict)])
def test_a_parquet_file_of_every_form(tmp_path: Path, case: str) -> None:
    pq.write_table(pa.Table.from_pylist([ROWS[case]] * 20), tmp_path / "c.parquet")
    chats = tokenizer(PLAIN)
    spec = CalibrationSpec(source=str(tmp_path / "c.parquet"), samples=4, sequence_length=16)
    expected = chats(WRITTEN, add_special_tokens=False)["input_ids"] * 20
    assert load_calibration(spec, chats).tokens.flatten().tolist() == expected[:64]


def test_a_text_that_is_there_comes_first_and_stays_what_it_is() -> None:
    assert written({"text": "A fox.", "messages": MESSAGES}, PLAIN) == (["A fox."], ())
    for text in ('{"role": "fox"}', '[{"name": "fox"}]', "[1, 2]", "[user] fox"):  # JSON of something else is a text
        assert written({"text": text}, PLAIN) == ([text], ())


def test_an_input_belongs_to_its_instruction() -> None:
    row = {"instruction": "Translate.", "input": "der Fuchs", "output": "the fox"}
    assert written(row, PLAIN) == (["[user] Translate.\n\nder Fuchs\n[assistant] the fox\n"], ())


def test_parts_of_a_content_are_joined_by_lines() -> None:
    row = {"messages": [{"role": "user", "content": [*parts("A fox."), "A dog.", {"text": "A cat."}]}]}
    assert written(row, PLAIN) == (["[user] A fox.\nA dog.\nA cat.\n"], ())


def test_blank_rows_are_passed_over_and_half_blank_ones_kept() -> None:
    for row in ({"messages": []}, {"text": None, "messages": None}, {"prompt": "", "completion": None}):
        assert written(row, PLAIN) == ([], ())
    assert written({"prompt": "A fox.", "completion": ""}, PLAIN) == (["[user] A fox.\n"], ())


CALL = {"type": "function", "function": {"name": "find", "arguments": '{"animal": "fox", "red": true}'}}
CALLS = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
AS_MAPPING = {"type": "function", "function": {"name": "find", "arguments": {"animal": "fox", "red": True}}}


@pytest.mark.parametrize("call", [CALL, AS_MAPPING])
def test_tool_calls_are_json_once_and_null_content_is_nothing(call: Any) -> None:
    row = {"messages": [CALLS[0], CALLS[1] | {"tool_calls": [call]}]}
    arguments = '{"animal": "fox", "red": true}'
    asked = "[user] Which fox?\n[assistant] "
    made = f'{asked}<call>{{"name": "find", "arguments": {arguments}}}</call>\n'
    assert written(row, MAPPING) == ([made], ())
    assert written(row, PLAIN) == written(row, ADDS) == ([f"{asked}\n"], ())
    if call is CALL:
        assert written(row, TEXT) == ([f"{asked}<call>find {arguments}</call>\n"], ())
    dumped = {"messages": [CALLS[0], CALLS[1] | {"tool_calls": json.dumps([call])}]}
    assert written(dumped, MAPPING) == ([made], ())
    del row["messages"][1]["content"]  # as some write it
    assert written(row, MAPPING) == ([made], ())


def test_a_template_that_prints_what_python_prints_refuses_the_conversation() -> None:
    texts, warnings = written({"messages": CALLS}, PYTHON)
    reason = "1 of 1 conversations are left out because the chat template refuses them"
    assert (texts, len(warnings)) == ([], 1)
    assert warnings[0].startswith(f"{reason} (first: c:1: it would print {{'name': 'find', 'arguments': ")


def test_none_as_a_word_is_no_null() -> None:
    messages = [{"role": "user", "content": "None of them? None."}, {"role": "assistant", "content": None}]
    for template in (PLAIN, ADDS):
        assert written({"messages": messages}, template) == (["[user] None of them? None.\n[assistant] \n"], ())


@pytest.mark.parametrize("case", ["typed parts", "JSON", "Alpaca", "mapping of lists", "question and answer"])
def test_without_a_template_contents_are_plain_text(case: str) -> None:
    plain = "this tokenizer has no chat template: conversations are used as plain text, without roles"
    assert written(ROWS[case], None) == (["Which fox?\n\nThe red one."], (plain,))


def test_a_named_field_reads_the_same_forms() -> None:
    for value in (MESSAGES, json.dumps(MESSAGES), {"role": ["user", "assistant"], "content": [ASKED, SAID]}):
        assert written({"text": "no", "chosen": value}, PLAIN, "chosen") == ([WRITTEN], ())
    assert list(select([Row("c:1", {"chosen": MESSAGES})], "chosen")) == [
        Record("c:1", MESSAGES, "field 'chosen'"),
    ]


def test_a_template_that_fails_leaves_the_conversation_out() -> None:
    for template in ("{{ 1 / 0 }}", "{{ range(10**9) | list }}", "{{ raise_exception('no') }}"):
        texts, (warning,) = written({"messages": MESSAGES}, template)
        assert texts == [] and "1 of 1 conversations are left out" in warning
