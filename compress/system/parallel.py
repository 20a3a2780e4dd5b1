"""Independent parts of a computation on the cores of the processor, one thread each.

torch's own threads wait for each other after every operation. Where operations are small (a scale search, a column
loop) that waiting costs more than the other cores give; a thread per part waits once.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Part = TypeVar("Part")
Result = TypeVar("Result")


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_cores(work: Callable[[Part], Result], parts: Sequence[Part]) -> list[Result]:
    """`work` of each part, in order; as many at a time as torch has threads, each on one."""
    threads = torch.get_num_threads()
    with one_thread():  # threads take over how many there are when they start
        return list(_pool(threads).map(work, parts))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "core", initializer=torch.set_num_threads, initargs=(1,))
