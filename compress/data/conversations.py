"""Conversations in the forms that data sets have them, as messages with a `role` and a `content` that is text.

A chat template must get what it was written for: a list of parts, a null or a mapping that it prints as Python would
write it is text that no model ever sees.
"""

import ast
import json
import re
from collections.abc import Iterator
from itertools import product
from typing import Any, TypeAlias

from compress.errors import CalibrationError

Message: TypeAlias = dict[str, Any]

PAIRS = (  # columns of a question, of its answer, and of what belongs to the question, where a row has no messages
    ("prompt", "completion", ""),
    ("prompt", "response", ""),
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("question", "answer", ""),
)
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names; system and tool are the same in both
_DUMPED = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")


def is_blank(value: object) -> bool:
    """Whether a column holds nothing in a row."""
    return value is None or value in ("", [], {}) or (isinstance(value, str) and value.isspace())


def pair(row: dict[str, Any], where: str) -> list[Message] | None:
    """Question and answer of a row as messages, none where both are blank; None where it has no columns for them.

    Raises:
        CalibrationError: a column that holds something else than text or messages.
    """
    columns = next((names for names in PAIRS if names[0] in row and names[1] in row), None)
    if columns is None:
        return None
    question, answer, more = columns
    messages: list[Message] = []
    for role, name in (("user", question), ("user", more), ("assistant", answer)):
        value = row.get(name)
        if is_blank(value):
            continue
        if isinstance(value, list):
            messages += normalized(value, where, f"field {name!r}")
        elif not isinstance(value, str):
            raise CalibrationError(f"{where}: field {name!r} is {value!r:.40}; a text is needed")
        elif name == more and isinstance(row[question], str) and messages:
            messages[-1]["content"] += f"\n\n{value}"
        else:
            messages.append({"role": role, "content": value})
    return messages


def undumped(text: str, where: str, label: str) -> str | list[Any]:
    """A text, or the messages where it is a list of them that was written as JSON or by Python.

    Raises:
        CalibrationError: it starts as one and can't be read.
    """
    if not _DUMPED.match(text):
        return text
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(found, list):
            return found
    raise CalibrationError(
        f"{where}: {label} starts as a list of messages and is not whole JSON; write a list or its JSON"
    )


def normalized(listed: list[Any], where: str, label: str) -> list[Message]:
    """Messages whose content is text, from those of OpenAI or ShareGPT, with parts, or with nulls for absent keys.

    Raises:
        CalibrationError: something that is no message, or whose content is not text.
    """
    messages = []
    for number, message in enumerate(listed, 1):
        place = f"{where}: {label}: message {number}"
        if not isinstance(message, dict):
            raise CalibrationError(f"{place} has no role and content (or from and value); found {message!r:.40}")
        kept = {key: value for key, value in message.items() if value is not None}
        if "role" in kept and ("content" in message or "tool_calls" in kept):
            content = _text(message.get("content"), place)
            made = kept | ({} if content is None else {"content": content})
        elif {"from", "value"} <= message.keys():
            made = {"role": message["from"], "content": _text(message["value"], place) or ""}
        else:
            found = ", ".join(map(str, kept)) or "none"
            raise CalibrationError(f"{place} has no role and content (or from and value); keys found: {found}")
        if not isinstance(made["role"], str):
            raise CalibrationError(f"{place}: its role is {made['role']!r:.40}; a text is needed")
        if "tool_calls" in made:
            made["tool_calls"] = _calls(made["tool_calls"], place)
        messages.append(made | {"role": _ROLES.get(made["role"], made["role"])})
    return messages


def _text(content: object, place: str) -> str | None:
    """A message's content, the texts of its parts one below the other; None where it has none."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CalibrationError(f"{place}: its content is {content!r:.40}; a text or a list of texts is needed")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, dict) else f"{part!r:.40}"
            raise CalibrationError(f"{place}: its content has a part of type {kind}; only text can be used")
        texts.append(text)
    return "\n".join(texts)


def _calls(calls: object, place: str) -> list[Any]:
    """A message's tool calls, from a list or its JSON."""
    try:
        found = json.loads(calls) if isinstance(calls, str) else calls
    except ValueError:
        found = None
    if not isinstance(found, list):
        raise CalibrationError(f"{place}: its tool_calls are {calls!r:.40}; a list is needed")
    return found


def variants(messages: list[Message]) -> Iterator[tuple[list[Message], list[str]]]:
    """The same messages in the forms that templates may want, each with what their text must not hold.

    Content is absent beside tool calls (as transformers gives it to templates since 5.23), or empty for templates that
    add to it. Arguments of tool calls are a mapping, or JSON in a text for those that print it.
    """
    empties = ({}, {"content": ""}) if any("content" not in message for message in messages) else ({},)
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    parsed = any(_arguments(call, True) != _arguments(call, False) for call in calls)
    for empty, mapping in product(empties, (True, False) if parsed else (False,)):
        variant: list[Message] = []
        unwanted: list[str] = []
        for message in messages:
            changed: Message = empty | message
            if "tool_calls" in message:
                changed["tool_calls"] = [_with_arguments(call, mapping) for call in message["tool_calls"]]
                unwanted += [text for call in changed["tool_calls"] for text in _misprints(call)]
            variant.append(changed)
        yield variant, unwanted


def _arguments(call: Any, mapping: bool) -> Any:
    """The arguments of a tool call, with `mapping` as one where they are JSON in a text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not mapping or not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _with_arguments(call: Any, mapping: bool) -> Any:
    found = _arguments(call, mapping)
    if found is None:
        return call
    changed = {"arguments": found}
    return call | ({"function": call["function"] | changed} if "function" in call else changed)


def _misprints(call: Any) -> list[str]:
    """How a tool call looks where a template prints it as Python does, or its JSON as JSON once more."""
    arguments = _arguments(call, False)
    if isinstance(arguments, str):
        return [str(call.get("function", call)), *([json.dumps(arguments)] if '"' in arguments else [])]
    python = [] if arguments is None or str(arguments) == json.dumps(arguments) else [str(arguments)]
    return [str(call.get("function", call)) if isinstance(call, dict) else str(call), *python]
