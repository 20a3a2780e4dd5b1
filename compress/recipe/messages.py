"""The words of a recipe's problems: one line each, saying the value, what is allowed and what to do.

Pydantic and PyYAML say what is wrong to programmers; this says it to people who edit YAML.
"""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Location: TypeAlias = tuple[str | int, ...]


class Excess(yaml.YAMLError):
    """More of something than a recipe can mean.

    Args:
        problem: the whole message.
        problem_mark: of PyYAML, where it is.
    """

    def __init__(self, problem: str, problem_mark: Any) -> None:
        self.problem, self.problem_mark = problem, problem_mark


def shown_path(path: Path) -> str:
    """`path` as people would type it: relative to the current folder where it lies inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def shown_value(value: object) -> str:
    """A value in a message: as YAML would have it, in one line, cut where it is long."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = "an empty value" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dotted(location: Location) -> str:
    """stages.0.overrides["*.down_proj"].bits: the spelling that `--set` takes."""
    text = ""
    for part in location:
        plain = isinstance(part, int) or re.fullmatch(r"[\w-]+", part)
        text += f".{part}" if plain else f"[{json.dumps(part, ensure_ascii=False)}]"
    return text.removeprefix(".")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` most likely misspells, if there is one."""
    lowered = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return lowered[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing."""
    guess = nearest(word, known)
    return f"; did you mean {guess}?" if guess else ""


def known_fields(schema: type[BaseModel], location: Location, tags: Iterable[str | int] = ()) -> dict[str, FieldInfo]:
    """The keys that the mapping at `location` may have, with what each one is.

    Args:
        schema: of the whole document.
        location: of the mapping.
        tags: names of union members; where one of them could be meant, it is.
    """
    models = [schema]
    for part in location:
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        models = [found for field in fields for found in _models(field.annotation)] if fields else models
        models = [model for model in models if _kinds(model).intersection(tags)] or models
        models = [model for model in models if model.__name__ in tags] or models
    return {key: field for model in models for key, field in model.model_fields.items()}


def _kinds(model: type[BaseModel]) -> set[Any]:
    """The stage kinds whose specs a model describes."""
    return set(get_args(model.model_fields["kind"].annotation)) if "kind" in model.model_fields else set()


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models inside an annotation such as list[A] or dict[str, B] | None."""
    if arguments := get_args(annotation):  # first: in Python 3.10, list[A] passes for a class
        return [model for argument in arguments for model in _models(argument)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []


def syntax_message(error: yaml.YAMLError) -> str:
    """One line for a YAML error, with the remedy for the mistakes that recipes invite."""
    if isinstance(error, Excess):
        return error.problem
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "can't be parsed"
    context = getattr(error, "context", None) or ""
    if "alias" in f"{problem} {context}":
        return f'not YAML: {problem}; text that starts with * or & needs quotes, such as "*.down_proj"'
    if "cannot start any token" in problem or "tab character" in problem:
        return f"not YAML: {problem}; indent with spaces (no tabs), and put text that starts with %, @ or ` in quotes"
    if "mapping values are not allowed" in problem:
        return f"not YAML: {problem}; check the indentation, and put text that has a colon in quotes"
    if "single document" in context:
        return "holds more than one YAML document; keep one (remove the --- between them)"
    mark = getattr(error, "context_mark", None)
    return f"not YAML: {problem}" + (f" {context}" if context else "") + (f" of line {mark.line + 1}" if mark else "")


def validation_message(error: ErrorDetails, known: dict[str, FieldInfo]) -> str:
    """What is wrong and what to do, for one error of pydantic.

    Args:
        error: one item of ValidationError.errors().
        known: the keys allowed beside the value; inside it, where the value should have been a mapping.
    """
    value, context, key = error["input"], error.get("ctx", {}), str(error["loc"][-1])
    shown = shown_value(value)
    match error["type"]:
        case "extra_forbidden":
            return "unknown key" + (did_you_mean(key, known) or f"; use {', '.join(known)}")
        case "missing":
            return f"is missing; add it. {known[key].description or ''}".rstrip()
        case "literal_error":
            allowed = context["expected"].replace("'", "")
            guess = nearest(value, re.split(", | or ", allowed)) if isinstance(value, str) else None
            return f"{shown} is not allowed; use {allowed}" + (f" (did you mean {guess}?)" if guess else "")
        case "string_type" if isinstance(value, int | float) and not isinstance(value, bool):
            return f'{shown} is not text; put it in quotes: "{value}"'
        case "dict_type" | "model_type":
            return f"{shown} is not a mapping; write lines of key: value" + (f" ({', '.join(known)})" if known else "")
    if error["type"] in _REMEDIES:
        return _REMEDIES[error["type"]].format(shown=shown, **context)
    return error["msg"]


_REMEDIES = {
    "bool_type": "{shown} is not allowed; use true or false",
    "string_type": "{shown} is not allowed; write text",
    "string_too_short": "is empty; write some text",
    "list_type": "{shown} is not a list; write [a, b], or a line with a dash for each item",
    "too_short": "is empty; add at least one item",
    "float_type": "{shown} is not a number; write one such as 0.01",
    "finite_number": "{shown} is not a number; write one such as 0.01",
    "greater_than": "{shown} is not allowed; use a number above {gt:g}",
    "greater_than_equal": "{shown} is not allowed; use {ge:g} or more",
    "less_than": "{shown} is not allowed; use a number below {lt:g}",
    "less_than_equal": "{shown} is not allowed; use {le:g} or less",
    "count": "{shown} is not a whole number; write one such as 128, 64k, 20M or 1B",
    "size": "{shown} is not a size; write one such as 4GB",
    "union_tag_not_found": "{shown} is not a mapping; write lines of key: value",
    "smooth": "{shown} is not a power; use a number from 0 to 1 such as 0.5, auto or null",
    "sha256": "{shown} is not a checksum; write the 64 hexadecimal digits of sha256sum",
}
