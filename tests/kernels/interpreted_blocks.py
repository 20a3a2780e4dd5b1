"""The kernels for ggml's blocks beside their plain-torch twins, on a CPU in Triton's interpreter.

test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1: the variable is read when triton
is imported and holds for the process. The interpreter takes a while for each operation, so blocks of the k-types have
two sub-blocks here, and spans are as wide; `test_search` has them whole. Ties may fall the other way, because the
interpreter rounds a fused multiply-add twice and sums run in another order: what is allowed of that, a test says.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from quant_problems import problem
from torch import Tensor

from compress.kernels import block_refine as refine_kernels
from compress.kernels import block_scales as scale_kernels
from compress.kernels import block_solver
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant import block_gptq, block_refine, block_scales
from compress.quant.block_scales import Multiples, Units, nearest_levels, steps_of
from compress.quant.blocks import Blocked
from compress.quant.gptq import Factor, factorize

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_interpreted.py"

KINDS = {name: kind for name, kind in BLOCK_TYPES.items() if kind.uniform}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
HUGE = 2  # the row of `matrix` that has one


@contextmanager
def kernels() -> Iterator[None]:
    """Kernels for every tensor, in new memory that is NaN, or 255, so that nothing depends on what was there."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

    with ExitStack() as patches:
        for module in (block_gptq, block_refine, block_scales):
            patches.enter_context(patch.object(module, "usable", lambda _: True))
        patches.enter_context(patch.object(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k))))
        patches.enter_context(patch.object(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k))))
        yield


@contextmanager
def narrow_spans(kind: BlockType) -> Iterator[None]:
    with ExitStack() as patches:
        for module in (block_gptq, block_refine, block_solver):
            patches.enter_context(patch.object(module, "_SPAN", 2 * kind.sub_width))
        yield


def narrow(kind: BlockType) -> BlockType:
    return kind if kind.scale_range is None else replace(kind, width=2 * kind.sub_width)


def matrix(kind: BlockType, rows: int = 7) -> tuple[Tensor, Tensor, Factor]:
    """Weights [rows, 64 to 128], the last span a shorter one if it can be; one is huge, a row is zeros; a Hessian with
    a dead input."""
    weight, hessian = problem(rows, 2 * kind.width if kind.scale_range else 96, seed=kind.number)
    weight[HUGE, 40], weight[4] = 5.0, 0.0
    hessian[50], hessian[:, 50] = 0.0, 0.0
    return weight, hessian, factorize(hessian.clone(), block_gptq.block_order(hessian.diagonal(), kind, True), 0.01)


def rows_that_differ(found: Blocked, wanted: Blocked) -> Tensor:
    """bool [O]."""
    differ = torch.zeros(len(wanted.codes), dtype=torch.bool)
    for name in ("codes", "d", "m", "scales", "mins"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.is_contiguous()
            differ |= (ours != theirs).any(1)
    return differ


@pytest.mark.parametrize("name", ["q5_0", "q4_1", "q2_k", "q4_k", "q6_k"])
def test_walk_finds_the_twins_codes(name: str) -> None:
    """A kind of each form, the others differ in numbers that the tests below see.

    One row may have a tie that fell the other way; a row with one huge weight has little but ties.
    """
    kind = narrow(KINDS[name])
    weight, _, factor = matrix(kind)
    with narrow_spans(kind):
        wanted, wanted_loss = block_gptq.block_gptq(weight, factor, kind, "hessian")
        with kernels():
            found, loss = block_gptq.block_gptq(weight, factor, kind, "hessian")
    differ = rows_that_differ(found, wanted)
    usual = torch.arange(len(weight)) != HUGE
    assert int((differ & usual).sum()) <= 1
    torch.testing.assert_close(loss[~differ], wanted_loss[~differ], rtol=1e-4, atol=0.0)
    torch.testing.assert_close(loss[usual], wanted_loss[usual], rtol=0.1, atol=0.0)
    assert bool(loss.isfinite().all()) and bool(found.dequantize().isfinite().all())


@each_kind
def test_refinement_finds_the_twins_codes(kind: BlockType) -> None:
    """Bit for bit, of the row with a huge weight too; with q4_k in two programs, one of them with a single row."""
    kind = narrow(kind)
    weight, hessian, factor = matrix(kind, rows=9 if kind.name == "q4_k" else 7)
    with narrow_spans(kind), patch.object(refine_kernels, "_ROWS", 8):
        start = block_gptq.block_gptq(weight, factor, kind, "hessian")[0]
        wanted, wanted_loss = block_refine.refine(weight, start, hessian, 0.01, 1)
        with kernels():
            found, loss = block_refine.refine(weight, start, hessian, 0.01, 1)
    assert int(rows_that_differ(wanted, start).sum()) == len(weight) - 1  # not the zeros
    assert not bool(rows_that_differ(found, wanted).any())
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=0.0)


def sub_blocks(kind: BlockType, rows: int = 40) -> tuple[Tensor, Tensor]:
    """Weights of a block [s, w, rows] and the importance of its columns; two rows are constant, in one sub-block all
    columns are unimportant."""
    generator = torch.Generator().manual_seed(kind.number)
    weight = torch.randn(kind.sub_blocks, kind.sub_width, rows, generator=generator) * 0.05
    weight[..., 1], weight[..., 2], weight[0, 3, 4] = 0.0, -0.3, 50.0
    importance = torch.rand(kind.sub_blocks, kind.sub_width, generator=generator) + 0.1
    importance[-1] = 0.0
    return weight, importance


def rounding_loss(weight: Tensor, importance: Tensor, units: Units, multiples: Multiples, kind: BlockType) -> Tensor:
    """Weighted squared error of each row, float64 [R]."""
    steps = steps_of(units, multiples)
    values = nearest_levels(weight, steps, kind) * steps.step[:, None] + steps.offset[:, None]
    return ((weight - values).double().square() * importance[..., None]).sum((0, 1))


@each_kind
def test_search(kind: BlockType) -> None:
    """Units and multiples are the twin's, but for one row in 20 at most, whose losses are within 20 %.

    Units that tie in the search need not lose the same with the multiples that are chosen for them then.
    """
    weight, importance = sub_blocks(kind)
    some = weight[-2:].contiguous()
    wanted = block_scales.block_units(weight, importance, kind)
    multiples = block_scales.sub_multiples(some, importance[-2:], wanted, kind)
    with kernels(), patch.object(scale_kernels, "_ROWS", 64):
        found = block_scales.block_units(weight, importance, kind)
        again = block_scales.sub_multiples(some, importance[-2:], wanted, kind)
    for ours, theirs, units, part in ((found, wanted, None, weight), (again, multiples, wanted, some)):
        differ = torch.stack([a != b for a, b in zip(ours, theirs, strict=True)]).reshape(-1, weight.shape[2]).any(0)
        assert int(differ.sum()) <= weight.shape[2] // 20
        losses = []
        for each in (ours, theirs):
            own = Units(*each) if units is None else units
            times = block_scales.sub_multiples(part, importance[-len(part) :], own, kind) if units is None else each
            losses.append(rounding_loss(part, importance[-len(part) :], own, Multiples(*times), kind))
        torch.testing.assert_close(losses[0][~differ], losses[1][~differ], rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(losses[0], losses[1], rtol=0.2, atol=1e-12)


def test_programs_of_rows_and_sub_blocks_keep_to_their_own() -> None:
    """Rows and sub-blocks searched together are what they are alone."""
    kind = BLOCK_TYPES["q3_k"]
    weight, importance = sub_blocks(kind, rows=9)
    units = block_scales.block_units(weight, importance, kind)
    with kernels(), patch.object(scale_kernels, "_ROWS", 8):
        together = block_scales.sub_multiples(weight[:3], importance[:3], units, kind)
        for sub, row in ((0, 8), (2, 0)):
            part = weight[sub : sub + 1, :, row : row + 1].contiguous()
            alone = block_scales.sub_multiples(
                part, importance[sub : sub + 1], Units(units.d[row : row + 1], units.m[row : row + 1]), kind
            )
            assert torch.equal(alone.scale[0, 0], together.scale[sub, row])
            assert torch.equal(alone.minimum[0, 0], together.minimum[sub, row])
