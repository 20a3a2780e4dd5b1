"""Runs the command in a process of its own that is stopped at a chosen moment.

The processes are forks of a server that has imported everything already, so that one starts in a moment.
"""

import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from signal import SIGKILL, Signals

from stock_here import asked_here

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "killable",
        "accelerate",
        "compress.report.plots",
        "compress.report.write",
        "compress.runs.runner",
        "compress.stages.quantize.run",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
        "matplotlib.figure",
        "transformers.convert_slow_tokenizer",
        "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama",
    ]
)


@dataclass(frozen=True)
class Moment:
    """Just before a file operation.

    Args:
        event: Python's name of it: open, os.rename, os.link, shutil.rmtree.
        path: expression that is found in its first path (of a rename, in "old -> new").
        signal: what the process gets then; None: it says so, and goes on when it is told to.
        time: at the first such operation, the second, ...
    """

    event: str
    path: str
    signal: Signals | None = SIGKILL
    time: int = 1


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed) and everything that it printed."""

    code: int
    printed: str


class Process:
    """The command, running.

    Args:
        arguments: of `dscompress`.
        folder: its current folder.
        moment: when it is stopped.
        environment: variables that it has beside this process's.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        moment: Moment | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        environment = dict(environment or {})
        self.log = folder / f"log{environment.get('RANK', '')}.txt"
        self.pipe, other = CONTEXT.Pipe()
        work = (list(arguments), folder, self.log, moment, other, environment)
        self._process = CONTEXT.Process(target=_work, args=work)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def end(self, kill_after: float | None = None) -> Ended:
        """Wait for the end, or kill it after so many seconds."""
        self._process.join(kill_after)
        if kill_after is not None:
            self._process.kill()
            self._process.join()
        assert self._process.exitcode is not None
        return Ended(self._process.exitcode, self.log.read_text() if self.log.exists() else "")


def run(arguments: Sequence[str], folder: Path, moment: Moment | None = None) -> Ended:
    return Process(arguments, folder, moment).end()


def _work(
    arguments: list[str],
    folder: Path,
    log: Path,
    moment: Moment | None,
    pipe: Connection,
    environment: dict[str, str],
) -> None:
    from compress.cli import main
    from compress.evaluation import base, verify

    base.asked = verify.asked = asked_here
    os.environ.update(environment)
    gc.freeze()  # what was imported before the fork never needs to be looked through
    os.chdir(folder)
    printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    if moment is not None:
        _watch(moment, pipe)
    sys.argv = ["dscompress", *arguments]
    main()


def _watch(moment: Moment, pipe: Connection) -> None:
    left = moment.time

    def hook(event: str, values: tuple[object, ...]) -> None:
        nonlocal left
        if event != moment.event or not left:
            return
        paths = values[:2] if event in ("os.rename", "os.link") else values[:1]
        if not re.search(moment.path, " -> ".join(map(str, paths))):
            return
        left -= 1
        if left:
            return
        if moment.signal is not None:
            os.kill(os.getpid(), moment.signal)
        else:
            pipe.send("here")
            pipe.recv()

    sys.addaudithook(hook)
