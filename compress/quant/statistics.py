"""Second moments of a linear's inputs, X^T X, which GPTQ calls the Hessian.

bf16 and fp16 products are exact in float32, so inputs are never rounded on the way: on a GPU the matrix units take
16-bit inputs and add in float32, on a CPU the inputs are widened first. Only the upper blocks are computed.

Shapes: N tokens, I inputs.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK = {"cpu": 192, "cuda": 2048}  # columns of an upper block: narrower ones skip more products and run slower


class Gram:
    """X^T X, or X^T diag(w) X, added up batch by batch."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def add(self, batch: Tensor, weight: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            batch: [..., I] of any float dtype; the leading dimensions are tokens.
            weight: a weight >= 0 of every token, [...]; None counts all the same.
        """
        x_NI = batch.reshape(-1, batch.shape[-1])
        if weight is not None:
            x_NI = (x_NI * weight.reshape(-1, 1).sqrt()).to(torch.float32 if x_NI.device.type == "cpu" else x_NI.dtype)
        if self._sum is None:
            dtype = torch.promote_types(x_NI.dtype, torch.float32)
            self._sum = torch.zeros(x_NI.shape[1], x_NI.shape[1], dtype=dtype, device=x_NI.device)
        sixteen = x_NI.dtype in (torch.bfloat16, torch.float16)
        on_matrix_units = sixteen and x_NI.device.type == "cuda"
        x_NI = x_NI if on_matrix_units else x_NI.to(self._sum.dtype)
        block = _BLOCK[x_NI.device.type]
        for start in range(0, x_NI.shape[1], block):  # the upper triangle, and some of the lower one
            part = self._sum[start : start + block, start:]
            left_NB, right_NI = x_NI[:, start : start + block], x_NI[:, start:]
            if on_matrix_units:
                torch.addmm(part, left_NB.t(), right_NI, out_dtype=torch.float32, out=part)
            else:
                part.addmm_(left_NB.t(), right_NI)

    def total(self) -> Tensor | None:
        """float32 (float64 of float64) [I, I], symmetric; None without batches. Nothing may be added afterwards."""
        if self._sum is None:
            return None
        for start in range(0, self._sum.shape[0], 1024):  # the lower triangle from the upper one, in place
            rows = self._sum[start : start + 1024]
            rows[:, :start].copy_(self._sum[:start, start : start + 1024].t())
            square = rows[:, start : start + 1024]
            square.copy_(square.triu() + square.triu(1).t())
        return self._sum


def gram(inputs: Iterable[Tensor], weights: Iterable[Tensor | None] = itertools.repeat(None)) -> Tensor | None:
    """`Gram` of all batches and, where given, their weights."""
    added = Gram()
    for batch, weight in zip(inputs, weights, strict=False):
        added.add(batch, weight)
    return added.total()


def add_product(total: Tensor | None, left_NA: Tensor, right_NB: Tensor) -> Tensor:
    """Total + left^T right in float32 (float64 of float64), without rounding 16-bit factors further."""
    dtype = torch.promote_types(left_NA.dtype, torch.float32)
    if total is None:
        total = torch.zeros(left_NA.shape[1], right_NB.shape[1], dtype=dtype, device=left_NA.device)
    if left_NA.is_cuda and left_NA.dtype in (torch.bfloat16, torch.float16):
        return torch.addmm(total, left_NA.t(), right_NB, out_dtype=torch.float32, out=total)
    return total.addmm_(left_NA.to(dtype).t(), right_NB.to(dtype))
