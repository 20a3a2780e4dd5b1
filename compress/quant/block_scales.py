"""Scales of ggml's blocks: a search for the least weighted rounding error.

Ranges are tried, the codes that each gives are kept, and step and offset are fitted to them in closed form (weighted
least squares), as llama.cpp's `make_qkx3_quants` does it. What follows is other than there: a block's d and m and the
whole numbers that its sub-blocks multiply them with are chosen together, by what rounding these costs, and d and m are
fitted to all codes of the block. After the codes all of it works on their moments, a few numbers for each sub-block.

Shapes: R rows, the fast axis in memory; s sub-blocks; w columns in one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from compress.kernels import usable
from compress.model.gguf.block_types import BlockType
from compress.quant.blocks import level_middles, level_table

_TINY = 1e-30
_LARGEST = 65504.0  # of float16
_ENDS = (-0.2, 0.2, 0.6)  # tried with minima: how many steps either end of the range is moved inwards
_LONGER = (-1.0, -0.6, -0.2, 0.2, 0.6, 1.0)  # tried without: how many steps the range is longer than the extreme weight
_SUB_ENDS = (-0.1, 0.4)  # of sub-blocks, whose minima are coarse
_FEW_ENDS, _FEW_LONGER = (0.1,), (-0.8, 0.0, 0.8)  # enough where only d and m are wanted
_CURVE_STEP = 14.0  # between neighbouring levels of the curve, about
_SHARES = tuple(1 - 0.04 * n for n in range(6))  # tried: of the largest multiple, for the extreme one


class Units(NamedTuple):
    """d and m of a block, float32 [R], exact in float16; m is 0 in types without minima."""

    d: Tensor
    m: Tensor


class Multiples(NamedTuple):
    """Whole numbers that sub-blocks multiply d and m with, float32 [s, R]: 1 and -1 in blocks without sub-blocks."""

    scale: Tensor
    minimum: Tensor


class Steps(NamedTuple):
    """What levels are multiplied with, and what is added then, float32 [s, R]."""

    step: Tensor
    offset: Tensor


def steps_of(units: Units, multiples: Multiples) -> Steps:
    """The steps of sub-blocks."""
    return Steps(units.d * multiples.scale, -units.m * multiples.minimum)


def to_levels_(scaled: Tensor, kind: BlockType) -> Tensor:
    """Weights divided by their step become the nearest levels, in place (float32, contiguous)."""
    if kind.uniform:
        return scaled.round_().clamp_(kind.levels[0], kind.levels[-1])
    places = torch.bucketize(scaled, level_middles(kind, scaled.device))
    return scaled.copy_(level_table(kind, scaled.device)[places])


def nearest_levels(weight: Tensor, steps: Steps, kind: BlockType) -> Tensor:
    """Levels, float32 [..., s, w, R], of weights [s, w, R] for steps [..., s, R]."""
    moved = weight - steps.offset[..., None, :] if kind.has_min else weight
    return to_levels_(moved / divisor(steps.step)[..., None, :], kind)


def divisor(step: Tensor) -> Tensor:
    """Steps that can be divided by."""
    return torch.where(step.abs() < _TINY, _TINY, step)


def block_units(weight: Tensor, importance: Tensor, kind: BlockType) -> Units:
    """The units d and m of a block.

    Args:
        weight: float32 [s, w, R].
        importance: float32 [s, w], the cost of a squared error in each column.
        kind: of the block.
    """
    if usable(weight) and kind.uniform:
        return _fused_units(weight, importance, kind)
    group = _Group(weight, importance, kind)
    if kind.scale_range is None:
        step, offset = _search(group, _ENDS, _LONGER).fit()
        return Units(half(step[0]), half(offset[0]))
    units, multiples = _search(group, _FEW_ENDS, _FEW_LONGER).plan()
    moments = group.moments(steps_of(units, multiples))
    units = moments.fit_units(units, multiples)
    return moments.fit_units(units, moments.fit_multiples(units))


def _fused_units(weight: Tensor, importance: Tensor, kind: BlockType) -> Units:
    """`block_units` by kernels."""
    from compress.kernels import block_scales as fused  # here, because it imports triton

    if kind.scale_range is None:
        return Units(*fused.plain_units(weight, importance, kind, fused.ranges(kind, _ENDS, _LONGER, weight.device)))
    tried = fused.ranges(kind, _FEW_ENDS, _FEW_LONGER, weight.device)
    return Units(*fused.block_units(weight, importance, kind, tried, _unit_shares(kind, weight.device)))


@cache
def _unit_shares(kind: BlockType, device: torch.device) -> Tensor:
    """What an extreme number is divided by to get the units that are tried, float32; not to be changed."""
    return torch.tensor([_longest(kind) * share for share in _SHARES], dtype=torch.float32, device=device)


def sub_multiples(
    weight: Tensor, importance: Tensor, units: Units, kind: BlockType, thorough: bool = False
) -> Multiples:
    """Multiples of sub-blocks, whose weights may have moved since their block's d and m were chosen.

    Args:
        weight: float32 [s, w, R].
        importance: float32 [s, w].
        units: of their block.
        kind: of the block.
        thorough: take twice the time for 1 or 2 % less loss.
    """
    if kind.scale_range is None:
        one = weight.new_ones(len(weight), weight.shape[2])
        return Multiples(one, -one)
    ends = _ENDS if thorough else _SUB_ENDS
    if usable(weight) and kind.uniform:
        from compress.kernels import block_scales as fused  # here, because it imports triton

        tried = fused.ranges(kind, ends, _LONGER, weight.device)
        return Multiples(*fused.sub_multiples(weight, importance, units, kind, tried))
    return _search(_Group(weight, importance, kind), ends, _LONGER).fit_multiples(units)


def refit_units(weight: Tensor, importance: Tensor, units: Units, multiples: Multiples, kind: BlockType) -> Units:
    """The best units for these multiples of a block, float32 [s, w, R], and the nearest codes; arguments as above."""
    return _Group(weight, importance, kind).moments(steps_of(units, multiples)).fit_units(units, multiples)


class _Sums(NamedTuple):
    """Weighted sums over the columns of sub-blocks: of ones [s, 1], of the weights and of their squares [s, R]."""

    one: Tensor
    x: Tensor
    xx: Tensor


@dataclass(frozen=True)
class _Moments:
    """Weighted sums over the columns of sub-blocks that belong to codes, each [s, R], of weights x and levels q."""

    kind: BlockType
    sums: _Sums
    q: Tensor
    xq: Tensor
    qq: Tensor

    def loss(self, steps: Steps) -> Tensor:
        """Sum of w (x - step q - offset)^2, of each sub-block."""
        step, offset = steps
        loss = self.sums.xx - 2 * step * self.xq + step.square() * self.qq
        if self.kind.has_min:
            loss += offset * (offset * self.sums.one + 2 * step * self.q - 2 * self.sums.x)
        return loss

    @cached_property
    def spread(self) -> Tensor:
        """What a squared error in the step costs, once the offset has made up for it."""
        return self.qq - self.q.square() / self.sums.one if self.kind.has_min else self.qq

    def step_alone(self) -> Tensor:
        """The best step without an offset."""
        return self.xq / self.qq.clamp(min=_TINY)

    def step_with_offset(self) -> Tensor:
        """The best step, where the offset makes up for what it can."""
        covariance = self.xq - self.sums.x * self.q / self.sums.one
        return torch.where(self.spread > 1e-6 * self.qq, covariance / self.spread, self.step_alone())

    def offset(self, step: Tensor) -> Tensor:
        """The best offset beside a step."""
        return (self.sums.x - step * self.q) / self.sums.one

    def fit(self) -> Steps:
        """The best steps; where minima are multiples of m, no offset is above zero."""
        if not self.kind.has_min:
            step = self.step_alone()
            return Steps(step, torch.zeros_like(step))
        step = self.step_with_offset()
        offset = self.offset(step)
        if self.kind.scale_range is None:
            return Steps(step, offset)
        above = (offset > 0) | (step < 0)
        return Steps(torch.where(above, self.step_alone().clamp(min=0), step), torch.where(above, 0.0, offset))

    def plan(self) -> tuple[Units, Multiples]:
        """The first units and multiples, near the best steps for these codes."""
        step = self.fit().step
        d, scale = _common_unit(step, self.spread, self.kind)
        if not self.kind.has_min:
            return Units(d, torch.zeros_like(d)), Multiples(scale, torch.zeros_like(scale))
        m, minimum = _common_unit(-self.offset(d * scale).clamp(max=0), self.sums.one.expand_as(step), self.kind)
        return Units(d, m), Multiples(scale, minimum)

    def fit_units(self, units: Units, multiples: Multiples) -> Units:
        """The best units for these codes and multiples; those given where nothing decides."""
        scale, minimum = multiples
        qq, xq = (scale.square() * self.qq).sum(0), (scale * self.xq).sum(0)
        alone = torch.where(qq > _TINY, xq / qq.clamp(min=_TINY), units.d)
        if not self.kind.has_min:
            return Units(half(alone), units.m)
        one, x = (minimum.square() * self.sums.one).sum(0), -(minimum * self.sums.x).sum(0)
        q = -(scale * minimum * self.q).sum(0)
        determinant = qq * one - q * q
        both = determinant > 1e-6 * qq * one
        inverse = 1 / torch.where(both, determinant, 1.0)
        d = torch.where(both, (xq * one - x * q) * inverse, alone)
        m = torch.where(both, (x * qq - xq * q) * inverse, units.m)
        return Units(half(d), half(m))

    def fit_multiples(self, units: Units) -> Multiples:
        """The best multiples for these codes and units, one after the other."""
        scale = within(self.fit().step / divisor(units.d), self.kind)
        if not self.kind.has_min:
            return Multiples(scale, torch.zeros_like(scale))
        return Multiples(scale, within(-self.offset(units.d * scale) / divisor(units.m), self.kind))


class _Group:
    """Weights [s, w, R] of sub-blocks, and what an error in each column costs, [s, w]: all the same if nothing."""

    def __init__(self, weight: Tensor, importance: Tensor, kind: BlockType) -> None:
        importance = torch.where(importance.sum(1, keepdim=True) > 0, importance, 1.0)
        self.weight, self.importance, self.kind = weight, importance[:, None], kind
        self._weighted = weight * importance[..., None]
        one = importance.sum(1, keepdim=True)
        self.sums = _Sums(one, self._weighted.sum(1), (self._weighted * weight).sum(1))

    def moments(self, steps: Steps) -> _Moments:
        """Of the nearest codes."""
        levels = nearest_levels(self.weight, steps, self.kind)
        xq = (self._weighted * levels).sum(-2)
        q = (self.importance @ levels)[..., 0, :] if self.kind.has_min else xq  # not asked for without minima
        return _Moments(self.kind, self.sums, q, xq, (self.importance @ levels.square_())[..., 0, :])


def _search(group: _Group, ends: tuple[float, ...], longer: tuple[float, ...]) -> _Moments:
    """Moments of the codes that are best for each sub-block by itself."""
    kind = group.kind
    low, high = group.weight.amin(1), group.weight.amax(1)
    if kind.has_min:
        if kind.scale_range is not None:
            low, high = low.clamp(max=0), high.clamp(min=0)
        steps = kind.levels[-1] - kind.levels[0]
        inch = (high - low) / steps
        tries = [Steps(inch * ((steps - a - b) / steps), low + a * inch) for a in ends for b in ends]
    else:
        extreme, longest = torch.maximum(high, -low), -kind.levels[0]
        zero, more_by = torch.zeros_like(low), 1.0 if kind.uniform else _CURVE_STEP
        tries = [Steps(sign * extreme / (longest + more * more_by), zero) for more in longer for sign in (1, -1)]
    first = Steps(*(torch.stack(each) for each in zip(*tries, strict=True)))
    moments = group.moments(first)
    losses = moments.loss(moments.fit())
    best = losses.argmin(0, keepdim=True)
    q, xq, qq = (each.gather(0, best)[0] for each in (moments.q, moments.xq, moments.qq))
    moments = _Moments(kind, group.sums, q, xq, qq)
    again = group.moments(moments.fit())
    better = again.loss(again.fit()) < losses.gather(0, best)[0]
    codes = (torch.where(better, *each) for each in ((again.q, q), (again.xq, xq), (again.qq, qq)))
    return _Moments(kind, group.sums, *codes)


def _common_unit(wanted: Tensor, cost: Tensor, kind: BlockType) -> tuple[Tensor, ...]:
    """A float16 number and its whole multiples that lie nearest to what is wanted.

    Args:
        wanted: float32 [s, R].
        cost: of a squared error in each, [s, R].
        kind: says how large multiples may be.

    Returns:
        The number, float32 [R], and the multiples, [s, R].
    """
    longest = _longest(kind)
    extreme = wanted.gather(0, wanted.abs().argmax(0, keepdim=True))[0] * (-1 if _limits(kind)[0] < 0 else 1)
    found = []
    for share in _SHARES:
        unit = half(extreme / (longest * share))
        times = within(wanted / divisor(unit), kind)
        found.append(((cost * (wanted - unit * times).square()).sum(0), unit, times))
    return _least(found)[1:]


def _limits(kind: BlockType) -> tuple[int, int]:
    assert kind.scale_range is not None
    return kind.scale_range


def _longest(kind: BlockType) -> int:
    """How large a multiple may be, on the side where it may be larger."""
    low, high = _limits(kind)
    return max(-low, high)


def within(number: Tensor, kind: BlockType) -> Tensor:
    """The nearest whole number that a multiple may be."""
    return number.round().clamp_(*_limits(kind))


def half(number: Tensor) -> Tensor:
    """Float32 numbers as float16 has them, inside its range."""
    return number.clamp(-_LARGEST, _LARGEST).half().float()


def _least(tries: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The one with the least loss, which comes first in each, element by element or row by row; the first of equals."""
    remaining = iter(tries)
    best = tuple(next(remaining))
    for found in remaining:
        better = found[0] < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
    return best
