"""Rows become documents: which field holds the text, in what order, and how a conversation is written.

Left out on purpose: cutting documents. A set drawn from books is a few long documents, which is what its owner
asked for; web text is a few hundred tokens each.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from compress.data.assistant import REMEDY, Spans, assistant_spans
from compress.data.conversations import PAIRS, is_blank, normalized, pair, undumped, variants
from compress.data.guard import render
from compress.data.sources import Row
from compress.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("text", "content", "messages", "conversations")  # in this order, the first that holds something
COLUMNS = (*FIELDS, *dict.fromkeys(name for columns in PAIRS for name in columns if name))
BUFFER_ROWS = 10_000
BUFFER_CHARACTERS = 64_000_000


class Record(NamedTuple):
    """What a row holds in its text field: a text or a conversation, and where it stands."""

    where: str
    content: str | list[Any]
    label: str = "row"


class Document(NamedTuple):
    """A text for the tokenizer.

    Args:
        text: never empty.
        add_special_tokens: False for a rendered conversation, whose template has written its own.
        assistant: start and end of what the assistant says, in characters, where the renderer was asked for it.
    """

    text: str
    add_special_tokens: bool
    assistant: Spans | None = None


def select(rows: Iterable[Row], field: str | None) -> Iterator[Record]:
    """The text or the conversation of each row; rows where it is null or blank are passed over.

    Args:
        rows: mappings of fields, or plain texts.
        field: name of the field; None takes the first of `FIELDS` that holds something, or else question and answer
            from the columns of `PAIRS`.

    Raises:
        CalibrationError: a row without such a field, or with something else in it.
    """
    names = (field,) if field is not None else FIELDS
    for where, value in rows:
        content, label = value, "row"
        if isinstance(value, dict):
            name = next((name for name in names if not is_blank(value.get(name))), None)
            if name is not None:
                content, label = value[name], f"field {name!r}"
            else:
                content = None if field is not None else pair(value, where)
                if content is None and not any(name in value for name in names):
                    raise CalibrationError(_no_field(where, names, value))
        if is_blank(content):
            continue
        yield Record(where, _read(content, where, label), label)


def _read(content: object, where: str, label: str) -> str | list[Any]:
    """A field's content as text or messages."""
    if isinstance(content, dict) and any(
        {*keys} <= content.keys() for keys in (("role", "content"), ("from", "value"))
    ):
        columns = [values for values in content.values() if isinstance(values, list)]
        if len(columns) == len(content) and len({len(values) for values in columns}) == 1:  # a list of mappings, turned
            content = [dict(zip(content, values, strict=True)) for values in zip(*columns, strict=True)]
    if isinstance(content, str):
        return undumped(content, where, label)
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: {label} is {content!r:.40}; a text or a list of messages is needed")
    if all(isinstance(item, str) for item in content):
        raise CalibrationError(
            f"{where}: {label} is a list of strings, which may be passages or turns; write one text, or messages with "
            "role and content"
        )
    return content


def _no_field(where: str, names: Sequence[str], value: dict[str, object]) -> str:
    found = ", ".join(value) or "none"
    if len(names) == 1:
        return f"{where}: no field {names[0]!r}; fields found: {found}"
    return f"{where}: no text field ({', '.join(names)}); fields found: {found}; choose one with `field`"


def shuffle(records: Iterable[Record], seed: int) -> Iterator[Record]:
    """The same records in an order drawn from `seed`, through a buffer of 10,000 records or 64 million characters.

    What fits the buffer is shuffled evenly; a larger source is shuffled locally, from its start.
    """
    draw = random.Random(seed)
    buffer: list[Record] = []
    held = 0

    def take() -> Record:
        index = draw.randrange(len(buffer))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    for record in records:
        buffer.append(record)
        held += _size(record)
        while len(buffer) >= BUFFER_ROWS or held >= BUFFER_CHARACTERS:
            taken = take()
            held -= _size(taken)
            yield taken
            if not buffer:
                break
    while buffer:
        yield take()


def _size(record: Record) -> int:
    return len(record.content) if isinstance(record.content, str) else len(str(record.content))


class Renderer:
    """Writes records as documents, and counts the conversations that could not be written as they should.

    A conversation goes through the tokenizer's chat template. A tokenizer without one (a base model's) gets the
    messages' contents separated by blank lines. A conversation that the template refuses, for instance for a system
    message that the model does not know, is left out. Both are said in `warnings`.

    Args:
        tokenizer: whose template it is.
        assistant_only: find what the assistant says in every conversation.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", *, assistant_only: bool = False) -> None:
        self._tokenizer = tokenizer
        self._assistant_only = assistant_only
        self._conversations = 0
        self._refused = 0
        self._first_refusal = ""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What happened so far to conversations, a line each."""
        if self._conversations and not self._tokenizer.chat_template:
            return ("this tokenizer has no chat template: conversations are used as plain text, without roles",)
        if self._refused:
            count = f"{self._refused} of {self._conversations} conversations"
            return (f"{count} are left out because the chat template refuses them (first: {self._first_refusal})",)
        return ()

    def render(self, records: Iterable[Record]) -> Iterator[Document]:
        """One document per record, in order, without those that are refused or blank.

        Raises:
            CalibrationError: a message without a role, or what the assistant says can't be found.
        """
        for record in records:
            if isinstance(record.content, str):
                document = Document(record.content, add_special_tokens=True)
            else:
                document = self._conversation(record.where, normalized(record.content, record.where, record.label))
            # a lone surrogate (valid in JSON, not in Unicode) would stop the tokenizer
            text = document.text.encode("utf-8", "replace").decode()
            if text.strip():
                yield document._replace(text=text)

    def _conversation(self, where: str, messages: list[dict[str, Any]]) -> Document:
        self._conversations += 1
        if not self._tokenizer.chat_template:
            if self._assistant_only:
                raise CalibrationError(f"{where}: a conversation, and this tokenizer has no chat template; {REMEDY}")
            contents = [message.get("content") for message in messages]
            return Document("\n\n".join(text for text in contents if isinstance(text, str)), add_special_tokens=True)
        reason = ""
        for variant, unwanted in variants(messages):
            try:
                text = render(self._tokenizer, variant)
                said = assistant_spans(self._tokenizer, variant, text) if self._assistant_only else None
            except CalibrationError as error:
                raise CalibrationError(f"{where}: {error}") from error
            except Exception as error:  # a template is a program: it may raise anything
                reason = reason or " ".join(str(error).split())
                continue
            printed = next((each for each in unwanted if each in text), None)
            if printed is None:
                return Document(text, add_special_tokens=False, assistant=said)
            reason = reason or f"it would print {printed:.60}"
        self._refused += 1
        self._first_refusal = self._first_refusal or f"{where}: {reason}"
        return Document("", add_special_tokens=False)
