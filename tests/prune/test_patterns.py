"""Masks against plain counting, and SparseGPT against float64 walks in the form in which it was published."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_problems import group_loss, problem
from torch import Tensor

from compress.prune.patterns import has_pattern, keep_mask, magnitude, output_error, solver_mask, wanda
from compress.quant.gptq import Factor, Mask, factorize, gptq, importance, sparsify
from compress.quant.grid import Grid, Quantized
from compress.quant.scales import group_scales

COUNTS = {"2:4": (2, 4), "4:8": (4, 8)}
DAMP = 0.01
FEW_VALUES = st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0])  # so that there are ties


@dataclass
class Asked:
    """Records what the solver asks a mask, and what it is told: by the first column, the last time that counts."""

    mask: Mask
    costs: dict[int, Tensor] = field(default_factory=dict)
    kept: dict[int, Tensor] = field(default_factory=dict)

    def recording(self) -> Mask:
        def keep(first: int, cost: Tensor) -> Tensor:
            found = self.mask.keep(first, cost)
            if cost.shape[1] <= self.mask.width:
                self.costs[first], self.kept[first] = cost.clone(), found.clone()
            return found

        return Mask(self.mask.width, keep)


def damped(hessian: Tensor) -> Tensor:
    """What is factorized, in float64."""
    diagonal = hessian.double().diagonal()
    return hessian.double() + torch.where(diagonal > 0, DAMP * diagonal.mean(), diagonal.mean()).diag()


def in_stored_order(hessian: Tensor) -> Factor:
    return factorize(hessian, torch.arange(len(hessian)), DAMP)


# ---- masks


@given(values=st.lists(FEW_VALUES, min_size=48, max_size=48), pattern=st.sampled_from(["2:4", "4:8"]))
@settings(deadline=None, max_examples=100)
def test_n_of_every_m_neighbours_are_kept_and_they_are_the_largest(values: list[float], pattern: str) -> None:
    kept, of = COUNTS[pattern]
    scores = torch.tensor(values).view(3, 16)
    mask = keep_mask(scores, pattern)
    for row, stays in zip(scores.tolist(), mask.tolist(), strict=True):
        for at in range(0, 16, of):
            group = list(range(at, at + of))
            expected = sorted(sorted(group, key=lambda j: (row[j], j))[of - kept :])
            assert [j for j in group if stays[j]] == expected


@given(
    values=st.lists(FEW_VALUES, min_size=36, max_size=36),
    sparsity=st.floats(0.01, 0.99),
    by_row=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_the_share_goes_from_each_row_or_the_matrix(values: list[float], sparsity: float, by_row: bool) -> None:
    scores = torch.tensor(values).view(3, 12)
    mask = keep_mask(scores, "unstructured", sparsity, by_row)
    compared = zip(scores, mask, strict=True) if by_row else [(scores.flatten(), mask.flatten())]
    for part, stays in compared:
        assert int((~stays).sum()) == round(sparsity * len(part))
        if 0 < int(stays.sum()) < len(part):
            assert float(part[stays].min()) >= float(part[~stays].max())


def test_magnitude_and_wanda_only_set_weights_to_zero() -> None:
    weight, hessian = problem(9, 64, 0)
    norms = hessian.diagonal().sqrt()
    for pattern, (kept, of) in COUNTS.items():
        for found, scores in ((magnitude(weight, pattern), weight.abs()), (wanda(weight, hessian, pattern), None)):
            scores = weight.abs() * norms if scores is None else scores
            threshold = scores.unflatten(1, (-1, of)).sort(2, descending=True).values[..., kept - 1 : kept]
            stays = (scores.unflatten(1, (-1, of)) >= threshold).flatten(1)
            assert torch.equal(found, torch.where(stays, weight, 0.0))
    scores = (weight.abs() * norms).sort(1).values
    found = wanda(weight, hessian, "unstructured", 0.25)
    assert torch.equal(found != 0, weight.abs() * norms > scores[:, 15:16])
    found = magnitude(weight, "unstructured", 0.25)
    assert torch.equal(found != 0, weight.abs() > weight.abs().flatten().sort().values[143])
    assert not torch.signbit(found[found == 0]).any()


def test_patterns_are_recognised() -> None:
    weight, _ = problem(8, 32, 0)
    for pattern in COUNTS:
        sparse = magnitude(weight, pattern)
        assert has_pattern(sparse, pattern) and not has_pattern(weight, pattern)
        assert not has_pattern(torch.cat([sparse, weight[:1]]), pattern)
        assert has_pattern(sparse.bfloat16().masked_fill(torch.eye(8, 32, dtype=torch.bool), 0.0), pattern)
    assert has_pattern(magnitude(weight, "2:4"), "4:8") and not has_pattern(magnitude(weight, "4:8"), "2:4")
    assert not has_pattern(magnitude(weight, "unstructured"), "2:4")
    assert not has_pattern(torch.zeros(8, 32), "2:4") and not has_pattern(magnitude(weight, "2:4")[:, :30], "2:4")


# ---- SparseGPT


def check_choice(asked: Asked, first: int, cost: Tensor, gone: int) -> Tensor:
    """What the solver kept of columns, [O, n], after its costs are compared with those in float64 [O, n].

    Whatever goes costs at most what stays does, up to float32's rounding: compared in each row's neighbours, or, where
    `gone` is 0, over all rows.
    """
    kept = asked.kept[first]
    torch.testing.assert_close(asked.costs[first].double(), cost, rtol=1e-3, atol=1e-5 * float(cost.max()))
    stays, goes = cost.masked_fill(~kept, torch.inf), cost.masked_fill(kept, 0.0)
    if gone:
        assert bool(((~kept).sum(1) == gone).all())
        assert bool((goes.amax(1) <= 1.001 * stays.amin(1)).all())
    else:
        assert float(goes.max()) <= 1.001 * float(stays.min())
    return kept


def follow(
    weight: Tensor,
    hessian: Tensor,
    asked: Asked,
    gone: int,
    to_value: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """SparseGPT as it was published (no blocks but its masks', the inverse Hessian's factor), in float64.

    Args:
        weight: [O, I].
        hessian: damped.
        asked: the solver's choices, which are checked and followed: ties are decided by rounding.
        gone: of each row's neighbours; 0: see `check_choice`.
        to_value: from a column, its weights as the errors have moved them and which of them stay, their new values.

    Returns:
        The new weights.
    """
    moved, found = weight.double().clone(), torch.zeros_like(weight, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    kept = torch.empty(0)
    for j in range(weight.shape[1]):
        at = j % asked.mask.width
        if at == 0:
            part = slice(j, min(j + asked.mask.width, weight.shape[1]))
            cost = moved[:, part] ** 2 / factor.diagonal()[part] ** 2
            kept = check_choice(asked, j, cost, gone)
        found[:, j] = to_value(j, moved[:, j], kept[:, at])
        error = (moved[:, j] - found[:, j]) / factor[j, j]
        moved[:, j:] -= error[:, None] * factor[j, j:]
    return found


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
@pytest.mark.parametrize(("rows", "columns"), [(19, 64), (33, 200), (8, 392)])
def test_sparsegpt_is_the_published_algorithm(pattern: str, rows: int, columns: int) -> None:
    weight, hessian = problem(rows, columns, rows, tokens=2 * columns)
    sparsity = 0.6
    asked = Asked(solver_mask(pattern, sparsity))
    found, loss = sparsify(weight, in_stored_order(hessian), asked.recording())
    gone = COUNTS[pattern][1] - COUNTS[pattern][0] if pattern in COUNTS else 0
    expected = follow(weight, damped(hessian), asked, gone, lambda j, moved, kept: moved * kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4 * float(weight.abs().max()))
    assert torch.equal(found == 0, expected == 0)
    if pattern in COUNTS:
        assert has_pattern(found, pattern)
    else:
        for kept in asked.kept.values():
            assert int((~kept).sum()) == round(sparsity * kept.numel())
        assert set(asked.kept) == set(range(0, columns, 128))
    missed = weight.double() - found.double()
    torch.testing.assert_close(loss.double(), ((missed @ damped(hessian)) * missed).sum(1), rtol=1e-3, atol=0.0)


def test_sparsegpt_removes_what_is_silent_first_and_keeps_pairs_of_independent_weights() -> None:
    weight, hessian = problem(12, 64, 3)
    hessian[:, [5, 6, 22]] = hessian[[5, 6, 22]] = 0.0
    found, _ = sparsify(weight, in_stored_order(hessian), solver_mask("2:4", silent=hessian.diagonal() <= 0))
    assert bool((found[:, [5, 6, 22]] == 0).all()) and has_pattern(found, "2:4")
    assert bool((found[:, [4, 7]] != 0).all())
    found, _ = sparsify(weight, in_stored_order(torch.eye(64)), solver_mask("2:4"))
    assert torch.equal(found, magnitude(weight, "2:4"))  # with nothing to share, nothing makes up for anything


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "unstructured"])
def test_errors_shrink_from_magnitude_to_wanda_to_sparsegpt(pattern: str) -> None:
    for seed in range(5):
        weight, hessian = problem(64, 256, seed, tokens=2000)
        factor = in_stored_order(hessian)
        found = (
            sparsify(weight, factor, solver_mask(pattern))[0],
            wanda(weight, hessian, pattern),
            magnitude(weight, pattern),
        )
        best, middle, worst = (output_error(weight, each, hessian) for each in found)
        assert 0 < best < 0.95 * middle and middle < 0.95 * worst < 1
    missed = (weight - found[1]).double()
    exact = float(((missed @ hessian.double()) * missed).sum() / ((weight.double() @ hessian.double()) * weight).sum())
    assert middle == pytest.approx(exact, rel=1e-4)


# ---- zeros and codes in one pass


def check_scales(weight: Tensor, hessian: Tensor, found: Quantized, mask: Mask, clip: str) -> None:
    """The scales of the first group are those that are searched for the weights which are to stay, or as good."""
    first = slice(0, found.grid.columns_per_group(weight.shape[1]))
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pivot = (factor.diagonal()[first] ** -2).float()
    left = weight[:, first] * mask.keep(0, weight[:, first] ** 2 * pivot)
    cost = importance(pivot, clip)
    wanted = group_scales(left, cost, found.grid)
    cost = torch.ones_like(pivot) if cost is None else cost
    losses = [group_loss(left, *each, cost, found.grid) for each in ((found.scale[:, 0], found.zero[:, 0]), wanted)]
    # at 8 bits the loss is so small a part of the squares that float32 sums, in the order of a processor, hardly tell
    # the candidates apart
    torch.testing.assert_close(*losses, rtol=0.3 if found.grid.bits == 8 else 0.02, atol=0.0)


CASES = list(itertools.product(["2:4", "4:8"], (2, 3, 4, 8), (True, False)))


@pytest.mark.parametrize(("pattern", "bits", "symmetric"), CASES)
def test_one_pass_is_the_published_algorithm(pattern: str, bits: int, symmetric: bool) -> None:
    for seed, (group_size, clip) in enumerate(itertools.product((32, 64, -1), ("none", "mse", "hessian"))):
        columns = 120 if group_size == -1 else 128
        weight, hessian = problem(2 * bits + 9, columns, seed)
        grid = Grid(bits, group_size, symmetric, zero_minimum=seed % 2)
        asked = Asked(solver_mask(pattern))
        found, losses = gptq(weight, in_stored_order(hessian), grid, clip, asked.recording())
        width = grid.columns_per_group(columns)

        def nearest(j: int, moved: Tensor, kept: Tensor, found: Quantized = found, width: int = width) -> Tensor:
            scale, zero = found.scale[:, j // width].double(), found.zero[:, j // width].double()
            code, target = found.codes[:, j].double(), moved / scale + zero
            other = kept & (code != torch.round(target).clamp(0, found.grid.largest_code))
            assert bool(((target - code)[other].abs() < 0.502).all()), f"column {j}: not the nearest code"
            assert torch.equal(code[~kept], zero[~kept]), f"column {j}: not zero"
            return (code - zero) * scale

        values = follow(weight, damped(hessian), asked, COUNTS[pattern][1] - COUNTS[pattern][0], nearest)
        assert torch.equal(found.dequantize().double(), values) and has_pattern(found.dequantize(), pattern)
        check_scales(weight, damped(hessian), found, asked.mask, clip)
        missed = weight.double() - values
        expected = ((missed @ damped(hessian)) * missed).sum(1)
        torch.testing.assert_close(losses.double(), expected, rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_one_pass_with_many_bits_is_sparsegpt(pattern: str) -> None:
    weight, hessian = problem(16, 128, 7, tokens=1000)
    factor = in_stored_order(hessian)
    sparse, _ = sparsify(weight, factor, solver_mask(pattern))
    both, _ = gptq(weight, factor, Grid(8, 32, True, torch.float32), "hessian", solver_mask(pattern))
    assert float(((sparse != 0) & (both.dequantize() != 0)).float().mean()) > 0.49
    error, exact = output_error(weight, both.dequantize(), hessian), output_error(weight, sparse, hessian)
    assert error == pytest.approx(exact, rel=0.02)


def test_one_pass_keeps_the_zeros_that_there_are() -> None:
    weight, hessian = problem(24, 128, 1)
    sparse = wanda(weight, hessian, "2:4")
    sparse[0, sparse[0].nonzero()[:20]] = 0.0  # more than the pattern wants
    moved = sparse + 0.01 * problem(24, 128, 2)[0]  # by a correction in front of the solver
    for symmetric, bits in itertools.product((True, False), (2, 4)):
        grid = Grid(bits, 32, symmetric)
        mask = solver_mask("2:4", zeros=sparse == 0)
        values = gptq(moved, in_stored_order(hessian), grid, "hessian", mask)[0].dequantize()
        assert bool((values[sparse == 0] == 0).all())
        lost = gptq(moved, in_stored_order(hessian), grid, "hessian", solver_mask("2:4"))[0].dequantize()
        assert bool((lost[sparse == 0] != 0).any())
    one_zero = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.0, 0.0, 5.0, 6.0]])
    kept = solver_mask("2:4", zeros=one_zero == 0).keep(0, torch.tensor([[9.0, 8.0, 7.0, 6.0, 9.0, 8.0, 7.0, 6.0]]))
    assert kept.tolist() == [[True, True, False, False, False, False, True, True]]  # one zero is too few to count
