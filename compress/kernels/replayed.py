"""Steps of many small kernels, recorded as CUDA graphs and replayed.

A step of a solver is about a hundred kernels of a few microseconds each, and a CPU needs several times as long to
launch them one by one. A CUDA graph launches all of them at once, at the addresses at which it was recorded. So what a
step reads and changes is copied into buffers, and what it has changed is copied back.

What is recorded is a step on some columns, not a whole matrix: the buffers are small, no Hessian is copied, and a step
comes again inside its own matrix, in each round, and in every other matrix of as many rows.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import Final, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

_SHARE = 8  # buffers take no more than one part in so many of what is free: what a step makes takes as much again
_ALIGNED = 256  # bytes: each buffer begins at a multiple, as torch's own memory does

Fixed = TypeVar("Fixed", bound=Hashable)
Changed = TypeVar("Changed", bound=tuple[Tensor, ...])
Read = TypeVar("Read", bound=tuple[Tensor, ...])


class Graphs(Protocol):
    """What records on a device."""

    def warm_up(self, work: Callable[[], None]) -> None:
        """Do the work, and with it all that is done but once: kernels are compiled, libraries take their memory."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What does the work again on the same tensors; it is not done now.

        Raises:
            RuntimeError: it can't be recorded.
        """

    def free(self) -> int:
        """Bytes of the device's memory that can still be allocated."""


class _Recording(NamedTuple):
    replay: Callable[[], None]
    buffers: Sequence[Tensor]


class Replays:
    """Runs steps: each kind of step as it is the first time, recorded the second time, and replayed from then on.

    Steps are of one kind where the function, what is fixed and all shapes and dtypes are the same. One that can't be
    recorded, or for which memory is short, is run as it is each time. All share their buffers and what they make on the
    way, so that they are run by one thread, in one stream. The memory is free when this object is.

    Args:
        graphs: what records; None runs every step as it is.
    """

    def __init__(self, graphs: Graphs | None = None) -> None:
        self._graphs = graphs
        self._met: set[Hashable] = set()
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._memory: Tensor | None = None

    def __call__(
        self, step: Callable[[Fixed, Changed, Read], None], fixed: Fixed, changed: Changed, read: Read
    ) -> None:
        """Run a step, a function that returns nothing and waits for nothing of what the device computes.

        Args:
            step: a function of a module, so that it is the same one each time.
            fixed: its first argument.
            changed: its second, a named tuple of contiguous tensors that it changes.
            read: its third, likewise of tensors that it reads; what is in them afterwards is of no use.
        """
        tensors = (*changed, *read)
        assert all(tensor.is_contiguous() for tensor in tensors)
        if self._graphs is None:
            return step(fixed, changed, read)
        kind = (step, fixed, *((tensor.shape, tensor.dtype) for tensor in tensors))
        if kind not in self._met:
            self._met.add(kind)
            return self._graphs.warm_up(partial(step, fixed, changed, read))
        if kind not in self._recordings:
            self._recordings[kind] = self._record(self._graphs, step, fixed, changed, read)
        recording = self._recordings[kind]
        if recording is None:
            return step(fixed, changed, read)
        for buffer, tensor in zip(recording.buffers, tensors, strict=True):
            buffer.copy_(tensor)
        recording.replay()
        for buffer, tensor in zip(recording.buffers, changed, strict=False):  # which come first
            tensor.copy_(buffer)
        return None

    def _record(
        self,
        graphs: Graphs,
        step: Callable[[Fixed, Changed, Read], None],
        fixed: Fixed,
        changed: Changed,
        read: Read,
    ) -> _Recording | None:
        tensors = (*changed, *read)
        if _SHARE * sum(map(_bytes, tensors)) > graphs.free():
            return None
        try:
            buffers = self._buffers(tensors)
            first, last = buffers[: len(changed)], buffers[len(changed) :]
            work = partial(step, fixed, type(changed)(*first), type(read)(*last))
            return _Recording(graphs.record(work), buffers)
        except RuntimeError:
            return None

    def _buffers(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors like these, one behind the other in the memory that all steps share, or in more where that ends."""
        sizes = [_bytes(tensor) for tensor in tensors]
        if self._memory is None or len(self._memory) < sum(sizes):
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        parts = self._memory[: sum(sizes)].split(sizes)
        return [
            part[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for part, tensor in zip(parts, tensors, strict=True)
        ]


DIRECTLY: Final = Replays()  # every step as it is


def replays_on(device: torch.device) -> Replays:
    """With CUDA graphs, where the device is a GPU."""
    return Replays(_CudaGraphs(device) if device.type == "cuda" else None)


class _CudaGraphs:
    """CUDA graphs that share their memory; none may run beside another."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Where recordings are made later: cuBLAS has a workspace for each stream."""
        here = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As a graph."""
        try:
            return self._record(work)
        except RuntimeError:
            self._recover()
            raise

    def _record(self, work: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        here = torch.cuda.stream(torch.cuda.current_stream(self._device))  # also where `graph` fails to go back to it
        with here, torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def _recover(self) -> None:
        """Torch gives out memory and random numbers as it did before a recording that failed and so never ended."""
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        with suppress(RuntimeError):  # it had ended
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):  # random numbers wait for the end of one, and any will do
            self._record(partial(torch.zeros, 1, device=self._device))
        self._pool = torch.cuda.graph_pool_handle()  # the one before ends with that graph

    def free(self) -> int:
        """Of the GPU's memory, within the share of it that the process may take."""
        free, total = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self._device)) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(self._device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Where recordings are made, while other threads go on with their copies.

    Torch deals out few streams, each of them several times. This one is of those with priority, which nobody else asks
    for, so that no copy gets into a recording. It is always the same, because cuBLAS keeps memory for each stream.
    """
    return torch.cuda.Stream(device, priority=-1)


def _bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
