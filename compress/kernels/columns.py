"""The column loop of GPTQ as one kernel: rows in parallel, columns one after another, all errors fed back on the way.

The twin is `compress.quant.gptq._quantize_group`, whose arithmetic is followed step by step: a target gets the errors
of each earlier run of 16 columns as one sum, those of its own run one at a time, always in the order of the columns;
quotients are rounded as IEEE 754 asks. On one device the codes are the twin's, bit for bit, unless cuBLAS adds up one
of the twin's products in another order: then fewer than one row in a thousand had a tie that fell the other way.

The errors of earlier columns reach half a run as a tile, by several warps. Inside that half a thread owns a row and the
columns are registers of their own (a tuple, unrolled when compiled): a tile could not be indexed by a column without a
reduction. What both sides need passes through memory, which for so little is the cache. A whole run unrolled would be
no faster, and takes several times as long to compile.

Shapes: O rows of the matrix (the fast axis in memory), w columns of the block.
"""

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # the matrices of an 8B model have few rows for a GPU, so that programs should be many
_MANY_ROWS = 8192  # with as many, every processor has enough programs, and several warps in each only repeat work
_POINTERS = ["work", "fed", "codes", "feedback", "pivot", "scale", "zero", "loss"]
_NUMBERS = ["rows", "largest"]


def quantize_columns(
    work: Tensor,
    fed: Tensor,
    feedback: Tensor,
    pivot: Tensor,
    scale: Tensor,
    zero: Tensor,
    largest_code: int,
    codes: Tensor,
    loss: Tensor,
) -> None:
    """Quantize the columns of one block that share a scale.

    Args:
        work: float32 [w, O], contiguous: the weights; their errors w - w^ when it returns.
        fed: float32 [w, O], contiguous: feedback of all columns before the block; overwritten.
        feedback: float32 [w, w], contiguous: F of the block.
        pivot: float32 [w].
        scale: float32 [O]; where it is 0, all levels stand for nothing.
        zero: float32 [O], whole numbers.
        largest_code: 2**bits - 1.
        codes: uint8 [w, O], contiguous; filled.
        loss: float32 [O]; each row's loss is added.
    """
    width, rows = work.shape
    assert all(tensor.is_contiguous() for tensor in (work, fed, feedback, codes))
    _columns[(triton.cdiv(rows, _ROWS),)](
        work, fed, codes, feedback, pivot, scale.contiguous(), zero.contiguous(), loss,
        rows, float(largest_code), WIDTH=width, EVEN=width % 16 == 0, RUN=16, HALF=8,
        ROWS=_ROWS, num_warps=4 if rows < _MANY_ROWS else 1, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=_POINTERS)
def _columns(
    work, fed, codes, feedback, pivot, scale, zero, loss,
    rows, largest, WIDTH: tl.constexpr, EVEN: tl.constexpr, RUN: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    step = _not_zero(tl.load(scale + row, mask=inside, other=1.0))
    offset = tl.load(zero + row, mask=inside, other=0.0)
    lost = tl.load(loss + row, mask=inside, other=0.0)
    of_half = tl.arange(0, HALF)
    for start in range(0, WIDTH, RUN):
        for first in range(start, start + RUN, HALF):
            exists = (first + of_half < WIDTH) | EVEN
            tile = row[None, :] + (first + of_half)[:, None] * rows
            mask = inside[None, :] & exists[:, None]
            target = tl.load(work + tile, mask=mask, other=0.0) + tl.load(fed + tile, mask=mask, other=0.0)
            for before in range(0, start, RUN):
                total = tl.zeros([HALF, ROWS], tl.float32)
                for k in tl.static_range(RUN):
                    error = tl.load(work + row + (before + k) * rows, mask=inside, other=0.0)
                    factor = tl.load(feedback + (before + k) * WIDTH + first + of_half, mask=exists, other=0.0)
                    total = tl.fma(factor[:, None], error[None, :], total)
                target += total
            for k in range(start, first):  # the half before, of the same run
                error = tl.load(work + row + k * rows, mask=inside, other=0.0)
                factor = tl.load(feedback + k * WIDTH + first + of_half, mask=exists, other=0.0)
                target = tl.fma(factor[:, None], error[None, :], target)
            tl.store(fed + tile, target, mask=mask)
            factors = ()  # all that the columns below load is loaded here: none of it waits behind a division
            weights = ()
            costs = ()
            for c in tl.static_range(HALF):
                there = EVEN or first + c < WIDTH
                for k in tl.static_range(c):
                    factors += (tl.load(feedback + (first + k) * WIDTH + first + c, mask=there, other=0.0),)
                weights += (tl.load(work + row + (first + c) * rows, mask=inside & there, other=0.0),)
                costs += (tl.load(pivot + first + c, mask=there, other=0.0),)
            tl.debug_barrier()  # the targets are read back as columns
            targets = ()
            for c in tl.static_range(HALF):
                there = EVEN or first + c < WIDTH
                targets += (tl.load(fed + row + (first + c) * rows, mask=inside & there, other=0.0),)
            errors = ()
            levels = ()
            for c in tl.static_range(HALF):
                target = targets[c]
                for k in tl.static_range(c):
                    target = tl.fma(errors[k], factors[c * (c - 1) // 2 + k], target)
                level = _nearest(tl.minimum(tl.maximum(tl.div_rn(target, step), -offset), largest - offset))
                errors += (tl.fma(-level, step, weights[c]),)
                levels += (level,)
                missed = tl.fma(-level, step, target)
                lost += costs[c] * (missed * missed)
            for c in tl.static_range(HALF):
                there = inside & (EVEN or first + c < WIDTH)
                at = row + (first + c) * rows
                tl.store(work + at, errors[c], mask=there)
                tl.store(codes + at, (levels[c] + offset).to(tl.uint8), mask=there)
            tl.debug_barrier()  # so are the errors
    tl.store(loss + row, lost, mask=inside)


@triton.jit
def _not_zero(step):
    """A step that can be divided by; those of ggml's blocks may be 0, and are multiples of 2**-24 else."""
    return tl.where(step == 0.0, 1e-30, step)


@triton.jit
def _nearest(number):
    """The nearest whole number, ties to even, of |number| < 2**22: 1.5 * 2**23 leaves no place for a fraction."""
    return (number + 12582912.0) - 12582912.0
