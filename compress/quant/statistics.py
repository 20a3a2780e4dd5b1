"""Second moments of a linear's inputs, X^T X, which GPTQ calls the Hessian.

bf16 and fp16 products are exact in float32, so inputs are never rounded on the way: on a GPU the matrix units take
16-bit inputs and add in float32, on a CPU the inputs are widened first. Only the upper blocks are computed there.

Shapes: N tokens, I inputs.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

_BLOCK = 192  # columns of an upper block: narrower ones skip more products, and no longer run faster


def gram(inputs: Iterable[Tensor], weights: Iterable[Tensor] | None = None) -> Tensor | None:
    """X^T X over all batches, or X^T diag(w) X.

    Args:
        inputs: batches [..., I] of any float dtype; their leading dimensions are tokens.
        weights: for each batch a weight >= 0 of every token, [...]; None counts all the same.

    Returns:
        float32 [I, I], symmetric; None without batches.
    """
    total: Tensor | None = None
    for batch, weight in zip(inputs, itertools.repeat(None) if weights is None else weights):  # noqa: B905
        x_NI = batch.reshape(-1, batch.shape[-1])
        if weight is not None:
            x_NI = (x_NI * weight.reshape(-1, 1).sqrt()).to(torch.float32 if x_NI.device.type == "cpu" else x_NI.dtype)
        if total is None:
            total = torch.zeros(x_NI.shape[1], x_NI.shape[1], dtype=torch.float32, device=x_NI.device)
        _add(total, x_NI)
    if total is not None:
        upper = total.triu()
        total = upper + upper.t()
        total.diagonal().mul_(0.5)
    return total


def _add(total: Tensor, x_NI: Tensor) -> None:
    """Add the upper triangle of X^T X (and some of the lower one) to `total`."""
    if x_NI.device.type == "cuda" and x_NI.dtype in (torch.bfloat16, torch.float16):
        total += torch.mm(x_NI.t(), x_NI, out_dtype=torch.float32)
        return
    wide = x_NI.float()
    for start in range(0, wide.shape[1], _BLOCK):
        stop = start + _BLOCK
        total[start:stop, start:].addmm_(wide[:, start:stop].t(), wide[:, start:])
