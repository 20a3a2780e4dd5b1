"""The command line in this process: what it prints and its exit code, whatever the versions of typer and click."""

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from compress.cli import app


@dataclass(frozen=True)
class Result:
    """What a command printed, and its exit code."""

    exit_code: int
    stdout: str
    stderr: str


def invoke(*arguments: object) -> Result:
    """Run `dscompress` with these arguments; what it does not turn into an exit code is raised."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())
