"""Several processes that work as one, on one machine or on many: calibration sequences and rows of matrices are split.

A launcher starts the processes (launcher.py, or torchrun by hand) and ends all when one ends badly; a process that it
started joins the others and takes a GPU of its own. All hold the same weights at any time and only rank 0 writes. In
a run of one process everything here does nothing, and torch.distributed is not imported.

Left out: splitting a layer's weights. One layer and its Hessians fit a GPU, and splitting tokens costs less traffic.
"""

import ctypes
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compress.errors import DscompressError, PeerError, UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)  # with another process that computes; the launcher sees to one that has ended
_LOOK = 0.02  # seconds between two looks whether rank 0 is ready
_GRACE = timedelta(seconds=10)  # in which a process that has failed says so itself, and a launcher ends the others
_SHOWN = 30.0  # seconds in which a disk that hosts share shows a new file to all
_FAILURES, _CODE = "failures", "code"
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PARENT_DEATH_SIGNAL = 1  # prctl(2): PR_SET_PDEATHSIG


@dataclass
class _Joined:
    """This process among the others."""

    rank: int
    world: int
    here: int
    device: str
    store: "Store"
    threads: int
    host: str
    shared: int = 0


_joined: _Joined | None = None
_own: str | None = None  # the device of a process that joined, to its end


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in _LAUNCHED) and os.environ["WORLD_SIZE"] != "1"


def join(device: str) -> str:
    """Join the other processes that a launcher has started; returns the device of this one.

    Args:
        device: "auto", "cpu" or "cuda"; any where this process is the only one.

    Raises:
        UserError: fewer GPUs than processes on this machine.
    """
    global _joined, _own
    if not launched():
        return device
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, here = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process is told of in one line, here
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    end_with_parent()
    store, _, _ = next(rendezvous("env://", rank, world, timeout=_PATIENCE))
    threads = torch.get_num_threads()
    host = os.environ.get("GROUP_RANK", "0")  # launchers' number; a name may be that of two
    _joined = _Joined(rank, world, here, device, PrefixStore("dscompress", store), threads, host)
    _joined.device = _own = device_of(device, here, local)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, threads // here))
    with _together():
        if _joined.device == "cpu":
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
        else:
            own = torch.device(_joined.device)
            torch.cuda.set_device(own)
            dist.init_process_group("nccl", store=store, rank=rank, world_size=world, timeout=_PATIENCE, device_id=own)
    return _joined.device


def leave() -> bool:
    """End working together, when rank 0 gets here; returns whether this process goes on alone, which rank 0 does."""
    global _joined
    if _joined is None:
        return True
    import torch
    import torch.distributed as dist

    barrier()
    rank = _joined.rank
    torch.set_num_threads(_joined.threads)
    dist.destroy_process_group()
    for name in _PLACE:
        os.environ.pop(name, None)  # what this process starts from here on is alone
    _joined = None
    return rank == 0


def end_with_parent() -> None:
    """From now on this process ends when the one that started it does: one that is killed leaves none behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def alone() -> dict[str, str]:
    """The environment of a process that this one starts and that is none of the others."""
    return {name: value for name, value in os.environ.items() if name not in _PLACE}


def rank() -> int:
    """Number of this process; 0 is the one that writes."""
    return 0 if _joined is None else _joined.rank


def world() -> int:
    """Number of processes."""
    return 1 if _joined is None else _joined.world


def here() -> int:
    """Number of processes on this machine."""
    return 1 if _joined is None else _joined.here


def device() -> str | None:
    """The device that this process has among several ("cuda:1"), alone too; None where it was started alone."""
    return _own


def first(make: Callable[[], T]) -> T:
    """What rank 0 makes, in all processes; they wait for it, as long as it takes."""
    if _joined is None:
        return make()
    import torch.distributed as dist

    made = [make() if _joined.rank == 0 else None]
    _joined.shared += 1
    key = f"made {_joined.shared}"
    with _together():
        if _joined.rank == 0:
            _joined.store.set(key, "")
        else:
            _await(_joined.store, key)
        dist.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]


def on_first(work: Callable[[], T]) -> T:
    """What rank 0 does as in a run of one process, with all threads; the others wait, and get it too."""
    return first(lambda: _alone(work))


def _alone(work: Callable[[], T]) -> T:
    """Do something as the only process."""
    global _joined
    joined = _joined
    if joined is None:
        return work()
    import torch

    threads, place = torch.get_num_threads(), {name: os.environ.pop(name) for name in _PLACE if name in os.environ}
    torch.set_num_threads(joined.threads)
    _joined = None
    try:
        return work()
    finally:
        _joined = joined
        torch.set_num_threads(threads)
        os.environ.update(place)


def barrier() -> None:
    """Wait for rank 0 to get here."""
    first(lambda: None)


def all_reduce(tensor: "torch.Tensor") -> "torch.Tensor":
    """Sum over the processes, in place; all get the same bits."""
    if _joined is not None:
        import torch.distributed as dist

        with _together():
            dist.all_reduce(tensor)
    return tensor


def total(number: int) -> int:
    """Sum of a number over the processes."""
    if _joined is None:
        return number
    import torch

    return int(all_reduce(torch.tensor(number, device=_joined.device)))


def gather(mine: T) -> list[T]:
    """What every process has, by rank."""
    if _joined is None:
        return [mine]
    import torch.distributed as dist

    all_: list[T | None] = [None] * _joined.world
    with _together():
        dist.all_gather_object(all_, mine)
    return all_  # type: ignore[return-value]


def check_shared(folder: Path) -> None:
    """Refuse a work folder that is not the same one on all hosts.

    Raises:
        UserError: naming the hosts that have another; said by rank 0.
    """
    if _joined is None:
        return
    name = first(lambda: _leave_note(folder))
    note = folder / name
    try:
        others = gather(None if _appears(note) else socket.gethostname())
    finally:
        if _joined.rank == 0:
            note.unlink(missing_ok=True)
    first(lambda: _same(folder, others))


def _leave_note(folder: Path) -> str:
    note = folder / f"{uuid.uuid4().hex}.lock"  # one that a killed process leaves is cleared away
    note.touch()
    return note.name


def _appears(note: Path) -> bool:
    until = time.monotonic() + _SHOWN
    while not note.exists():
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK)
    return True


def _same(folder: Path, others: list[str | None]) -> None:
    hosts = sorted({host for host in others if host is not None})
    if hosts:
        raise UserError(
            f"--work-dir {folder}: is another folder on {', '.join(hosts)} than on {socket.gethostname()}; "
            "give a --work-dir and an --output on a disk that all hosts share"
        )


def rows(count: int) -> "torch.Tensor | slice":
    """Which of a matrix's rows are this process's; the last one is repeated where the shares would be uneven."""
    if _joined is None:
        return slice(None)
    import torch

    each = -(-count // _joined.world)
    start = _joined.rank * each
    return torch.arange(start, start + each, device=_joined.device).clamp_(max=count - 1)


def gather_rows(part: "torch.Tensor", count: int) -> "torch.Tensor":
    """All `count` rows, in order, of a tensor of which each process has its `rows`."""
    if _joined is None:
        return part
    import torch.distributed as dist

    whole = part.new_empty(_joined.world * part.shape[0], *part.shape[1:])
    with _together():
        dist.all_gather(list(whole.split(part.shape[0])), part.contiguous())
    return whole[:count]


def failed(error: DscompressError, say: Callable[[DscompressError], None]) -> int:
    """End with an error that is said once, however many processes meet it.

    Args:
        error: what this process ends with.
        say: tells the user; called in the process that fails first.

    Returns:
        The exit code. One of several processes ends here with the code of the first failure, because leaving the others
        in order would wait for them.
    """
    if _joined is None:
        say(error)
        return error.exit_code
    code = _first_failure(_joined.store, _joined.host, error, say)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _first_failure(store: "Store", host: str, error: DscompressError, say: Callable[[DscompressError], None]) -> int:
    try:
        if isinstance(error, PeerError):  # the one that is gone may tell why, or its launcher ends this one
            with suppress(RuntimeError):
                store.wait([_CODE], _GRACE)
        if store.add(_FAILURES, 1) > 1:
            code, there = store.get(_CODE).decode().split()
            if there != host:
                time.sleep(_GRACE.total_seconds())  # the launcher here tells of that host, and ends this
            return int(code)
    except RuntimeError:  # the store is gone with its process
        say(error)
        return error.exit_code
    say(error)
    with suppress(RuntimeError):
        store.set(_CODE, f"{error.exit_code} {host}")
    return error.exit_code


def _await(store: "Store", key: str) -> None:
    """Wait for rank 0, or for any process to fail."""
    while not store.check([key]):
        if store.check([_CODE]):
            raise PeerError("another process of this run failed")
        time.sleep(_LOOK)


@contextmanager
def _together() -> Iterator[None]:
    """Turn what torch says of a lost process into one line."""
    import torch

    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise _lost(error) from error


@contextmanager
def reaching() -> Iterator[None]:
    """The same for torch's own use of the processes, in sharded models and states, beside which other errors occur."""
    try:
        yield
    except RuntimeError as error:
        import torch.distributed as dist

        if _joined is None or not (isinstance(error, dist.DistError) or "gloo/transport" in str(error)):
            raise
        raise _lost(error) from error


def _lost(error: RuntimeError) -> PeerError:
    reason = str(error).splitlines()[0]
    return PeerError(
        f"another process of this run ended or can't be reached ({reason}); run the same command again to continue"
    )


def device_of(name: str, here: int, local: int) -> str:
    """The device of process `local` of those on this machine.

    Args:
        name: "auto", "cpu" or "cuda".
        here: how many processes this machine has.
        local: which of them.

    Raises:
        UserError: fewer GPUs than processes.
    """
    import torch

    count = torch.cuda.device_count()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name}: each of several processes takes a GPU of its own; use cuda, cpu or auto")
    if name == "cpu" or (name == "auto" and not count):
        return "cpu"
    if here > count:
        raise UserError(f"--nproc {here}: this machine has {count} GPUs; use that many at most, or --device cpu")
    return f"cuda:{local}"
