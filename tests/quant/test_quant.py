"""The solvers against an unblocked float64 GPTQ in its usual form, dense searches and arithmetic by hand."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_problems import AWKWARD, BITS, CLIPS, SCALE_DTYPES, group_loss, problem, second_moment
from torch import Tensor

from compress.errors import NumericalError
from compress.quant.gptq import factorize, gptq, importance, round_to_nearest, visiting_order
from compress.quant.grid import Grid, Quantized, dequantize, store_scale
from compress.quant.scales import Clip, group_scales
from compress.quant.statistics import gram


def damped(hessian: Tensor, damp: float) -> Tensor:
    """What is factorized, in float64: `damp` mean diagonals on the diagonal, a whole one where an input is dead."""
    diagonal = hessian.double().diagonal()
    added = torch.where(diagonal > 0, damp * diagonal.mean(), diagonal.mean())
    return hessian.double() + added.diag()


def loss_of(weight: Tensor, found: Quantized, hessian: Tensor) -> Tensor:
    """(w - w^) H (w - w^)^T of each row, in float64."""
    missed = weight.double() - found.dequantize().double()
    return ((missed @ hessian.double()) * missed).sum(1)


# ---- GPTQ


def follow(weight: Tensor, hessian: Tensor, order: Tensor, found: Quantized, clip: Clip) -> tuple[int, int]:
    """Walk through GPTQ as it was published (no blocks, float64, the inverse Hessian's factor), with the codes found.

    Every code must be the nearest to the weight as all errors before have moved it, every scale the one that
    `group_scales` gives for those weights. Ties (a weight within 0.2 % of a step of the middle between two codes,
    two scales that are equally good before they are stored) go either way: float32 decides them by its rounding.

    Returns:
        How many codes and how many scales were such ties.
    """
    grid, columns = found.grid, weight.shape[1]
    width = grid.columns_per_group(columns)
    moved = weight.double()[:, order].clone()
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    cost = factor.diagonal() ** -2
    code_ties = scale_ties = 0
    for j in range(columns):
        g = int(order[j]) // width
        scale, zero = found.scale[:, g].double(), found.zero[:, g].double()
        if j % width == 0:
            group, weighs = moved[:, j : j + width].float(), importance(cost[j : j + width].float(), clip)
            wanted = group_scales(group, weighs, grid)
            other = ((wanted[0] - scale).abs() > 1e-5 * scale.abs()) | (wanted[1] != zero)
            weighs = torch.ones(width) if weighs is None else weighs
            best, loss = (group_loss(group, *each, weighs, grid) for each in (wanted, (scale, zero)))
            assert bool((loss <= 1.3 * best)[other].all()), f"column {j}: not the scale of these weights"
            scale_ties += int(other.sum())
        target = moved[:, j] / scale + zero
        code = found.codes[:, order[j]].double()
        other = code != torch.round(target).clamp(0, grid.largest_code)
        assert bool(((target - code)[other].abs() < 0.502).all()), f"column {j}: not the nearest code"
        code_ties += int(other.sum())
        error = (moved[:, j] - (code - zero) * scale) / factor[j, j]
        moved[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return code_ties, scale_ties


@pytest.mark.parametrize(
    ("bits", "symmetric", "act_order"),
    [*((bits, each, each) for bits in BITS for each in (True, False)), (3, True, False), (4, False, True)],
)
def test_gptq_is_the_published_algorithm(bits: int, symmetric: bool, act_order: bool) -> None:
    rows = 2 * bits + 17  # odd
    decided = torch.zeros(2)  # codes and scales that were ties
    for seed, (clip, group_size) in enumerate(itertools.product(CLIPS, (32, 64, -1))):
        columns = 100 if group_size == -1 else 128  # whole rows need no round width
        weight, hessian = problem(rows, columns, seed)
        grid = Grid(bits, group_size, symmetric)
        order = visiting_order(hessian.diagonal(), grid.columns_per_group(columns), act_order)
        found, losses = gptq(weight, factorize(hessian, order, 0.01), grid, clip)
        decided += torch.tensor(follow(weight, damped(hessian, 0.01), order, found, clip))
        torch.testing.assert_close(losses.double(), loss_of(weight, found, damped(hessian, 0.01)), rtol=2e-3, atol=0.0)
    codes, scales = decided.tolist()
    assert codes <= 2 and scales <= 8  # none in most cases; of 24,000 codes and 420 scales or more


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_with_dead_inputs_few_tokens_and_a_scale_per_format(symmetric: bool) -> None:
    weight, hessian = problem(19, 96, 1, tokens=40)  # singular but for the damping
    hessian[:, [3, 40, 95]] = hessian[[3, 40, 95]] = 0.0
    for scale_dtype, zero_minimum in itertools.product(SCALE_DTYPES, (0, 1)):
        grid = Grid(4, 32, symmetric, scale_dtype, zero_minimum)
        order = visiting_order(hessian.diagonal(), 32, True)
        found, losses = gptq(weight, factorize(hessian, order, 0.01), grid, "hessian")
        assert sum(follow(weight, damped(hessian, 0.01), order, found, "hessian")) <= 2
        torch.testing.assert_close(losses.double(), loss_of(weight, found, damped(hessian, 0.01)), rtol=2e-3, atol=0.0)
        assert found.scale.dtype == scale_dtype and int(found.zero.min()) >= zero_minimum


def test_gptq_on_an_identity_hessian_is_round_to_nearest() -> None:
    weight, _ = problem(21, 128, 0)
    for bits, symmetric, group_size in itertools.product(BITS, (True, False), (32, -1)):
        grid = Grid(bits, group_size, symmetric)
        factor = factorize(torch.eye(128), torch.arange(128), 0.01)
        found, expected = gptq(weight, factor, grid, "mse")[0], round_to_nearest(weight, torch.ones(128), grid)
        for name in ("codes", "scale", "zero"):
            assert torch.equal(getattr(found, name), getattr(expected, name))


def test_solvers_do_not_change_their_arguments() -> None:
    weight, hessian = problem(8, 64, 0)
    factor = factorize(hessian, visiting_order(hessian.diagonal(), 32, True), 0.01)
    arguments = (weight, hessian, factor.feedback, factor.pivot, factor.order)
    kept = [tensor.clone() for tensor in arguments]
    gptq(weight, factor, Grid(3, 32, False), "hessian")
    round_to_nearest(weight, factor.pivot, Grid(3, 32, True))
    factorize(hessian, factor.order, 0.01)
    assert all(torch.equal(tensor, before) for tensor, before in zip(arguments, kept, strict=True))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_beats_rounding_on_what_it_saw_and_on_what_it_did_not(bits: int, symmetric: bool) -> None:
    seen, held_out = [], []
    for seed in range(6):
        weight, _ = problem(48, 128, seed)
        mix = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) + 6 * torch.eye(128)
        inputs = torch.randn(2048, 128, generator=torch.Generator().manual_seed(100 + seed)) @ mix
        hessian, other = second_moment(inputs[:1024]), second_moment(inputs[1024:])
        grid = Grid(bits, 64, symmetric)
        factor = factorize(hessian, visiting_order(hessian.diagonal(), 64, True), 0.01)
        solved, rounded = gptq(weight, factor, grid, "hessian")[0], round_to_nearest(weight, torch.ones(128), grid)
        seen.append(float(loss_of(weight, solved, hessian).sum() / loss_of(weight, rounded, hessian).sum()))
        held_out.append(float(loss_of(weight, solved, other).sum() / loss_of(weight, rounded, other).sum()))
    assert max(seen) < 0.9
    assert sum(held_out) / len(held_out) < 0.95


# ---- the factor and the order


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("dead", [[], [0, 17, 63]])
def test_factor_times_pivot_is_the_damped_hessian_in_its_order(act_order: bool, dead: list[int]) -> None:
    _, hessian = problem(1, 64, 5)
    hessian[:, dead] = hessian[dead] = 0.0
    order = visiting_order(hessian.diagonal(), 16, act_order)
    factor = factorize(hessian, order, 0.02)
    feedback = factor.feedback.double()
    assert torch.equal(feedback.triu(), feedback) and bool((feedback.diagonal() == 1).all())
    expected = damped(hessian, 0.02)[order][:, order]
    actual = feedback @ factor.pivot.double().diag() @ feedback.t()
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=2e-6 * float(expected.diagonal().max()))
    assert factor.damp == 0.02 and torch.equal(factor.order, order)


def test_factor_damps_more_until_a_hessian_is_positive() -> None:
    vectors = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    values = torch.linspace(1.0, 3.0, 32, dtype=torch.float64)
    values[0] = -0.5  # as rounding may leave it, exaggerated: a damping of 0.01 and of 0.1 is not enough
    hessian = ((vectors * values) @ vectors.t()).float()
    factor = factorize(hessian, torch.arange(32), 0.01)
    assert factor.damp == pytest.approx(1.0)
    actual = factor.feedback.double() @ factor.pivot.double().diag() @ factor.feedback.double().t()
    torch.testing.assert_close(actual, damped(hessian, 1.0), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factor_of_nan_or_inf_is_an_error_in_one_line(value: float) -> None:
    _, hessian = problem(1, 32, 0)
    hessian[3, 4] = hessian[4, 3] = value
    with pytest.raises(NumericalError, match="32 inputs is not positive definite") as caught:
        factorize(hessian, torch.arange(32), 0.01)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, 1, 5])
def test_singular_hessians_give_weights_that_are_no_worse_than_rounded(rank: int) -> None:
    weight, _ = problem(9, 64, 0)
    inputs = torch.randn(rank, 64, generator=torch.Generator().manual_seed(0))
    hessian = second_moment(inputs)
    for clip, symmetric in itertools.product(CLIPS, (True, False)):
        found, losses = gptq(weight, factorize(hessian, torch.arange(64), 0.01), Grid(4, 32, symmetric), clip)
        assert bool(found.dequantize().isfinite().all()) and bool(losses.isfinite().all())
        assert float((found.dequantize() - weight).norm() / weight.norm()) < 0.2


@given(
    values=st.lists(st.floats(0, 1e6, width=32), min_size=48, max_size=48),
    width=st.sampled_from([4, 8, 16, 48]),
    act_order=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_order_is_a_permutation_of_whole_groups_largest_first(values: list[float], width: int, act_order: bool) -> None:
    diagonal = torch.tensor(values)
    order = visiting_order(diagonal, width, act_order).tolist()
    assert sorted(order) == list(range(48))
    groups = [[column // width for column in order[at : at + width]] for at in range(0, 48, width)]
    assert all(len(set(group)) == 1 for group in groups)
    if not act_order:
        assert order == list(range(48))
        return
    largest = [max(values[column] for column in order[at : at + width]) for at in range(0, 48, width)]
    assert largest == sorted(largest, reverse=True)
    for at in range(0, 48, width):
        visited = diagonal[order[at : at + width]].tolist()
        assert visited == sorted(visited, reverse=True)


# ---- scales


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_search_is_never_worse_than_the_full_range(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(bits)
    normal = torch.randn(256, 32, generator=generator) * 0.02
    heavy = normal / (torch.rand(256, 32, generator=generator) + 0.05)
    one_sided = torch.rand(256, 32, generator=generator) * 0.1 + 0.5
    cost = torch.rand(32, generator=generator) ** 3 + 1e-3
    grid = Grid(bits, 32, symmetric, scale_dtype)
    for weight in (normal, heavy, one_sided):
        scale, zero = group_scales(weight, cost, grid)
        assert torch.equal(scale, scale.to(scale_dtype).float()) and torch.equal(zero, zero.round())
        searched = group_loss(weight, scale, zero, cost, grid)
        full = group_loss(weight, *group_scales(weight, None, grid), cost, grid)
        assert bool((searched <= full * 1.001).all())
        assert float(searched.sum()) <= float(full.sum())


@pytest.mark.parametrize(("bits", "within"), [(2, 1.03), (3, 1.03), (4, 1.06)])
def test_search_against_a_dense_one_symmetric(bits: int, within: float) -> None:
    """1,200 scales of each sign: what is found costs at most a few per cent more, in the mean over groups."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 32, generator=generator) * 0.02
    cost = torch.rand(32, generator=generator) + 0.01
    grid = Grid(bits, 32, True, torch.float32)
    found = group_loss(weight, *group_scales(weight, cost, grid), cost, grid)
    zero, best = torch.full((64,), float(grid.middle)), torch.full((64,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.3, 2.2, 1200):
        for sign in (1.0, -1.0):
            scale = sign * share * weight.abs().amax(1) / grid.middle
            best = torch.minimum(best, group_loss(weight, scale, zero, cost, grid))
    assert float(found.sum()) <= within * float(best.sum())


@pytest.mark.parametrize(("bits", "within"), [(2, 1.15), (3, 1.15), (4, 1.2)])
def test_search_against_a_dense_one_asymmetric(bits: int, within: float) -> None:
    """Every zero point with 300 scales: two free numbers, of which the search tries a line, so it finds a bit less."""
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(64, 32, generator=generator) * 0.02 + 0.01
    cost = torch.rand(32, generator=generator) + 0.01
    grid = Grid(bits, 32, False, torch.float32)
    found = group_loss(weight, *group_scales(weight, cost, grid), cost, grid)
    best = torch.full((64,), torch.inf, dtype=torch.float64)
    for share in torch.linspace(0.3, 1.2, 300):
        scale = share * (weight.amax(1) - weight.amin(1)) / grid.largest_code
        for zero in range(grid.largest_code + 1):
            best = torch.minimum(best, group_loss(weight, scale, torch.full((64,), float(zero)), cost, grid))
    assert float(found.sum()) <= within * float(best.sum())


@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=24),
    bits=st.sampled_from(BITS),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(SCALE_DTYPES),
    zero_minimum=st.sampled_from([0, 1]),
    exponent=st.integers(-6, 3),
)
@settings(deadline=None, max_examples=300)
def test_full_range_clips_nothing(
    values: list[float], bits: int, symmetric: bool, scale_dtype: torch.dtype, zero_minimum: int, exponent: int
) -> None:
    """Half a step is all that a weight loses, and what the stored scale was rounded by at the ends of the range."""
    weight = torch.tensor([values]) * 2.0**exponent
    grid = Grid(bits, -1, symmetric, scale_dtype, zero_minimum)
    scale, zero = group_scales(weight, None, grid)
    assert torch.equal(scale, scale.to(scale_dtype).float()) and bool((scale != 0).all())
    assert bool(((zero >= (grid.middle if symmetric else zero_minimum)) & (zero <= grid.largest_code)).all())
    codes = (torch.round(weight / scale[:, None]) + zero[:, None]).clamp(0, grid.largest_code)
    missed = (weight - dequantize(codes, scale[:, None], zero[:, None])).abs()
    step = scale.abs()[:, None]
    smallest = 2.0**-24 if scale_dtype == torch.float16 else torch.finfo(scale_dtype).tiny
    rounding = grid.largest_code * (torch.finfo(scale_dtype).eps * step + smallest)
    assert bool((missed <= 0.5 * step + rounding).all())


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("clip", CLIPS)
def test_awkward_groups(name: str, clip: Clip) -> None:
    weight, cost = AWKWARD[name], torch.linspace(0.1, 2.0, 32)
    for bits, symmetric, dtype, lowest in itertools.product(BITS, (True, False), SCALE_DTYPES, (0, 1)):
        grid = Grid(bits, 32, symmetric, dtype, lowest)
        found = round_to_nearest(weight, importance(cost, clip), grid)
        values = found.dequantize()
        assert bool(values.isfinite().all()) and bool(found.scale.isfinite().all()) and bool((found.scale != 0).all())
        assert int(found.zero.min()) >= lowest
        if name == "zeros":
            assert bool((values == 0).all())
        elif name in ("constant", "negative constant", "one weight") or (name == "two values" and symmetric):
            torch.testing.assert_close(values, weight, rtol=2.0**-8, atol=0.0)
        elif name == "huge outlier":
            torch.testing.assert_close(values, weight, rtol=0.0, atol=40.0)
        assert float((values - weight).abs().max()) <= float(weight.abs().max()) + 1e-6


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_stored_scales_keep_their_sign_and_are_never_zero(scale_dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, 1e-45, -1e-45, 1e-30, -1e-30, 5.1e-5, -5.1e-5, 0.013, -0.013, 300.0])
    stored = store_scale(scale, Grid(4, 32, True, scale_dtype))
    assert torch.equal(stored, stored.to(scale_dtype).float()) and bool((stored != 0).all())
    assert torch.equal(stored[5:] < 0, scale[5:] < 0)
    torch.testing.assert_close(stored[5:], scale[5:], rtol=2.0**-8, atol=0.0)


# ---- rounding and statistics


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_round_to_nearest_takes_the_nearest_of_all_values(bits: int, symmetric: bool, group_size: int) -> None:
    weight, hessian = problem(7, 96, bits)
    for clip in CLIPS:
        found = round_to_nearest(weight, importance(hessian.diagonal(), clip), Grid(bits, group_size, symmetric))
        width = found.grid.columns_per_group(96)
        scale = found.scale.double().repeat_interleave(width, 1)
        zero = found.zero.double().repeat_interleave(width, 1)
        values = (torch.arange(2**bits) - zero[..., None]) * scale[..., None]  # all that the row may hold
        nearest = (weight.double()[..., None] - values).abs().amin(-1)
        missed = (weight.double() - found.dequantize().double()).abs()
        torch.testing.assert_close(missed, nearest, rtol=1e-5, atol=1e-9)
        for g in range(96 // width):
            part = slice(g * width, (g + 1) * width)
            expected = group_scales(weight[:, part], importance(hessian.diagonal()[part], clip), found.grid)
            assert torch.equal(found.scale[:, g].float(), expected[0])
            assert torch.equal(found.zero[:, g].float(), expected[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 31, 192, 401])
def test_gram_is_the_float64_product_and_symmetric(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    shapes = [(3, 20, width), (1, 7, width), (33, width)]
    batches = [(torch.randn(*shape, generator=generator) * 3 + 1).to(dtype) for shape in shapes]
    found = gram(iter(batches))
    rows = torch.cat([batch.reshape(-1, width) for batch in batches]).double()
    assert found is not None and found.dtype == torch.float32 and torch.equal(found, found.t())
    torch.testing.assert_close(found.double(), rows.t() @ rows, rtol=0.0, atol=2e-6 * float((rows**2).sum(0).max()))
    weights = [torch.rand(batch.shape[:-1], generator=generator) for batch in batches]
    found, counted = gram(iter(batches), weights), torch.cat([weight.flatten() for weight in weights]).double()
    assert found is not None and torch.equal(found, found.t())
    expected = rows.t() @ (rows * counted[:, None])
    torch.testing.assert_close(found.double(), expected, rtol=0.0, atol=2e-6 * float((rows**2).sum(0).max()))


def test_gram_without_batches() -> None:
    assert gram([]) is None
