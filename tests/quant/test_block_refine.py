"""Coordinate descent on ggml's grids: the loss in float64, and that no single change is left that would lower it."""

import pytest
import torch
from quant_problems import problem
from torch import Tensor

from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant.block_gptq import block_gptq, block_order, block_rtn
from compress.quant.block_refine import refine
from compress.quant.blocks import Blocked, level_table
from compress.quant.gptq import factorize

each_type = pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)


def damped(hessian: Tensor) -> Tensor:
    return hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(len(hessian))


def loss_of(weight: Tensor, found: Blocked, hessian: Tensor) -> Tensor:
    missed = weight.double() - found.dequantize().double()
    return ((missed @ hessian) * missed).sum(1)


@each_type
def test_loss_falls_and_is_what_it_says(kind: BlockType) -> None:
    weight, hessian = problem(33, 512, seed=kind.number, tokens=1000)
    factor = factorize(hessian.clone(), block_order(hessian.diagonal(), kind, True), 0.01)
    solved, before = block_gptq(weight, factor, kind, "hessian")
    same, unchanged = refine(weight, solved, hessian, 0.01, rounds=0)
    assert torch.equal(same.dequantize(), solved.dequantize())
    assert torch.allclose(unchanged, before, rtol=1e-3)
    refined, after = refine(weight, solved, hessian, 0.01, rounds=2)
    assert torch.allclose(after.double(), loss_of(weight, refined, damped(hessian)), rtol=1e-3)
    assert bool((after < before).all()) and after.sum() < 0.98 * before.sum()


@each_type
def test_no_other_level_is_better_in_the_end(kind: BlockType) -> None:
    weight, hessian = problem(5, 256, seed=3, tokens=1000)
    refined, _ = refine(weight, block_rtn(weight, hessian.diagonal(), kind), hessian, 0.01, rounds=30)
    table, (step, _) = level_table(kind, weight.device).double(), refined.steps()
    pull = (weight.double() - refined.dequantize().double()) @ damped(hessian)
    step = step.double().repeat_interleave(kind.sub_width, 1)
    for way in (-1, 1):
        other = (refined.codes.long() + way).clamp(0, len(table) - 1)
        moved = (table[other] - table[refined.codes.long()]) * step
        gained = 2 * moved * pull - moved.square() * damped(hessian).diagonal()
        assert (gained > 1e-4 * loss_of(weight, refined, damped(hessian))[:, None]).double().mean() < 0.005


@each_type
def test_dead_inputs_and_zero_blocks_stay_finite(kind: BlockType) -> None:
    weight, hessian = problem(3, 512, seed=4)
    weight[:, :256] = 0
    hessian[7], hessian[:, 7] = 0.0, 0.0
    refined, loss = refine(weight, block_rtn(weight, torch.ones(512), kind), hessian, 0.01, rounds=2)
    assert refined.dequantize().isfinite().all() and loss.isfinite().all()


def test_parts_of_the_rows_are_refined_alike() -> None:
    kind = BLOCK_TYPES["q4_k"]
    weight, hessian = problem(1040, 256, seed=5)
    found = block_rtn(weight, hessian.diagonal(), kind)
    whole, _ = refine(weight, found, hessian, 0.01, rounds=1)
    assert found.m is not None and found.scales is not None and found.mins is not None
    last = Blocked(kind, *(each[-40:] for each in (found.codes, found.d, found.m, found.scales, found.mins)))
    alone, _ = refine(weight[-40:], last, hessian, 0.01, rounds=1)
    assert (whole.codes[-40:] != alone.codes).float().mean() < 0.01
