"""Removal orders against plain least squares, solved anew for every set of columns that could be gone."""

from collections.abc import Collection

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.prune.importance import InputStatistics, by_unit, down_date, greedy_order

DAMP = 0.1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs [N, I] that say much of each other, of different sizes."""
    mix = draw(columns, columns, seed=seed + 1) + 2 * torch.eye(columns)
    return draw(tokens, columns, seed=seed) @ mix * torch.logspace(-1, 1, columns, dtype=torch.float64)


class Problem:
    """Least squares in float64, with the damping as rows of its own.

    Args:
        inputs: X [N, I].
        weight: W [O, I].
        damp: share of each input's energy.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, damp: float = DAMP) -> None:
        energy = inputs.square().sum(0)
        self.weight, self.hessian, self.damp = weight, inputs.t() @ inputs, damp
        self.rows = torch.cat([inputs, (damp * energy + 1e-9 * energy.mean()).sqrt().diag()])
        self.wanted = self.rows @ weight.t()

    def loss(self, gone: Collection[int]) -> float:
        """Of the best weights that are zero in these columns."""
        stays = [column for column in range(self.rows.shape[1]) if column not in gone]
        solved = torch.linalg.lstsq(self.rows[:, stays], self.wanted).solution
        return float((self.rows[:, stays] @ solved - self.wanted).square().sum())

    def order(self, width: int = 1, quota: int = 0) -> tuple[list[int], list[float]]:
        order, losses = greedy_order(self.weight, self.hessian, self.damp, width, quota)
        return order.tolist(), losses.tolist()


def columns(units: Collection[int], width: int) -> list[int]:
    return [unit * width + column for unit in units for column in range(width)]


@pytest.mark.parametrize(("width", "quota"), [(3, 0), (8, 0), (1, 2), (4, 1), (4, 2), (4, 3), (4, 6)])
def test_every_step_removes_the_cheapest_of_those_that_may_go(width: int, quota: int) -> None:
    units = 24 if width == 1 else 6
    problem = Problem(correlated(200, units * width), draw(10, units * width, seed=7))
    order, losses = problem.order(width, quota)
    assert sorted(order) == list(range(units))
    before = 0.0
    for step, (unit, loss) in enumerate(zip(order, losses, strict=True)):
        left = order[step:]
        if quota:  # a round takes one unit of every neighbourhood
            places = units // quota
            begun = step - step % places
            assert {each // quota for each in order[begun : begun + places]} == set(range(places))
            left = [each for each in left if each // quota not in {gone // quota for gone in order[begun:step]}]
        costs = {each: problem.loss(columns([*order[:step], each], width)) - before for each in left}
        assert loss == pytest.approx(costs[unit], rel=1e-6)
        assert costs[unit] == pytest.approx(min(costs.values()), rel=1e-9)
        before += costs[unit]


def one_by_one(problem: Problem) -> list[float]:
    """What is lost after each column where the cheapest goes and all others are solved anew, in float64."""
    weight, inverse = problem.weight.clone(), torch.linalg.inv(problem.rows.t() @ problem.rows)
    left, lost = torch.ones(len(inverse), dtype=torch.bool), []
    while left.any():
        costs = (weight.square().sum(0) / inverse.diagonal()).masked_fill(~left, torch.inf)
        worst = int(costs.argmin())
        lost.append(float(costs[worst]) + (lost[-1] if lost else 0.0))
        left[worst] = False
        moves = inverse[worst] / inverse[worst, worst]
        weight = weight - weight[:, worst : worst + 1] * moves
        inverse = inverse - torch.outer(inverse[:, worst], moves)
        inverse.diagonal()[~left] = 1.0
    return lost


@pytest.mark.parametrize(("size", "seed"), [(24, 1), (24, 2), (150, 0), (150, 1), (150, 2)])
def test_columns_in_blocks_lose_hardly_more_than_one_by_one(size: int, seed: int) -> None:
    problem = Problem(correlated(2 * size, size, seed), draw(10, size, seed=7 + seed))
    (order, losses), expected = problem.order(), one_by_one(problem)
    assert sorted(order) == list(range(size))
    assert losses[0] == pytest.approx(expected[0]) == pytest.approx(problem.loss(order[:1]))
    for gone in (size // 8, size // 4, size // 2, 3 * size // 4):
        assert problem.loss(order[:gone]) < 1.1 * expected[gone - 1], gone
    assert expected[-1] == pytest.approx(problem.loss(order)) == pytest.approx(float(problem.wanted.square().sum()))


@pytest.mark.parametrize(("width", "units", "double"), [(1, 160, 40), (8, 12, 4)])
def test_of_two_that_say_the_same_one_goes_before_all_others(width: int, units: int, double: int) -> None:
    """The last ones read what the first ones read, and have weights of their own."""
    single = correlated(400, (units - double) * width)
    inputs = torch.cat([single, single[:, : double * width]], 1)
    order, losses = Problem(inputs, draw(10, units * width, seed=7), damp=1e-9).order(width)
    pairs = [{number, units - double + number} for number in range(double)]
    assert [len(pair & set(order[:double])) for pair in pairs] == [1] * double
    assert max(losses[:double]) < min(losses[double:])


def test_inputs_that_were_always_zero_go_first() -> None:
    inputs = correlated(200, 24)
    inputs[:, [3, 11, 20]] = 0
    order, losses = Problem(inputs, 100 * draw(10, 24, seed=7)).order()
    assert set(order[:3]) == {3, 11, 20}
    assert max(losses[:3]) < 1e-6 * min(losses[3:])


@settings(deadline=None, max_examples=40)
@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=16),
    outputs=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_what_is_left_is_solved_anew(kept: list[bool], outputs: int, seed: int) -> None:
    """W' = W H[:, K] H_KK^-1, and the inverse of H_KK."""
    stays, size = torch.tensor(kept), len(kept)
    inputs, weight = draw(3 * size, size, seed=seed), draw(outputs, size, seed=seed + 1)
    hessian = inputs.t() @ inputs + 0.1 * torch.eye(size)
    left, inverse = down_date(weight, torch.linalg.inv(hessian), stays)
    expected = torch.linalg.inv(hessian[stays][:, stays])
    assert torch.allclose(inverse, expected, rtol=1e-8, atol=1e-10)
    assert torch.allclose(left, weight @ hessian[:, stays] @ expected, rtol=1e-8, atol=1e-10)


def test_statistics_of_inputs_over_batches() -> None:
    batches = [draw(3, 10, 8, seed=seed).float() * torch.arange(1, 9) + 5 for seed in (0, 1)]
    batches.append(draw(1, 4, 8, seed=2).bfloat16())
    statistics = InputStatistics()
    for batch in batches[:2]:
        statistics.add(batch)
    statistics.add(batches[2][0])  # [N, I], as the MLP of OPT reads it
    sequences = [sequence.double() for batch in batches for sequence in batch]
    activation = sum(sequence.abs().mean(0) ** 2 for sequence in sequences) ** 0.5
    assert torch.allclose(statistics.activation().double(), torch.as_tensor(activation), rtol=1e-5)
    variance = torch.cat(sequences).var(0, correction=0)
    assert torch.allclose(statistics.variance().double(), variance, rtol=1e-4)


def test_an_input_that_never_varies_has_no_variance() -> None:
    statistics = InputStatistics()
    statistics.add(torch.full((2, 7, 3), 0.1))
    assert float(statistics.variance().min()) >= 0
    assert float(statistics.variance().max()) < 1e-8


def test_units_are_scored_by_the_root_of_their_sum_of_squares() -> None:
    scores = torch.tensor([3.0, 4.0, 0.0, 0.0, 5.0, 12.0])
    assert by_unit(scores, 2).tolist() == [5.0, 0.0, 13.0]
