"""Points made by processes of this machine: each makes one at a time, and stays for the next.

They are told and tell by lines of JSON. A process that is killed costs its point one more try; one whose sweep is gone
ends by itself.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

from compress.evaluation.stock import kept_ready
from compress.sweeps.work import Event, Task, make


class _Process:
    """One worker and what it is at."""

    def __init__(self, number: int, jobs: int, log: Path) -> None:
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)
        more = {"OMP_NUM_THREADS": str(threads)} if jobs > 1 else {}
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "compress.sweeps.local", str(number)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=os.environ | more,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which ends them
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.task: Task | None = None
        self._rest = b""

    def start(self, task: Task) -> None:
        self.task = task
        with suppress(BrokenPipeError):  # it has died; its output says so
            self.input.write(json.dumps(asdict(task)).encode() + b"\n")
            self.input.flush()

    def read(self) -> tuple[list[Event], bool]:
        """What it has said, and whether it has ended."""
        data = b""
        with suppress(BlockingIOError):
            while chunk := self.output.read(1 << 16):
                data += chunk
        ended = self.process.poll() is not None
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = [Event(**json.loads(line)) for line in lines]
        if any(event.kind != "said" for event in events):
            self.task = None
        if ended and self.task is not None:
            events.append(Event(self.task.name, "lost", f"its process ended ({_words(self.process.returncode)})"))
            self.task = None
        return events, ended


def _words(code: int) -> str:
    return f"killed by signal {-code}, for want of memory perhaps" if code < 0 else f"exit code {code}"


class LocalWorkers:
    """Processes here; each has its own GPU where there are several, or its share of the processor.

    Args:
        jobs: how many.
        logs: folder for what they write to standard error.
    """

    def __init__(self, jobs: int, logs: Path) -> None:
        self._jobs, self._logs = jobs, logs
        self._processes: dict[int, _Process] = {}

    @property
    def free(self) -> int:
        """How many more points can be begun now."""
        return self._jobs - sum(process.task is not None for process in self._processes.values())

    def start(self, task: Task) -> None:
        """Begin a point; there is a free worker."""
        idle = [number for number, process in self._processes.items() if process.task is None]
        if not idle:
            idle = [next(number for number in range(self._jobs) if number not in self._processes)]
            self._logs.mkdir(parents=True, exist_ok=True)
            self._processes[idle[0]] = _Process(idle[0], self._jobs, self._logs / f"worker-{idle[0]}.log")
        self._processes[idle[0]].start(task)

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened since the last call; waits at most so long for something to happen."""
        with selectors.DefaultSelector() as selector:
            for process in self._processes.values():
                selector.register(process.output, selectors.EVENT_READ)
            selector.select(seconds)
        found: list[Event] = []
        for number, process in list(self._processes.items()):
            events, ended = process.read()
            found += events
            if ended:
                del self._processes[number]
        return found

    def close(self) -> None:
        """Stop all, whatever they are at."""
        for process in self._processes.values():
            process.process.kill()
            process.process.wait()
        self._processes.clear()


def _device(wanted: str, number: int) -> str:
    """The GPU of a worker, by turns."""
    import torch

    count = torch.cuda.device_count() if wanted in ("auto", "cuda") else 0
    return f"cuda:{number % count}" if count else wanted


def main() -> None:
    """A worker: tasks on standard input, events on what was standard output."""
    number = int(sys.argv[1])
    told = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is no event
    tasks: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            tasks.put(json.loads(line))
        os._exit(1)  # the sweep has ended

    threading.Thread(target=listen, daemon=True).start()

    def tell(event: Event) -> None:
        told.write(json.dumps(asdict(event)) + "\n")

    with ExitStack() as kept:
        while True:
            task = Task(**tasks.get())
            moved = replace(task, device=_device(task.device, number))
            if moved.device.startswith("cuda"):
                kept.enter_context(kept_ready())  # one stock loader for all points
            tell(make(moved, lambda text: tell(Event(moved.name, "said", text))))  # noqa: B023


if __name__ == "__main__":
    main()
