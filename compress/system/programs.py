"""Programs of other environments: which interpreter has them, and scripts that ask them in processes of their own.

Whatever such a program does, it ends with all that it started when it answers, fails, takes too long or is interrupted.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.system.distributed import alone

CLONE = Path(__file__).parents[2]
_SECONDS = 60  # to say a version


@dataclass(frozen=True)
class Program:
    """A program of another environment, or of this one.

    Args:
        name: for people.
        module: what Python imports it by.
        environment: the folder of a virtual environment that holds it, looked for in the current folder and the clone.
        client: the script that asks it, which prints its version when told `--version`, or an empty line; then a line
            for each other package there that its answers hang on.
        remedy: how to get it.
    """

    name: str
    module: str
    environment: str
    client: Path
    remedy: str


@dataclass(frozen=True)
class Engine:
    """An environment with a program: its interpreter, and which version of the program it has.

    `others` are names and versions of what else is there that its answers hang on.
    """

    python: Path
    version: str
    others: tuple[str, ...] = ()


def find_program(program: Program, named: str | None) -> Engine | str:
    """The environment to ask, or in one line why there is none, with the remedy.

    Args:
        program: what it has to have.
        named: its interpreter; None takes this environment where it has the program, or the program's usual one.
    """
    python = _interpreter(program, named)
    if python is None:
        return (
            f"{program.name} is not installed here and there is no {program.environment} in {Path.cwd()}; "
            f"{program.remedy}, or name the Python of an environment that has it"
        )
    try:
        done = subprocess.run(
            [python, program.client, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_SECONDS, env=alone(), check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"{python}: can't be started ({reason}); name the Python of an environment that has {program.name}"
    if done.returncode or not done.stdout.strip():
        last = done.stderr.strip().splitlines()[-1:]
        why = f" ({last[0]})" if last else ""
        return (
            f"{python}: has no {program.name}{why}; name the Python of an environment that has it, or {program.remedy}"
        )
    version, *others = done.stdout.strip().splitlines()
    return Engine(python, version, tuple(others))


def _interpreter(program: Program, named: str | None) -> Path | None:
    if named is not None:
        return Path(named)
    if find_spec(program.module) is not None:
        return Path(sys.executable)
    places = [folder / program.environment / "bin" / "python" for folder in (Path.cwd(), CLONE)]
    return next((python for python in places if python.is_file()), None)


def run_client(
    python: Path, client: Path, request: dict[str, Any], seconds: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    """The answer of a client script to a request; with a `failure` where there is none.

    Args:
        python: the interpreter.
        client: called with the names of a file that holds the request and of one for the answer, both JSON.
        request: what is asked.
        seconds: at most.
        environment: variables beside this process's own.
    """
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = Path(scratch)
        asked, answer, said = (folder / name for name in ("request.json", "answer.json", "said.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        failure = run_program([python, client, asked, answer], said, seconds, environment)
        if answer.is_file():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
        return {"failure": failure or how_it_ended("ended without an answer", said)}


def run_program(
    command: Sequence[str | Path], said: Path, seconds: float | None, environment: Mapping[str, str]
) -> str | None:
    """Run a program to its end; why it was stopped or failed, in words, or None.

    Args:
        command: the program and its arguments.
        said: a file for all that it prints.
        seconds: at most; None waits for ever.
        environment: variables beside this process's own.
    """
    with said.open("wb") as to:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=to, stderr=subprocess.STDOUT, env=alone() | dict(environment),
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:.0f} s, so it was stopped"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode < 0:
        return how_it_ended(f"stopped by signal {-process.returncode}", said)
    return how_it_ended("ended without an answer", said) if process.returncode else None


def how_it_ended(how: str, said: Path) -> str:
    """In words, with the last line that it printed."""
    lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"{how} ({lines[-1].strip()})" if lines else how
