"""Weights that make up for what is gone, against one stacked least-squares problem in float64."""

import pytest
import torch
from torch import Tensor

from compress.prune.compensation import ReaderFit, WriterFit, damped_factor, damping, ridge

OUTPUTS, BEFORE, AFTER = 5, 16, 10
DAMP = 0.05


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solved(inputs: Tensor, wanted: Tensor, kept: Tensor, damp: float) -> Tensor:
    """argmin |X W'^T - T|^2 + the damped distance from W, for tokens as rows: the distance is rows of its own."""
    energy = inputs.square().sum(0)
    pull = (damp * energy + 1e-9 * energy.mean()).sqrt().diag()
    rows, targets = torch.cat([inputs, pull]), torch.cat([wanted, pull @ kept.t()])
    return torch.linalg.lstsq(rows, targets).solution.t()


def share_missed(weight: Tensor, inputs: Tensor, wanted: Tensor) -> float:
    return float((inputs @ weight.t() - wanted).square().sum() / wanted.square().sum())


class Batches:
    """What two models read and hold in three batches: X, X0, R, R0 and a target of its own."""

    def __init__(self) -> None:
        self.original = [draw(2, length, BEFORE, seed=length) for length in (7, 9, 20)]
        self.inputs = [x[..., :AFTER] + 0.3 * draw(*x.shape[:2], AFTER, seed=50 + x.shape[1]) for x in self.original]
        self.residual = [draw(*x.shape[:2], OUTPUTS, seed=100 + x.shape[1]) for x in self.original]
        self.residual_original = [r + 0.5 * draw(*r.shape, seed=150 + r.shape[1]) for r in self.residual]
        self.target = [draw(*r.shape, seed=200 + r.shape[1]) for r in self.residual]


def flat(batches: list[Tensor]) -> Tensor:
    return torch.cat([batch.flatten(0, -2) for batch in batches])


def weights() -> tuple[Tensor, Tensor]:
    """W and W0."""
    original = draw(OUTPUTS, BEFORE, seed=1)
    return original[:, :AFTER].clone(), original


@pytest.mark.parametrize("towards", ["outputs", "residual", "target"])
def test_a_writer_is_solved_for_what_is_wanted_behind_it(towards: str) -> None:
    b, (kept, original) = Batches(), weights()
    fit = WriterFit(kept, original)
    for number, x in enumerate(b.inputs):
        residual = None if towards == "outputs" else (b.residual[number], b.residual_original[number])
        fit.add(x, b.original[number], residual, b.target[number] if towards == "target" else None)
    found, inputs = fit.solve(DAMP), flat(b.inputs)
    wanted = flat(b.original) @ original.t()
    if towards == "residual":
        wanted = wanted + flat(b.residual_original) - flat(b.residual)
    elif towards == "target":
        wanted = flat(b.target) - flat(b.residual)
    assert torch.allclose(found.weight, solved(inputs, wanted, kept, DAMP), atol=1e-8)
    assert found.before == pytest.approx(share_missed(kept, inputs, wanted), rel=1e-5)
    assert found.after == pytest.approx(share_missed(found.weight, inputs, wanted), rel=1e-5)
    assert found.after is not None and found.before is not None and found.after < found.before


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_readers_of_the_same_inputs_are_each_solved_for_their_own_outputs(share: float) -> None:
    b, fit = Batches(), ReaderFit()
    for x, x0 in zip(b.inputs, b.original, strict=True):
        fit.add(x, x0)
    for seed, damp in ((1, DAMP), (2, 0.5)):
        original = draw(OUTPUTS, BEFORE, seed=seed)
        kept = original[:, :AFTER] + 0.1
        found = fit.solve(kept, original, damp, share)
        whole = solved(flat(b.inputs), flat(b.original) @ original.t(), kept, damp)
        assert torch.allclose(found.weight, kept + share * (whole - kept), atol=1e-8)
        assert (found.before, found.after) == (None, None)


def test_nothing_removed_and_no_drift_changes_nothing() -> None:
    _, original = weights()
    x = draw(3, 20, BEFORE, seed=2)
    writer, readers = WriterFit(original, original), ReaderFit()
    writer.add(x, x, (x[..., :OUTPUTS], x[..., :OUTPUTS]))
    readers.add(x, x)
    found = writer.solve(DAMP)
    assert torch.equal(found.weight, original) and (found.before, found.after) == (0.0, 0.0)
    assert torch.allclose(readers.solve(original, original, DAMP).weight, original, atol=1e-12)


def test_each_input_is_damped_by_its_own_energy() -> None:
    """One that is a thousand times as large has weights a thousandth as large, and no other weight notices."""
    b, (kept, original) = Batches(), weights()
    scale = torch.ones(AFTER, dtype=torch.float64)
    scale[3] = 1000
    found = []
    for factor in (torch.ones_like(scale), scale):
        fit = WriterFit(kept / factor, original)
        for x, x0 in zip(b.inputs, b.original, strict=True):
            fit.add(x * factor, x0, None)
        found.append(fit.solve(0.5).weight * factor)
    assert torch.allclose(found[0], found[1], atol=1e-3)
    assert float((found[0] - kept).abs().mean()) > 0.05


def test_inputs_that_are_zero_keep_their_weights() -> None:
    b, (kept, original) = Batches(), weights()
    fit, readers = WriterFit(kept, original), ReaderFit()
    for x, x0 in zip(b.inputs, b.original, strict=True):
        x[..., 4] = 0
        fit.add(x, x0, None)
        readers.add(x, x0)
    others = torch.arange(AFTER) != 4
    wanted = flat(b.original) @ original.t()
    for found in (fit.solve(DAMP).weight, readers.solve(kept, original, DAMP).weight):
        assert torch.equal(found[:, 4], kept[:, 4])
        expected = solved(flat(b.inputs)[:, others], wanted, kept[:, others], DAMP)
        assert torch.allclose(found[:, others], expected, atol=1e-6)


def test_where_all_inputs_are_zero_nothing_changes() -> None:
    kept, original = weights()
    fit, readers = WriterFit(kept, original), ReaderFit()
    for _ in range(2):
        fit.add(torch.zeros(2, 7, AFTER), torch.zeros(2, 7, BEFORE), None)
        readers.add(torch.zeros(2, 7, AFTER), torch.zeros(2, 7, BEFORE))
    found = fit.solve(DAMP)
    assert torch.equal(found.weight, kept) and (found.before, found.after) == (0.0, 0.0)
    assert torch.equal(readers.solve(kept, original, DAMP).weight, kept)


def test_sixteen_bit_batches_give_weights_in_float32() -> None:
    """As near to the exact ones as outputs in bfloat16 let them be."""
    b, original = Batches(), draw(OUTPUTS, BEFORE, seed=1).bfloat16()
    kept = original[:, :AFTER]
    fit = WriterFit(kept, original)
    for x, x0 in zip(b.inputs, b.original, strict=True):
        fit.add(x.bfloat16(), x0.bfloat16(), None)
    found, inputs = fit.solve(DAMP).weight, flat(b.inputs).bfloat16().double()
    wanted = flat(b.original).bfloat16().double() @ original.double().t()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), solved(inputs, wanted, kept.double(), DAMP), atol=5e-3)


def test_more_damping_changes_less() -> None:
    b, (kept, original) = Batches(), weights()
    changes = []
    for damp in (1e-6, 0.01, 0.1, 1.0, 10.0):
        fit = WriterFit(kept, original)
        for x, x0 in zip(b.inputs, b.original, strict=True):
            fit.add(x, x0, None)
        changes.append(float((fit.solve(damp).weight - kept).norm()))
    assert changes == sorted(changes, reverse=True) and changes[-1] < 0.3 * changes[0]


@pytest.mark.parametrize(
    ("tokens", "inputs", "damp", "expected"),
    [
        (262_144, 4096, 0.1, 0.1),
        (262_144, 14_336, 0.1, 2 * 14_336 / 262_144),
        (81_920, 4096, 0.1, 0.1),
        (512, 4096, 0.1, 16.0),
        (512, 64, 0.01, 0.25),
        (512, 64, 1.0, 1.0),
    ],
)
def test_few_tokens_for_the_inputs_damp_more(tokens: int, inputs: int, damp: float, expected: float) -> None:
    assert damping(tokens, inputs, damp) == pytest.approx(expected)


def test_a_matrix_that_is_not_positive_definite_is_damped_ten_times_as_much() -> None:
    """As rounding makes of the sums of inputs that say the same: 1.01 on the diagonal is not enough, 1.1 is."""
    gram = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    lower = damped_factor(gram, 0.01)
    assert lower is not None
    damped = gram + 0.1 * torch.eye(2)
    assert torch.allclose(lower @ lower.t(), damped, atol=1e-8)
    missing = draw(3, 2, seed=0)
    assert torch.allclose(ridge(missing, gram, 0.01), missing @ torch.linalg.inv(damped), atol=1e-6)
