"""Answers tasks in this process and not in one of its own, which takes seconds to start."""

from typing import Any

from compress.errors import DscompressError, UserError
from compress.evaluation.tasks.ask import Request
from compress.evaluation.tasks.worker import evaluate
from compress.loop.context import Context


def answer_here(request: Request, context: Context, title: str) -> dict[str, Any]:
    """`compress.evaluation.tasks.ask._answer`."""
    try:
        return evaluate(request, lambda total, done: None)
    except DscompressError as error:
        return {"refused": str(error), "user": isinstance(error, UserError)}
