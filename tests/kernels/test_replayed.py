"""Steps that are replayed, with a recorder that stands in for CUDA graphs: what it records is called again.

The solvers' steps, replayed: interpreted_replays.py in Triton's interpreter, test_replayed_gpu.py on a GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from recorder import Recorder
from torch import Tensor

from compress.kernels.replayed import DIRECTLY, Replays, replays_on


class Sums(NamedTuple):
    total: Tensor
    count: Tensor


class Given(NamedTuple):
    values: Tensor
    weights: Tensor


def add(power: int, sums: Sums, given: Given) -> None:
    """Writes over what it reads, as steps may."""
    sums.total.add_(given.values.pow_(power) @ given.weights)
    sums.count.add_(1)


def subtract(power: int, sums: Sums, given: Given) -> None:
    sums.total.sub_(given.values.pow_(power) @ given.weights)


def problem(rows: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Sums, Given]:
    generator = torch.Generator().manual_seed(seed)
    total, values, weights = (torch.randn(n, generator=generator).to(dtype) for n in (rows, rows * 5, 5))
    return Sums(total, torch.zeros(1, dtype=torch.int64)), Given(values.view(rows, 5), weights)


def wanted(step: Callable[[int, Sums, Given], None], power: int, sums: Sums, given: Given) -> Sums:
    sums = Sums(*(each.clone() for each in sums))
    step(power, sums, Given(*(each.clone() for each in given)))
    return sums


def same(found: Sums, expected: Sums) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_replays_see_what_changes_and_leave_what_they_returned() -> None:
    recorder = Recorder()
    replays, found, expected = Replays(recorder), [], []
    for seed in range(5):
        sums, given = problem(7, seed)
        expected.append(wanted(add, 2, sums, given))
        replays(add, 2, sums, given)
        found.append(sums)
    assert all(map(same, found, expected))
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (1, 1, 4)


def test_each_kind_of_step_has_its_own_recording() -> None:
    """Shapes, dtypes, functions and what is fixed, by turns: in memory that all share, and that has to grow."""
    kinds = [
        (add, 2, 7, torch.float32), (add, 2, 700, torch.float32), (add, 2, 7, torch.float64),
        (subtract, 2, 7, torch.float32), (add, 3, 7, torch.float32),
    ]  # fmt: skip
    recorder = Recorder()
    replays = Replays(recorder)
    for seed in range(4):
        for step, power, rows, dtype in kinds:
            sums, given = problem(rows, seed, dtype)
            expected = wanted(step, power, sums, given)
            replays(step, power, sums, given)
            assert same(sums, expected)
    assert (recorder.warmed, recorder.recorded, recorder.replayed) == (len(kinds), len(kinds), 3 * len(kinds))


def test_a_part_of_a_tensor_is_changed_alone() -> None:
    whole = torch.zeros(9)
    replays = Replays(Recorder())
    for number in range(3):
        sums, given = problem(3, number)
        part = Sums(whole[3 * number : 3 * number + 3], sums.count)
        replays(add, 1, part, Given(torch.ones(3, 5), torch.full((5,), float(number + 1))))
    assert whole.tolist() == [5.0] * 3 + [10.0] * 3 + [15.0] * 3


@pytest.mark.parametrize("recorder", [Recorder(fails=1), Recorder(free=8 * 1024)], ids=["fails", "no room"])
def test_what_cannot_be_recorded_is_run_as_it_is(recorder: Recorder) -> None:
    """And is not tried again; a smaller step of another kind is recorded."""
    replays = Replays(recorder)
    for seed in range(4):
        sums, given = problem(100, seed)
        expected = wanted(add, 2, sums, given)
        replays(add, 2, sums, given)
        assert same(sums, expected)
    assert (recorder.recorded, recorder.replayed) == (recorder.fails, 0)
    for seed in range(4):
        sums, given = problem(3, seed)
        expected = wanted(add, 2, sums, given)
        replays(add, 2, sums, given)
        assert same(sums, expected)
    assert (recorder.recorded, recorder.replayed) == (recorder.fails + 1, 3)


@pytest.mark.parametrize("replays", [DIRECTLY, replays_on(torch.device("cpu"))], ids=["directly", "on a CPU"])
def test_without_a_gpu_nothing_is_recorded(replays: Replays) -> None:
    for seed in range(3):
        sums, given = problem(7, seed)
        expected = wanted(add, 2, sums, given)
        replays(add, 2, sums, given)
        assert same(sums, expected)
    assert not replays._met and replays._memory is None
