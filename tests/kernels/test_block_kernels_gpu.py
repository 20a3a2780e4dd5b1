"""The kernels for ggml's blocks beside their plain-torch twins on one GPU.

In Triton's interpreter, with 1024 rows of 512 columns, refinement gave the twin's codes bit for bit, and the walk other
codes for 0 to 1 % (q8_0: 6 %) with a loss that differed by 3e-4 at most. On a GPU the twin rounds differently in places
(torch divides by a Python number by multiplying with its inverse), so more is allowed here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from quant_problems import problem
from torch import Tensor

from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant import block_gptq, block_refine, block_scales
from compress.quant.block_scales import Multiples, Units, nearest_levels, steps_of
from compress.quant.blocks import Blocked
from compress.quant.gptq import Factor, factorize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
KINDS = {name: kind for name, kind in BLOCK_TYPES.items() if kind.uniform}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
each_size = pytest.mark.parametrize(("rows", "columns"), [(1, 512), (1000, 1024), (14336, 512)])


@contextmanager
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        for module in (block_gptq, block_refine, block_scales):
            patched.setattr(module, "usable", lambda _: False)
        yield


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, or 255, so that nothing can depend on what happened to be there."""
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 255)

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))


def matrix(kind: BlockType, rows: int, columns: int) -> tuple[Tensor, Tensor, Factor]:
    """Weights, one row of zeros if there are many, a Hessian with a dead input, its factor."""
    weight, hessian = (each.cuda() for each in problem(rows, columns, seed=kind.number, tokens=2 * columns))
    weight[7:8] = 0.0
    hessian[50], hessian[:, 50] = 0.0, 0.0
    return weight, hessian, factorize(hessian.clone(), block_gptq.block_order(hessian.diagonal(), kind, True), 0.01)


def codes_that_differ(found: Blocked, wanted: Blocked) -> float:
    return float((found.codes != wanted.codes).float().mean())


def loss_of(weight: Tensor, found: Blocked, hessian: Tensor) -> Tensor:
    """Of each row under the damped Hessian, float64."""
    diagonal = hessian.diagonal().double()
    damped = hessian.double() + torch.where(diagonal > 0, 0.01, 1.0).mul(diagonal.mean()).diag()
    missed = weight.double() - found.dequantize().double()
    return ((missed @ damped) * missed).sum(1)


@each_kind
@each_size
def test_walk_loses_what_the_twin_does(
    kind: BlockType, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, factor = matrix(kind, rows, columns)
    found, loss = block_gptq.block_gptq(weight, factor, kind, "hessian")
    with plain_torch(monkeypatch):
        wanted, wanted_loss = block_gptq.block_gptq(weight, factor, kind, "hessian")
    torch.testing.assert_close(loss.double(), loss_of(weight, found, hessian), rtol=1e-2, atol=1e-9)
    if rows > 1:
        assert codes_that_differ(found, wanted) < (0.25 if kind.bits == 8 else 0.1)
    torch.testing.assert_close(loss.sum(), wanted_loss.sum(), rtol=3e-3 if rows > 1 else 0.2, atol=0.0)


@each_kind
@each_size
def test_refinement_finds_the_twins_codes(
    kind: BlockType, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian, factor = matrix(kind, rows, columns)
    start, before = block_gptq.block_gptq(weight, factor, kind, "hessian")
    found, loss = block_refine.refine(weight, start, hessian, 0.01, 2)
    with plain_torch(monkeypatch):
        wanted, wanted_loss = block_refine.refine(weight, start, hessian, 0.01, 2)
    torch.testing.assert_close(loss.double(), loss_of(weight, found, hessian), rtol=1e-2, atol=1e-9)
    assert loss.sum() < before.sum()
    if rows > 1:
        assert codes_that_differ(found, wanted) < (0.1 if kind.bits == 8 else 0.02)
    torch.testing.assert_close(loss.sum(), wanted_loss.sum(), rtol=1e-3 if rows > 1 else 0.1, atol=0.0)


@each_kind
def test_same_again(kind: BlockType) -> None:
    """Twice the same bits: a race between warps would show."""
    weight, hessian, factor = matrix(kind, 4096, 512)
    first, second = (
        block_refine.refine(weight, block_gptq.block_gptq(weight, factor, kind, "hessian")[0], hessian, 0.01, 1)
        for _ in range(2)
    )
    for name in ("codes", "d", "m", "scales", "mins"):
        ours, theirs = getattr(first[0], name), getattr(second[0], name)
        assert ours is None or torch.equal(ours, theirs), name
    assert torch.equal(first[1], second[1])


@each_kind
def test_search_finds_the_twins_units_and_multiples(kind: BlockType, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(kind.number)
    shape = (kind.sub_blocks, kind.sub_width, 4099)
    weight = torch.randn(shape, generator=generator, device="cuda") * 0.05
    importance = torch.rand(shape[:2], generator=generator, device="cuda") + 0.1
    importance[-1] = 0.0
    found = block_scales.block_units(weight, importance, kind)
    with plain_torch(monkeypatch):
        wanted = block_scales.block_units(weight, importance, kind)
    for thorough in (False, True):
        times = block_scales.sub_multiples(weight, importance, wanted, kind, thorough)
        with plain_torch(monkeypatch):
            expected = block_scales.sub_multiples(weight, importance, wanted, kind, thorough)
        assert float((times.scale != expected.scale).float().mean()) < 0.01
        ours, theirs = (loss(weight, importance, wanted, each, kind) for each in (times, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0.0)
    assert float(((found.d != wanted.d) | (found.m != wanted.m)).float().mean()) < 0.1
    torch.testing.assert_close(found.d.abs().mean(), wanted.d.abs().mean(), rtol=1e-3, atol=0.0)


def loss(weight: Tensor, importance: Tensor, units: Units, multiples: Multiples, kind: BlockType) -> Tensor:
    """Weighted squared error of all, float64."""
    steps = steps_of(units, multiples)
    values = nearest_levels(weight, steps, kind) * steps.step[:, None] + steps.offset[:, None]
    return ((weight - values).double().square() * importance[..., None]).sum()


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q4_0"])
def test_rounding_loses_what_the_twin_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = BLOCK_TYPES[name]
    weight, hessian, _ = matrix(kind, 3000, 512)
    found = block_gptq.block_rtn(weight, hessian.diagonal(), kind)
    with plain_torch(monkeypatch):
        wanted = block_gptq.block_rtn(weight, hessian.diagonal(), kind)
    assert codes_that_differ(found, wanted) < 0.02
    ours, theirs = (
        (weight - each.dequantize()).double().square() @ hessian.diagonal().double() for each in (found, wanted)
    )
    torch.testing.assert_close(ours.sum(), theirs.sum(), rtol=1e-3, atol=0.0)
