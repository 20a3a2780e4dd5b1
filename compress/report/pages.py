"""How pages are made and written: templates with their filters, and files that appear whole or not at all."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import jinja2

from compress.errors import OutputError
from compress.report import figures
from compress.system.units import count, size


def environment() -> jinja2.Environment:
    """Where templates come from, what they may call, and that HTML is escaped."""
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("compress.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[..., str]] = {
        "size": lambda value: "–" if value is None else size(value),
        "count": count,
        "number": figures.number,
        "perplexity": figures.perplexity,
        "percent": figures.percent,
        "precision": figures.precision,
        "interval": figures.interval,
        "duration": figures.duration,
        "spec": figures.spec_words,
        "prose": _prose,
        "cell": lambda text: _prose(text).replace("|", "\\|"),
        "fenced": _fenced,
    }
    found.filters.update(filters)
    return found


def _prose(text: str) -> str:
    """Text as one line of Markdown that shows it as it is."""
    return re.sub(r"([\\`*<>\[\]])", r"\\\1", " ".join(text.split()))


def _fenced(text: str, language: str = "text") -> str:
    """Text as a Markdown code block; its fence is longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def write(path: Path, content: str | bytes) -> None:
    """`content` under its final name once whole.

    Raises:
        OutputError: it can't be written there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: can't be written ({error.strerror or error}); free the disk or choose another output folder"
        ) from error
