"""The Triton kernels beside their plain-torch twins, on a CPU in Triton's interpreter.

test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1: the variable is read when triton is
imported and holds for the process. The interpreter rounds a fused multiply-add twice, so a tie may fall the other way;
with the seeds below that happens only where a test says so.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_problems import AWKWARD, BITS, SCALE_DTYPES, group_loss, problem
from torch import Tensor

from compress.kernels.columns import quantize_columns
from compress.quant import gptq as solvers
from compress.quant import scales
from compress.quant.gptq import factorize, gptq, importance, visiting_order
from compress.quant.grid import Grid
from compress.quant.scales import group_scales

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_interpreted.py"


@contextmanager
def kernels() -> Iterator[None]:
    """Kernels for every tensor, in new memory that is NaN, or 255, so that nothing depends on what was there."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

    with (
        patch.object(solvers, "usable", lambda tensor: True),
        patch.object(scales, "usable", lambda tensor: True),
        patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))),
        patch.object(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))),
    ):
        yield


# Rows, some beside a block of 32, each with the scales of a format and a clip.
MATRICES = {
    "33 rows": (33, torch.bfloat16, 0, "none"),
    "1 row": (1, torch.float16, 1, "mse"),
    "3 rows": (3, torch.float32, 0, "hessian"),
}


@pytest.mark.parametrize(
    ("symmetric", "bits", "matrix"),
    [
        (True, 2, "3 rows"), (True, 3, "1 row"), (True, 4, "33 rows"), (True, 8, "1 row"),
        (False, 2, "33 rows"), (False, 3, "3 rows"), (False, 4, "1 row"), (False, 8, "3 rows"),
    ],
)  # fmt: skip
def test_gptq_finds_the_twins_codes(symmetric: bool, bits: int, matrix: str) -> None:
    """Small groups, the last one outside the span."""
    rows, scale_dtype, lowest, clip = MATRICES[matrix]
    weight, hessian = problem(rows, 96, bits)
    grid = Grid(bits, 32, symmetric, scale_dtype, lowest)
    factor = factorize(hessian, visiting_order(hessian.diagonal(), 32, True), 0.01)
    wanted, wanted_loss = gptq(weight, factor, grid, clip)
    with kernels(), patch("compress.kernels.solver._SPAN", 64):
        found, loss = gptq(weight, factor, grid, clip)
    assert torch.equal(found.codes, wanted.codes) and torch.equal(found.zero, wanted.zero)
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-6 if scale_dtype == torch.float32 else 0, atol=0)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("group_size", "columns", "symmetric"), [(64, 128, False), (128, 256, True), (-1, 150, True), (-1, 150, False)]
)
def test_gptq_in_wide_groups_and_whole_rows(group_size: int, columns: int, symmetric: bool) -> None:
    """Whole rows come in blocks of 128 columns, the last one shorter and no multiple of a run."""
    weight, hessian = problem(5, columns, 1)
    grid = Grid(4, group_size, symmetric)
    order = visiting_order(hessian.diagonal(), grid.columns_per_group(columns), True)
    factor = factorize(hessian, order, 0.01)
    wanted, wanted_loss = gptq(weight, factor, grid, "hessian")
    with kernels():
        found, loss = gptq(weight, factor, grid, "hessian")
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(("bits", "width"), [(2, 48), (3, 7), (4, 7), (8, 48)])
def test_columns_where_nothing_is_rounded(bits: int, width: int) -> None:
    """Weights, scales and feedback are small whole numbers or halves: any order of the additions gives the same."""
    generator = torch.Generator().manual_seed(bits + width)
    work = torch.randint(-64, 64, (width, 35), generator=generator) / 16
    fed = torch.randint(-8, 8, (width, 35), generator=generator) / 16
    feedback = torch.randint(-1, 2, (width, width), generator=generator).float()
    feedback *= torch.rand(width, width, generator=generator) < 0.1
    feedback = feedback.triu(1) + torch.eye(width)
    pivot = torch.randint(1, 9, (width,), generator=generator).float()
    scale = torch.tensor([0.5, -0.25, 1.0, -1.0, 0.125] * 7)
    zero = torch.randint(0, 2**bits, (35,), generator=generator).float()
    grid = Grid(bits, width, False)
    target, levels, error = work + fed, torch.empty_like(work), torch.empty_like(work)
    solvers._quantize_group(work, target, feedback, scale, zero, grid, levels, error)
    assert bool((error.abs() < 1e4).all())  # far from where float32 would round
    missed, codes, loss = work.clone(), torch.full_like(work, 255, dtype=torch.uint8), torch.ones(35)
    quantize_columns(missed, fed, feedback, pivot, scale, zero, grid.largest_code, codes, loss)
    assert torch.equal(codes, (levels + zero).to(torch.uint8))
    assert torch.equal(missed, error)
    torch.testing.assert_close(loss, 1 + pivot @ (target - levels * scale).square(), rtol=1e-5, atol=0.0)


def assert_scales_as_good(weight: Tensor, cost: Tensor | None, grid: Grid) -> None:
    """The twin's scale and zero point, or ones that lose no more, but for what storing a scale may cost.

    The search compares losses as they are before the scale is stored; between equals the last bit of a sum decides.
    """
    wanted = group_scales(weight, cost, grid)
    with kernels():
        found = group_scales(weight, cost, grid)
    assert torch.equal(found[0], found[0].to(grid.scale_dtype).float()) and bool((found[0] != 0).all())
    other = (found[0] != wanted[0]) | (found[1] != wanted[1])
    if cost is None:
        assert not bool(other.any())
    else:
        ours, theirs = (group_loss(weight, *each, cost, grid) for each in (found, wanted))
        floor = (torch.finfo(grid.scale_dtype).eps ** 2 / 4 + 1e-12) * (weight.double().square() @ cost.double())
        assert bool((ours <= theirs * (1 + 1e-4) + floor)[other].all())


def test_search_of_awkward_groups() -> None:
    """All in one launch, a row each."""
    groups = torch.cat([group for name, group in AWKWARD.items() if name != "subnormal"])
    for bits, symmetric, cost in itertools.product((2, 8), (True, False), (None, torch.linspace(0.1, 2.0, 32))):
        assert_scales_as_good(groups, cost, Grid(bits, 32, symmetric))


@given(
    values=st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=9),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    lowest=st.sampled_from([0, 1]),
    searched=st.booleans(),
)
@settings(deadline=None, max_examples=40, derandomize=True)
def test_search_of_any_group(
    values: list[float], bits: int, symmetric: bool, scale_dtype: torch.dtype, lowest: int, searched: bool
) -> None:
    cost = importance(torch.linspace(0.5, 2.0, len(values)), "hessian" if searched else "none")
    assert_scales_as_good(torch.tensor([values]), cost, Grid(bits, -1, symmetric, scale_dtype, lowest))
