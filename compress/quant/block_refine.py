"""Coordinate descent on a matrix that is on ggml's grids: what GPTQ could not know when it fixed the first columns.

The loss (w - w^) H (w - w^)^T is quadratic in each code, in each multiple of a sub-block and in the d and m of a block.
One after the other they are set to the best that they can be with all others as they are, block by block, in rounds.
Columns that GPTQ rounded before others existed get to answer these; QuantEase (Behdin et al., arXiv 2309.01885) does so
for codes. The product of a block's rows of H with all errors is taken once a round, and kept up to date inside it.

Shapes: O output rows, I input columns, R rows of a part, s sub-blocks, w columns in one.
"""

import torch
from torch import Tensor

from compress.kernels import usable
from compress.kernels.replayed import DIRECTLY, Replays
from compress.model.gguf.block_types import BlockType
from compress.quant.block_scales import divisor, half, to_levels_, within
from compress.quant.blocks import Blocked, level_table, to_codes
from compress.system.parallel import on_cores

_SPAN = 256  # columns whose products with all errors are kept; a multiple of every block's width
_ROWS = 1024  # of a part
_TINY = 1e-30


def refine(
    weight: Tensor, found: Blocked, hessian: Tensor, damp: float, rounds: int, replays: Replays = DIRECTLY
) -> tuple[Blocked, Tensor]:
    """Lower the loss of a quantized matrix.

    Args:
        weight: [O, I], what is aimed at.
        found: near it.
        hessian: float32 [I, I], X^T X of the inputs.
        damp: share of the mean diagonal that is added to the diagonal, a whole one where an input is dead.
        rounds: how often everything is set anew.
        replays: runs the steps of the kernels on a GPU.

    Returns:
        The matrix, and each row's loss under the damped Hessian, float32 [O].
    """
    diagonal = hessian.diagonal()
    damped = hessian + torch.where(diagonal > 0, damp, 1.0).mul(diagonal.mean()).diag()
    work = weight.float().t()
    rows = [slice(first, first + _ROWS) for first in range(0, len(weight), _ROWS)]
    if work.device.type == "cpu":
        parts = on_cores(lambda part: _Descent(work, found, damped, part).run(rounds, replays), rows)
    else:
        parts = [_Descent(work, found, damped, slice(None)).run(rounds, replays)]
    names = ("codes", "d", "m", "scales", "mins")
    joined = {
        name: None if getattr(found, name) is None else torch.cat([getattr(part, name) for part, _ in parts])
        for name in names
    }
    return Blocked(found.type, **joined), torch.cat([loss for _, loss in parts])  # type: ignore[arg-type]


class _Descent:
    """Some rows of a matrix under way: everything float32 [I, R], [S, R] or [s, R]."""

    def __init__(self, work: Tensor, found: Blocked, hessian: Tensor, rows: slice) -> None:
        def turned(numbers: Tensor) -> Tensor:
            return numbers[rows].t().float().contiguous()

        self.kind: BlockType = found.type
        self.hessian = hessian
        self.levels = level_table(self.kind, work.device)[found.codes[rows].t().int()].contiguous()
        self.d = turned(found.d)
        self.m = torch.zeros_like(self.d) if found.m is None else turned(found.m)
        subs = self.d.repeat_interleave(self.kind.sub_blocks, 0)
        self.scale = torch.ones_like(subs) if found.scales is None else turned(found.scales)
        alone = -1.0 if self.kind.has_min else 0.0
        self.minimum = torch.full_like(subs, alone) if found.mins is None else turned(found.mins)
        self.error = work[:, rows] - _values(found, rows)
        self.start, self.pull = 0, self.error
        self.fused = usable(work) and self.kind.uniform
        if self.fused:
            self.error = self.error.contiguous()

    def run(self, rounds: int, replays: Replays) -> tuple[Blocked, Tensor]:
        """The rows after so many rounds, and their losses."""
        width = self.kind.sub_width
        for _ in range(rounds):
            for start in range(0, len(self.error), _SPAN):
                self.start, stop = start, min(start + _SPAN, len(self.error))
                self.pull = self.hessian[start:stop] @ self.error
                if self.fused:
                    self._set_span(slice(start, stop), replays)
                    continue
                for block in range(start // self.kind.width, stop // self.kind.width):
                    for sub in range(block * self.kind.sub_blocks, (block + 1) * self.kind.sub_blocks):
                        part = slice(sub * width, (sub + 1) * width)
                        self._set_codes(part, block, sub)
                        if self.kind.scale_range is not None:
                            self._set_multiples(part, block, sub)
                    self._set_units(slice(block * self.kind.width, (block + 1) * self.kind.width), block)
        loss = (self.error * (self.hessian @ self.error)).sum(0)
        return self._blocked(), loss

    def _pull(self, part: slice) -> Tensor:
        """H (w - w^) of columns in the span."""
        return self.pull[part.start - self.start : part.stop - self.start]

    def _move(self, part: slice, moved: Tensor) -> None:
        """Values of columns in the span have grown by `moved` [n, R]."""
        self.error[part] -= moved
        self._answer(part, moved)

    def _answer(self, part: slice, moved: Tensor) -> None:
        """What that does to H (w - w^) in the span."""
        self.pull.addmm_(self.hessian[self.start : self.start + len(self.pull), part], moved, alpha=-1)

    def _set_span(self, span: slice, replays: Replays) -> None:
        """All of a span by kernels."""
        from compress.kernels.block_refine import SpanNumbers, SpanPull, refine_span  # here, because it imports triton

        blocks, subs = (
            slice(span.start // width, span.stop // width) for width in (self.kind.width, self.kind.sub_width)
        )
        numbers = SpanNumbers(
            self.levels[span], self.error[span], self.d[blocks], self.m[blocks], self.scale[subs], self.minimum[subs]
        )
        given = SpanPull(self.pull, self.hessian[span, span].contiguous())
        replays(refine_span, self.kind, numbers, given)

    def _set_codes(self, part: slice, block: int, sub: int) -> None:
        step = self.d[block] * self.scale[sub]
        inside, levels = self.hessian[part, part], self.levels[part]
        pull, before = self._pull(part).clone(), levels.clone()
        by = divisor(step) * inside.diagonal()[:, None]
        for column in range(len(levels)):
            wanted = torch.addcdiv(levels[column], pull[column], by[column])
            moved = (to_levels_(wanted, self.kind) - levels[column]).mul_(step)
            levels[column] = wanted
            pull[column + 1 :].addr_(inside[column, column + 1 :], moved, alpha=-1)
        self._move(part, (levels - before).mul_(step))

    def _set_multiples(self, part: slice, block: int, sub: int) -> None:
        inside, levels = self.hessian[part, part], self.levels[part]
        cost = ((inside @ levels) * levels).sum(0).clamp_(min=_TINY)
        wanted = self.scale[sub] + (self._pull(part) * levels).sum(0) / cost / divisor(self.d[block])
        moved = within(wanted, self.kind) - self.scale[sub]
        self.scale[sub] += moved
        self._move(part, levels * (moved * self.d[block]))
        if self.kind.has_min:
            wanted = self.minimum[sub] - self._pull(part).sum(0) / inside.sum() / divisor(self.m[block])
            moved = within(wanted, self.kind) - self.minimum[sub]
            self.minimum[sub] += moved
            self._move(part, (-moved * self.m[block]).expand_as(levels))

    def _set_units(self, part: slice, block: int) -> None:
        subs = slice(block * self.kind.sub_blocks, (block + 1) * self.kind.sub_blocks)
        inside, pull = self.hessian[part, part], self._pull(part)
        of_d = self.levels[part] * self.scale[subs].repeat_interleave(self.kind.sub_width, 0)
        costs = inside @ of_d
        dd, towards_d = (costs * of_d).sum(0), (pull * of_d).sum(0)
        if not self.kind.has_min:
            d = half(self.d[block] + torch.where(dd > _TINY, towards_d / dd.clamp(min=_TINY), 0.0))
            self._move(part, of_d * (d - self.d[block]))
            self.d[block] = d
            return
        of_m = -self.minimum[subs].repeat_interleave(self.kind.sub_width, 0)
        mm, towards_m = ((inside @ of_m) * of_m).sum(0), (pull * of_m).sum(0)
        dm = (costs * of_m).sum(0)
        determinant = dd * mm - dm * dm
        good = determinant > 1e-6 * dd * mm
        inverse = torch.where(good, 1 / determinant, 0.0)
        d = half(self.d[block] + torch.where(good, (towards_d * mm - towards_m * dm) * inverse, 0.0))
        m = half(self.m[block] + torch.where(good, (towards_m * dd - towards_d * dm) * inverse, 0.0))
        self._move(part, of_d * (d - self.d[block]) + of_m * (m - self.m[block]))
        self.d[block], self.m[block] = d, m

    def _blocked(self) -> Blocked:
        def turned(numbers: Tensor, dtype: torch.dtype) -> Tensor:
            return numbers.t().to(dtype).contiguous()

        scaled, has_min = self.kind.scale_range is not None, self.kind.has_min
        return Blocked(
            type=self.kind,
            codes=to_codes(self.levels.t(), self.kind).contiguous(),
            d=turned(self.d, torch.float16),
            m=turned(self.m, torch.float16) if has_min else None,
            scales=turned(self.scale, torch.int16) if scaled else None,
            mins=turned(self.minimum, torch.int16) if scaled and has_min else None,
        )


def _values(found: Blocked, rows: slice) -> Tensor:
    """Values [I, R] of some rows."""
    parts = (None if each is None else each[rows] for each in (found.m, found.scales, found.mins))
    return Blocked(found.type, found.codes[rows], found.d[rows], *parts).dequantize().t()
