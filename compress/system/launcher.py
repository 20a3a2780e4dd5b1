"""Starts the processes of a run: several on this machine, or on each of several hosts.

torch's launcher starts those of one host and ends them all when one ends badly. Hosts meet at HOST:PORT, where the one
that HOST names keeps a store: through it they count each other, find the other processes, and learn that a host ended.
That host has process 0, which tells of the run. Who reaches the port can take part: it is for a network of one's own.

Left out: restarts, and hosts that come and go. A run that ended continues when it is started again.
"""

import json
import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from compress.errors import DscompressError, UserError
from compress.system import distributed

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Say = Callable[[str], None]

_ARRIVAL = 600.0  # seconds in which all hosts have to come
_FINDING = 60.0  # seconds in which hosts that are there find each other's processes
_ANSWER = 10.0  # seconds in which a store answers
_GRACE = 5.0  # seconds in which the others take note that the host that keeps the store ends
_LOOK = 0.2  # seconds between two looks
_NAME = "dscompress"
_SIZE, _HOSTS, _ENDED, _LEFT = "size", "hosts", "ended", "left"


def launch(
    processes: int, device: str, arguments: Sequence[str], say: Say, hosts: int = 1, meeting: str | None = None
) -> int:
    """Run the command in several processes, and wait for them.

    Args:
        processes: how many on this machine.
        device: "auto", "cpu" or "cuda".
        arguments: of the command, without its name.
        say: told what the user should know.
        hosts: on how many machines the same command is started.
        meeting: HOST:PORT where they meet, the same on all; HOST is one of them.

    Returns:
        The exit code: of the process that failed first, else 0.

    Raises:
        UserError: fewer GPUs than processes; hosts that don't meet.
        DscompressError: a process was killed, or another host ended.
    """
    if distributed.launched():
        options = "--nproc" if hosts == 1 and not meeting else "--nproc, --nnodes and --rdzv"
        raise UserError(f"--nproc {processes}: a launcher has started this process already; remove {options}")
    if hosts > 1 and not meeting:
        raise UserError(f"--nnodes {hosts}: add where they meet: --rdzv HOST:PORT, one of them and a free port there")
    if meeting and hosts == 1:
        raise UserError(f"--rdzv {meeting}: is where several hosts meet; say how many with --nnodes")
    with _hushed():
        distributed.device_of(device, processes, 0)
    if not meeting:
        place = {"run_id": uuid.uuid4().hex, "rdzv_endpoint": "localhost:0", "local_addr": "localhost"}
        return _start(processes, arguments, place, f"of {processes}")
    met = _Meeting(meeting, hosts)
    return met.run(lambda: _start(processes, arguments, met.place(), f"on {socket.gethostname()}", hosts), say)


@contextmanager
def _hushed() -> Iterator[None]:
    """Torch imported inside does not say in this process that a port answers otherwise, or no more."""
    name = "TORCH_CPP_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "FATAL"
    try:
        yield
    finally:
        del os.environ[name]


def _start(processes: int, arguments: Sequence[str], place: Mapping[str, Any], where: str, hosts: int = 1) -> int:
    """The exit code of this machine's processes."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for logger in ("torch.distributed", "torch.distributed.elastic.agent.server.api"):  # which has a level of its own
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    command = ["-m", "compress.cli", *arguments, "--nproc", "1", "--nnodes", "1", "--rdzv", ""]
    try:
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=hosts, max_nodes=hosts, nproc_per_node=processes, max_restarts=0, rdzv_backend="c10d",
                logs_specs=DefaultLogsSpecs(log_dir=logs), **place,
            )  # fmt: skip
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        raise DscompressError(
            f"process {rank} {where} was killed ({name}); run the same command again to continue"
        ) from None
    except RendezvousError as error:
        raise DscompressError(
            f"the processes lost each other ({type(error).__name__}); run the same command again to continue"
        ) from error
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + int(stopped.sigval)
    return 0


class _Meeting:
    """Several hosts that run the same command.

    Args:
        name: HOST:PORT, where they meet.
        hosts: how many.

    Raises:
        UserError: no such place.
    """

    store: "Store"

    def __init__(self, name: str, hosts: int) -> None:
        self.name, self.hosts = name, hosts
        self.host, self.port = _parsed(name)
        self.here, self.id = _is_here(name, self.host), uuid.uuid4().hex
        self.keeps = False  # whether the store is this process's

    def place(self) -> dict[str, Any]:
        """Where torch's launchers meet: in the same store, and process 0 is on the host that keeps it.

        torch numbers hosts by their names, in order, and tells all the first one's alone.
        """
        return {
            "run_id": _NAME,
            "rdzv_endpoint": self.name,
            "rdzv_configs": {"is_host": self.keeps, "join_timeout": int(_FINDING)},
            "local_addr": self.host if self.keeps else f"~{socket.gethostname()}",
        }

    def run(self, start: Callable[[], int], say: Say) -> int:
        """The exit code of what is started when all hosts are there; if one ends badly, the others end too.

        Raises:
            UserError: the others don't come, or what is at the port is something else.
            DscompressError: another host ended.
        """
        with self._reached():
            self._open()
            self._arrive(say)
        error: DscompressError | KeyboardInterrupt | None = None
        me = socket.gethostname()
        with self._watched():
            try:
                code = start()
                words = f"host {me} ended the run (exit code {code}); see there"
            except DscompressError as caught:
                error, code, words = caught, caught.exit_code, str(caught)
            except KeyboardInterrupt as caught:
                error, code = caught, 130
                words = f"host {me} was interrupted; run the same command on all hosts again to continue"
        other = self._leave(code, words)
        if code and other is not None:
            raise other
        if error is not None:
            raise error
        return code

    def _open(self) -> None:
        """Keep the store, or find the one that another host keeps."""
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        if self.here:
            try:
                kept = TCPStore(self.host, self.port, is_master=True, multi_tenant=True, wait_for_workers=False)
            except RuntimeError as error:
                if "EADDRINUSE" not in str(error):
                    reason = str(error).rpartition("message: ")[2].splitlines()[0]
                    raise UserError(f"--rdzv {self.name}: can't be opened ({reason}); choose another port") from error
            else:
                self.keeps, self.store = True, PrefixStore(_NAME, kept)
                self.store.set(_SIZE, str(self.hosts))
                return
        self._look_for_one()
        found = self._answering()
        if found is None:
            raise self._taken()
        self.store = PrefixStore(_NAME, found)
        until = time.monotonic() + _ANSWER
        while not self.store.check([_SIZE]):
            if time.monotonic() > until:
                raise self._taken()
            time.sleep(_LOOK)
        size = int(self.store.get(_SIZE))
        if size != self.hosts:
            raise UserError(f"--nnodes {self.hosts}: at {self.name} {size} hosts meet; give all the same number")

    def _look_for_one(self) -> None:
        """Wait until something listens at the port."""
        until = time.monotonic() + _ARRIVAL
        while True:
            try:
                socket.create_connection((self.host, self.port), _ANSWER).close()
                return
            except OSError as error:
                if self.here:
                    raise self._taken() from error
                if time.monotonic() > until:
                    raise UserError(
                        f"--rdzv {self.name}: nobody was there within {_ARRIVAL / 60:.0f} minutes ({error.strerror}); "
                        f"start the same command on {self.host}, and let others through to that port"
                    ) from error
            time.sleep(_LOOK)

    def _answering(self) -> "Store | None":
        """The store at the port; None where something else is."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        found: list[Store] = []

        def connect() -> None:
            with suppress(RuntimeError):
                found.append(TCPStore(self.host, self.port, is_master=False, timeout=timedelta(seconds=_ANSWER)))

        thread = threading.Thread(target=connect, daemon=True)  # which waits forever for what says nothing
        thread.start()
        thread.join(_ANSWER)
        return found[0] if found else None

    def _taken(self) -> UserError:
        return UserError(
            f"--rdzv {self.name}: the port is in use by something else than a run of {_NAME}; choose a free one, "
            "the same on all hosts"
        )

    def _arrive(self, say: Say) -> None:
        """Wait until all are there."""
        until, told = time.monotonic() + _ARRIVAL, False
        there = self.store.add(_HOSTS, 1)
        try:
            if there > self.hosts:
                raise UserError(
                    f"--rdzv {self.name}: {self.hosts} hosts are there already, as --nnodes says; wait for that run, "
                    "or choose another port"
                )
            while there < self.hosts:
                if not told:
                    say(f"{self.name}: {there} of {self.hosts} hosts; start the same command on the others")
                told = True
                if time.monotonic() > until:
                    raise UserError(
                        f"--nnodes {self.hosts}: {there} of {self.hosts} hosts came to {self.name} within "
                        f"{_ARRIVAL / 60:.0f} minutes; start the same command on all of them within that time"
                    )
                time.sleep(_LOOK)
                there = self.store.add(_HOSTS, 0)
        except BaseException:
            with suppress(RuntimeError):
                self.store.add(_HOSTS, -1)
            raise
        if not self.keeps:
            say(f"working for {self.host}, which tells of the run")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn what torch says of a lost store into one line."""
        try:
            yield
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> DscompressError:
        return DscompressError(
            f"host {self.host} has ended or can't be reached; run the same command on all hosts again to continue"
        )

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Inside, this host's launcher is told to end when another host has ended badly."""
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        finally:
            over.set()
            watch.join(_ANSWER)

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(_LOOK):
            try:
                if not self.store.check([_ENDED]):
                    continue
                well = json.loads(self.store.get(_ENDED))[0] == 0
            except RuntimeError:
                well = False
            if well:
                return
            if callable(signal.getsignal(signal.SIGTERM)):  # torch's launcher listens, from when it has started all
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _leave(self, code: int, words: str) -> DscompressError | None:
        """Say how this host ended; returns how another one did, if that was before and badly."""
        try:
            first = self.store.compare_set(_ENDED, "", json.dumps([code, words, self.id]))
            left, until = self.store.add(_LEFT, 1), time.monotonic() + _GRACE
            while self.keeps and left < self.hosts and time.monotonic() < until:
                time.sleep(_LOOK)
                left = self.store.add(_LEFT, 0)
        except RuntimeError:
            return self._lost()
        code, words, who = json.loads(first)
        if who == self.id or not code:
            return None
        other = DscompressError(words)
        other.exit_code = code
        return other


def _parsed(name: str) -> tuple[str, int]:
    """Host and port."""
    host, _, port = name.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise UserError(f"--rdzv {name}: is no HOST:PORT; write it like node1:29500")
    return host, int(port)


def _is_here(name: str, host: str) -> bool:
    """Whether a host is this machine: an address of it can be bound to.

    Raises:
        UserError: there is no such host.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--rdzv {name}: no host {host} is known here ({reason}); give its address") from error
    for family, kind, protocol, _, address in found:
        with suppress(OSError), socket.socket(family, kind, protocol) as tried:
            tried.bind(address)
            return True
    return False
