"""CUDA graphs of the solver's steps on ggml's blocks on one GPU: the same bits as without."""

from typing import NamedTuple

import pytest
import torch
from quant_problems import problem
from torch import Tensor

from compress.kernels.replayed import DIRECTLY, Replays, replays_on
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant import block_gptq, block_refine
from compress.quant.blocks import Blocked
from compress.quant.gptq import Factor, factorize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
Problem = tuple[Tensor, Tensor, Factor]
Solved = tuple[Blocked, Tensor, Tensor]


def gpu() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def matrix(kind: BlockType, rows: int, columns: int, seed: int) -> Problem:
    weight, hessian = (each.to(gpu()) for each in problem(rows, columns, seed, tokens=2 * columns))
    return weight, hessian, factorize(hessian.clone(), block_gptq.block_order(hessian.diagonal(), kind, True), 0.01)


def solved(kind: BlockType, given: Problem, replays: Replays) -> Solved:
    weight, hessian, factor = given
    found, before = block_gptq.block_gptq(weight, factor, kind, "hessian", replays)
    return *block_refine.refine(weight, found, hessian, 0.01, 2, replays), before


def assert_same(found: Solved, wanted: Solved) -> None:
    for name in ("codes", "d", "m", "scales", "mins"):
        ours, theirs = getattr(found[0], name), getattr(wanted[0], name)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), name
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])


def recordings(replays: Replays) -> int:
    """How many there are; none has failed."""
    assert all(each is not None for each in replays._recordings.values())
    return len(replays._recordings)


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q3_k", "q2_k", "q4_0", "q5_1", "q8_0"])
def test_replayed_matrices_are_the_same(name: str) -> None:
    """Two matrices by turns, and one of other shapes between them, whose last span may be a shorter one."""
    kind = BLOCK_TYPES[name]
    short = 1024 if kind.scale_range else 992
    problems = [matrix(kind, 1000, 1024, 0), matrix(kind, 333, short, 1), matrix(kind, 1000, 1024, 2)]
    wanted = [solved(kind, each, DIRECTLY) for each in problems]
    replays = replays_on(gpu())
    kept = [(solved(kind, problems[n], replays), wanted[n]) for n in (0, 1, 2, 0, 1, 2)]
    for found, expected in kept:  # when all have been run
        assert_same(found, expected)
    assert recordings(replays) == (4 if kind.scale_range else 6)


def test_the_memory_is_free_when_the_replays_are() -> None:
    """All but cuBLAS's memory for one stream, which is taken once."""
    kind, device, held = BLOCK_TYPES["q4_k"], gpu(), []
    given = matrix(kind, 4096, 1024, 0)
    for _ in range(3):
        before = torch.cuda.memory_allocated(device)
        replays = replays_on(device)
        solved(kind, given, replays)
        assert recordings(replays) == 2
        held.append(torch.cuda.memory_allocated(device) - before)
        del replays
    span = 256 * 4096 * 4
    assert 3 * span < held[2] < 8 * span
    assert torch.cuda.memory_allocated(device) == before


class Waits(NamedTuple):
    number: Tensor


def wait(fixed: int, changed: Waits, read: Waits) -> None:
    """Can't be recorded: the CPU asks what the GPU has computed."""
    changed.number.add_(fixed * int(read.number.sum()))


def test_a_step_that_cannot_be_recorded_runs_as_it_is() -> None:
    """Torch works as before: random numbers, and memory that another stream has used and that is used again."""
    device = gpu()
    replays = replays_on(device)
    changed, read = Waits(torch.zeros(1, device=device)), Waits(torch.ones(3, device=device))
    here = torch.cuda.current_stream(device)
    for _ in range(4):
        replays(wait, 2, changed, read)
    assert float(changed.number) == 24.0
    assert list(replays._recordings.values()) == [None]
    assert torch.cuda.current_stream(device) == here
    assert bool(torch.rand(100, device=device).isfinite().all())
    other, size = torch.cuda.Stream(device), 64 * 2**20
    before = torch.cuda.memory_allocated(device)
    for _ in range(4):
        block = torch.empty(size, dtype=torch.uint8, device=device)
        block.record_stream(other)
        del block
        torch.cuda.synchronize(device)
    torch.empty(size, dtype=torch.uint8, device=device)  # takes note of what is done
    assert torch.cuda.memory_allocated(device) <= before + size
    kind = BLOCK_TYPES["q4_k"]
    given = matrix(kind, 500, 1024, 0)
    for _ in range(2):
        assert_same(solved(kind, given, replays), solved(kind, given, DIRECTLY))
    assert sum(each is not None for each in replays._recordings.values()) == 2


def test_free_memory_is_what_the_process_may_take() -> None:
    device = gpu()
    total = torch.cuda.get_device_properties(device).total_memory
    graphs = replays_on(device)._graphs
    assert graphs is not None
    torch.cuda.set_per_process_memory_fraction(0.25, device)
    try:
        limited = graphs.free()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    assert 0 < limited <= total / 4 - torch.cuda.memory_allocated(device)
    assert limited <= graphs.free() <= total
