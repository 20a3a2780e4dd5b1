"""Solvers on ggml's grids, against an unblocked float64 GPTQ in its usual form, exhaustive searches and llama.cpp."""

import pytest
import torch
from llama_quantizer import library, quantized_by_llama
from quant_problems import AWKWARD, problem
from torch import Tensor

from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant.block_gptq import block_gptq, block_order, block_rtn
from compress.quant.block_scales import Multiples, Units, block_units, steps_of, sub_multiples
from compress.quant.blocks import Blocked, level_table
from compress.quant.gptq import factorize

TYPES = list(BLOCK_TYPES.values())
each_type = pytest.mark.parametrize("kind", TYPES, ids=BLOCK_TYPES)
by_llama = pytest.mark.skipif(library() is None, reason="xllamacpp is not installed")


def solved(
    kind: BlockType, act_order: bool, rows: int = 21, columns: int = 512
) -> tuple[Tensor, Tensor, Tensor, Blocked, Tensor]:
    """Weights, damped Hessian (float64), order, the matrix found and its losses."""
    weight, hessian = problem(rows, columns, seed=kind.number, tokens=1000)
    order = block_order(hessian.diagonal(), kind, act_order)
    found, loss = block_gptq(weight, factorize(hessian.clone(), order, 0.01), kind, "hessian")
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(columns)
    return weight, damped, order, found, loss


@each_type
@pytest.mark.parametrize("act_order", [True, False])
def test_every_code_is_the_nearest_to_its_moved_weight(kind: BlockType, act_order: bool) -> None:
    """GPTQ as it was published: no blocks of columns, float64, the factor of the inverse Hessian."""
    weight, hessian, order, found, _ = solved(kind, act_order)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    step, offset = found.steps()
    moved, table, ties = weight.double()[:, order].clone(), level_table(kind, weight.device).double(), 0
    for j, column in enumerate(order.tolist()):
        sub = column // kind.sub_width
        values = table * step[:, sub, None].double() + (0.0 if offset is None else offset[:, sub, None].double())
        value = values.gather(1, found.codes[:, column, None].long())[:, 0]
        missed, least = (moved[:, j] - value).abs(), (moved[:, j, None] - values).abs().amin(1)
        assert bool((missed <= 1.01 * least + 1e-6).all()), f"column {j}"
        ties += int((missed > least).sum())
        moved[:, j + 1 :] -= ((moved[:, j] - value) / factor[j, j])[:, None] * factor[j, j + 1 :]
    assert ties < 0.005 * weight.numel()


@each_type
def test_loss_is_the_damped_output_error(kind: BlockType) -> None:
    weight, hessian, _, found, loss = solved(kind, act_order=True)
    missed = weight.double() - found.dequantize().double()
    assert torch.allclose(((missed @ hessian) * missed).sum(1), loss.double(), rtol=1e-3)


@each_type
def test_parts_of_the_rows_are_solved_alike(kind: BlockType) -> None:
    weight, hessian = problem(1040, 256, seed=1)
    factor = factorize(hessian, block_order(hessian.diagonal(), kind, True), 0.01)
    whole, loss = block_gptq(weight, factor, kind, "hessian")
    last, last_loss = block_gptq(weight[-200:], factor, kind, "hessian")
    assert (whole.codes[-200:] != last.codes).float().mean() < 0.02  # sums run in another order: ties fall otherwise
    assert torch.allclose(loss[-200:].sum(), last_loss.sum(), rtol=5e-3)
    rounded, again = (block_rtn(each, hessian.diagonal(), kind) for each in (weight, weight[-200:]))
    assert (rounded.codes[-200:] != again.codes).float().mean() < 0.02


@by_llama
@each_type
def test_rounding_loses_no_more_than_llamas(kind: BlockType) -> None:
    weight, hessian = problem(64, 512, seed=2)
    importance = hessian.diagonal().contiguous()
    theirs = (weight - quantized_by_llama(weight, kind, importance).dequantize()).square() @ importance
    ours = (weight - block_rtn(weight, importance, kind).dequantize()).square() @ importance
    assert ours.sum() < 1.005 * theirs.sum()


@by_llama
@each_type
def test_feedback_loses_far_less_than_llamas(kind: BlockType) -> None:
    weight, hessian, _, found, loss = solved(kind, act_order=True, rows=64)
    theirs = weight - quantized_by_llama(weight, kind, hessian.diagonal().float().contiguous()).dequantize()
    assert loss.sum() < 0.8 * ((theirs.double() @ hessian) * theirs).sum()


@pytest.mark.parametrize("name, bound", [("q2_k", 1.05), ("q3_k", 1.04), ("q4_k", 1.08), ("q6_k", 1.15)])
def test_multiples_are_nearly_the_best_of_all(name: str, bound: float) -> None:
    """Every scale and every minimum tried, each with its nearest codes."""
    kind = BLOCK_TYPES[name]
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(kind.sub_blocks, kind.sub_width, 40, generator=made)
    cost = torch.rand(kind.sub_blocks, kind.sub_width, generator=made) + 0.1
    units = block_units(weight, cost, kind)
    moved = weight[1] + 0.1 * torch.randn(weight[1].shape, generator=made)
    found = sub_multiples(moved[None], cost[1:2], units, kind)
    assert kind.scale_range is not None
    scales = torch.arange(kind.scale_range[0], kind.scale_range[1] + 1.0)
    mins = scales if kind.has_min else torch.zeros(1)
    losses = torch.stack([loss_of(moved, cost[1], units, s, t, kind) for s in scales for t in mins])
    ours = loss_of(moved, cost[1], units, *found, kind)
    assert ours.sum() < bound * losses.amin(0).sum()


def loss_of(weight: Tensor, cost: Tensor, units: Units, scale: Tensor, minimum: Tensor, kind: BlockType) -> Tensor:
    """Weighted squared error [R] of weights [w, R] with their nearest codes."""
    step, offset = steps_of(units, Multiples(scale.expand(1, weight.shape[1]), minimum.expand(1, weight.shape[1])))
    values = level_table(kind, weight.device)[:, None, None] * step + offset
    return cost @ (weight - values).abs().amin(0).square()


@each_type
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_weights(kind: BlockType, name: str) -> None:
    weight = AWKWARD[name].repeat(3, kind.width // 32)
    importance = torch.ones(kind.width)
    found = block_rtn(weight, importance, kind)
    values = found.dequantize()
    assert values.isfinite().all()
    factor = factorize(torch.eye(kind.width), torch.arange(kind.width), 0.01)
    assert torch.equal(block_gptq(weight, factor, kind, "hessian")[0].dequantize().isfinite(), values.isfinite())
    if name in ("zeros", "subnormal", "tiny"):
        assert values.abs().max() < 1e-6
    elif name != "huge outlier":  # whose other weights are less than a step
        assert (values - weight).abs().max() < (0.02 if "constant" in name else 0.11) * weight.abs().max(), values
    else:
        assert values[0, 31] == pytest.approx(1e4, rel=0.01)


@each_type
def test_blocks_without_importance_are_rounded_as_usual(kind: BlockType) -> None:
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.ones(512)
    importance[:256] = 0.0
    found, usual = (block_rtn(weight, each, kind).dequantize() for each in (importance, torch.ones(512)))
    assert torch.equal(found, usual)


@each_type
def test_order_keeps_blocks_and_sub_blocks_together(kind: BlockType) -> None:
    importance = torch.rand(1024, generator=torch.Generator().manual_seed(0))
    order = block_order(importance, kind, True)
    assert torch.equal(order.sort().values, torch.arange(1024))
    sorted_ = importance[order]
    for width in {kind.width, kind.sub_width}:
        parts = order.view(-1, width) // width
        assert torch.equal(parts, parts[:, :1].expand_as(parts))
    firsts = sorted_.view(-1, kind.sub_width)[:, 0]
    assert bool((sorted_.view(-1, kind.sub_width).diff(dim=1) <= 0).all())
    assert bool((firsts.view(-1, kind.sub_blocks).diff(dim=1) <= 0).all())
    assert bool((firsts.view(-1, kind.sub_blocks)[:, 0].diff() <= 0).all())
    assert torch.equal(block_order(importance, kind, False), torch.arange(1024))
