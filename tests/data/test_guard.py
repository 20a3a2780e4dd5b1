"""Chat templates are run with limits; what they do beyond them is one line."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.data import guard
from compress.data.documents import Record, Renderer
from compress.data.guard import render
from compress.errors import CalibrationError

MESSAGES = [{"role": "user", "content": "hello"}]
REMEDY = "get the model's own tokenizer_config.json and chat_template.jinja again"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "models" / "tiny-wiki-llama")


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
         "took more than 1 seconds for 38 characters"),
        ("{{ messages[0]['content'] * 1000000000000 }}", "took more than 2 GiB of memory for 38 characters"),
        ("{{ messages[0]['content'] * 1000000 }}", "makes 5,000,000 characters of 38"),
    ],
    ids=["loops", "fills memory", "multiplies"],
)  # fmt: skip
def test_a_template_that_explodes(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, template: str, what: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    monkeypatch.setattr(guard, "SECONDS", 1)
    with pytest.raises(CalibrationError) as caught:
        list(Renderer(tokenizer).render([Record("text.jsonl:1", MESSAGES)]))
    assert str(caught.value) == f"text.jsonl:1: the chat template {what}; {REMEDY}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(1000000) %}{% endfor %}", "Range too big. The sandbox blocks ranges larger than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth exceeded"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{% for", "unexpected 'end of template'"),
    ],
    ids=["range", "macro", "division", "syntax"],
)
def test_what_a_template_raises_leaves_the_conversation_out(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, template: str, reason: str
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    renderer = Renderer(tokenizer)
    assert list(renderer.render([Record("text.jsonl:1", MESSAGES)])) == []
    (warning,) = renderer.warnings
    start = "1 of 1 conversations are left out because the chat template refuses them (first: text.jsonl:1: "
    assert warning.startswith(start + reason)


def test_a_template_is_rendered_as_transformers_does(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{{ add_generation_prompt }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    for options in ({}, {"add_generation_prompt": True}):
        expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
        assert render(tokenizer, MESSAGES, **options) == expected
