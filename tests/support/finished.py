"""What the fixture `finished_run` gives."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class FinishedRun:
    """What a run left, and what it printed.

    Args:
        arguments: of the command.
        output: the checkpoint.
        work: its work folder.
        report: report.json.
        stdout: standard output.
        stderr: standard error.
    """

    arguments: list[str]
    output: Path
    work: Path
    report: dict[str, Any]
    stdout: str
    stderr: str
