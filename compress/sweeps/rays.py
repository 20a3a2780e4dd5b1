"""Points made by Ray: each is one plain task, on whichever node of a running cluster has room for it.

What points say on the way comes through a file each in the sweep's folder: it outlives the node that wrote it, as an
actor would not, and all of it is there once the task has ended.
Ray gives a task its GPU by CUDA_VISIBLE_DEVICES, so a point's device is "auto" or "cuda", never "cuda:1"; and it sets
OMP_NUM_THREADS, which torch follows, to the task's CPUs unless the node has set it.
"""

import json
import logging
import platform
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import compress
from compress.errors import OutputError, UserError
from compress.sweeps.work import Event, Task, make
from compress.system.extras import missing_extra
from compress.system.files import writing

Make = Callable[[Task, Callable[[str], None]], Event]
Node = Mapping[str, Any]  # of `ray.nodes()`

_ANSWER = 12.0  # seconds in which a cluster must be joined
_LOOK = 120.0  # seconds in which every node must have run its first task
_STEP = 0.2  # seconds between looks at what points say
# In a process of its own: ray.init tries a silent address for two minutes, prints meanwhile, then ends its process.
_PROBE = """
import sys, ray
try:
    ray.init(sys.argv[1], log_to_driver=False, logging_level=50)
except Exception as error:
    sys.exit("\\n" + " ".join(str(error).split()))
"""


@dataclass
class _Running:
    """A point that was begun: its task, the file of what it says, and how many bytes of that were read."""

    name: str
    ref: Any
    said: Path
    began: float
    read: int = 0


class RayWorkers:
    """The workers of a running Ray cluster.

    Args:
        address: "auto", "HOST:PORT" of a cluster that this machine is a node of, or "ray://HOST:PORT" of any.
        folder: the sweep's, which all nodes must see.
        jobs: the most points at once; None for what the cluster has room for.
        work: the work folder, which all nodes must see too.

    Raises:
        UserError: no Ray, no cluster that answers, a node without this dscompress or (OutputError) without the folders.
    """

    def __init__(self, address: str, folder: Path, jobs: int | None, work: Path | None = None) -> None:
        self._ray = ray = _connect(address)
        self._make: Make = make
        self._running: list[_Running] = []
        self._token = secrets.token_hex(8)
        self._places = [place / ".ray" for place in (folder, work) if place is not None]
        try:
            able, gpus, cpus, self._room = shares(ray.nodes(), jobs)
            self.nodes = _looked_at(ray, able, [place / self._token for place in self._places])
        except BaseException:
            self.close()
            raise
        # A process per point: torch reads the number of threads once, and all memory is given back. Whether a lost
        # point is tried again is the sweep's to say.
        self._task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=0, max_calls=1)(_point)

    @property
    def free(self) -> int:
        """How many more points can be begun now; what others run on the cluster is not known."""
        return self._room - len(self._running)

    def start(self, task: Task) -> None:
        """Begin a point; there is a free worker."""
        said = self._places[0] / f"{self._token}-{secrets.token_hex(4)}"
        said.touch()
        self._running.append(_Running(task.name, self._task.remote(self._make, task, said), said, time.monotonic()))

    def events(self, seconds: float) -> Sequence[Event]:
        """What has happened since the last call; waits at most so long for something to happen."""
        until, happened = time.monotonic() + seconds, list[Event]()
        while self._running and not happened:
            left = max(0.0, until - time.monotonic())
            ended, _ = self._ray.wait([point.ref for point in self._running], timeout=min(left, _STEP))
            for point in list(self._running):
                happened += [Event(point.name, "said", text) for text in _news(point)]
                if point.ref in ended:
                    self._running.remove(point)
                    happened.append(self._ended(point))
            if not left:
                break
        return happened

    def _ended(self, point: _Running) -> Event:
        """What became of a point whose task has ended."""
        point.said.unlink(missing_ok=True)
        try:
            event: Event = self._ray.get(point.ref)
        except self._ray.exceptions.RayError as error:  # a worker or node died, memory ran out; `make` raises nothing
            return Event(point.name, "lost", _words(error), time.monotonic() - point.began)
        return event

    def close(self) -> None:
        """Stop all, whatever they are at, and leave the cluster."""
        # Ray itself ends the tasks of a driver that is gone, even killed; asked to, it has done so when we go on.
        refs, self._running = [point.ref for point in self._running], []
        with suppress(self._ray.exceptions.RayError):
            for ref in refs:
                self._ray.cancel(ref, force=True)
            if refs:
                self._ray.wait(refs, num_returns=len(refs), timeout=10)
        self._ray.shutdown()
        for place in self._places:
            for path in place.glob(f"{self._token}*"):
                path.unlink(missing_ok=True)
            with suppress(OSError):  # there is none, or it holds what a sweep that was killed has left
                place.rmdir()


def shares(nodes: Sequence[Node], jobs: int | None) -> tuple[list[Node], int, int, int]:
    """Of the nodes those that can make points, a point's GPUs (0 or 1) and CPUs, and how many fit at once."""
    alive = [node for node in nodes if node["Alive"]]
    cpu, gpu = ([int(node["Resources"].get(what, 0)) for node in alive] for what in ("CPU", "GPU"))
    if any(gpu):
        cpus, fit = min(here // points for here, points in zip(cpu, gpu, strict=True) if points), gpu
    else:
        cpus = max(1, min(sum(cpu) // (jobs or sum(cpu) or 1), max(cpu, default=0)))
        fit = [here // cpus for here in cpu]
    if not any(fit):
        raise UserError("the Ray cluster has neither GPUs nor CPUs; give its nodes some, or use --jobs")
    able = [node for node, points in zip(alive, fit, strict=True) if points]
    return able, int(any(gpu)), cpus, min(sum(fit), jobs or sum(fit))


def _connect(address: str) -> Any:
    """Make this process a driver of the cluster; returns the module."""
    if (problem := missing_extra("ray", "ray")) is not None:
        raise UserError(problem)
    import ray

    if ray.is_initialized():
        raise UserError("this process uses Ray already; call ray.shutdown() before the sweep")
    where = "on this machine" if address == "auto" else f"at {address}"
    remedy = "start one with `ray start --head`, let this machine join one with `ray start --address`, or use --jobs"
    usual = signal.getsignal(signal.SIGTERM)
    try:
        probe = subprocess.run([sys.executable, "-c", _PROBE, address], capture_output=True, text=True, timeout=_ANSWER)
        if probe.returncode != 0:
            raise ConnectionError((probe.stderr.splitlines() or ["it crashed"])[-1])
        ray.init(address, log_to_driver=False, logging_level=logging.CRITICAL)
    except subprocess.TimeoutExpired:
        raise UserError(f"no Ray cluster answers {where} in {_ANSWER:.0f} s; {remedy}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"no Ray cluster answers {where} ({reason}); {remedy}") from None
    with suppress(ValueError):  # not the main thread, where Ray has set a handler of its own
        signal.signal(signal.SIGTERM, usual)
    return ray


def _looked_at(ray: Any, able: Sequence[Node], files: Sequence[Path]) -> list[dict[str, str | None]]:
    """Every node's "python", "torch" and "version" of dscompress, once it has read all files and that is this one."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

    for file in files:
        with writing(file.parent.parent):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    task = ray.remote(num_cpus=0, max_retries=0)(_look())
    refs = [task.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(files) for node in able]
    nodes = []
    for ref, node in zip(refs, able, strict=True):
        name = f"Ray node {node['NodeManagerAddress']}"
        try:
            saw: dict[str, str | None] = ray.get(ref, timeout=_LOOK)
        except ray.exceptions.RayError as error:
            raise UserError(f"{name} runs no task; mend or stop that node ({_words(error)})") from None
        if unseen := saw.pop("unseen"):
            raise OutputError(f"{name} does not see {unseen}; put --output on a disk that all nodes share")
        if saw["version"] != compress.__version__:
            has = f"dscompress {saw['version']}" if saw["version"] else "no dscompress"
            raise UserError(f"{name} has {has}, this machine {compress.__version__}; install the same on both")
        nodes.append(saw)
    return nodes


def _look() -> Callable[[Sequence[Path]], dict[str, str | None]]:
    """What looks at a node: a local function, which Ray sends as code, so that it runs without dscompress there."""

    def look(files: Sequence[Path]) -> dict[str, str | None]:
        saw = {"python": platform.python_version(), **dict.fromkeys(("unseen", "version", "torch"))}
        for file in files:
            try:
                file.read_bytes()
            except OSError:
                saw["unseen"] = str(file.parent.parent)
        with suppress(ImportError, AttributeError):
            saw["version"] = import_module("compress").__version__
            saw["torch"] = metadata.version("torch")
        return saw

    return look


def _point(make: Make, task: Task, said: Path) -> Event:
    """Make a point on a node; one that joined since all were looked at, and does not see the folder, loses it."""
    if not said.exists():
        return Event(task.name, "lost", f"{platform.node()} does not see {said.parent.parent}")

    def say(text: str) -> None:
        with suppress(OSError), said.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(text) + "\n")

    return make(task, say)


def _news(point: _Running) -> list[str]:
    """What a point has said since it was last asked."""
    said = b""
    with suppress(OSError):  # a point's words are not worth a sweep
        said = point.said.read_bytes()[point.read :]
    said = said[: said.rfind(b"\n") + 1]  # a line may be half-written
    point.read += len(said)
    return [json.loads(line) for line in said.splitlines()]


def _words(error: Exception) -> str:
    """A line for what went wrong on a node."""
    cause = getattr(error, "cause", None)
    lines = str(error if cause is None else f"{type(cause).__name__}: {cause}").split("\n")
    return lines[0].strip() or type(error).__name__
