"""Quantization error propagation: weights are moved so that a linear gives what the original model's gave.

The linears quantized so far have changed a linear's inputs from X0 to X, and the residual stream that its output is
added to from R0 to R. Plain GPTQ asks for W X. The best float weights for what is wanted instead,

    W' = argmin |W' X + R - W X0 - R0|^2 = W + (W (X0 - X) + (R0 - R)) X^T (X X^T)^-1,

are the target here, approached by a share, because they also fit the calibration text's noise. The first term and the
share are those of QEP (Arai and Ichikawa, arXiv 2504.09629), whose recipe key is `drift_correction` here; the second,
for linears that write to the residual stream, is ours. GPTAQ (Li et al., arXiv 2504.02692) corrects column by column
for the first term; the closed form needs no change in the solver.

Shapes: N tokens, I inputs, O outputs.
"""

import torch
from torch import Tensor

from compress.quant.statistics import add_product

_DAMP = 0.1  # of the mean diagonal: the correction is least trusted where the inputs hardly vary


class PropagatedError:
    """Sums over the calibration tokens that say how far what surrounds a linear has moved.

    Args:
        writer: weight [O, I] of the linear, where its output is added to the residual stream as it is. None for any
            number of others with one input.
        original: weight [O, I0] of the original's linear, where it is another one.
    """

    def __init__(self, writer: Tensor | None = None, original: Tensor | None = None) -> None:
        self._writer, self._original = writer, original
        self._total: Tensor | None = None  # of missing outputs [O, I] of a writer, of missing inputs [I, I] of others

    def add(
        self,
        inputs: Tensor,
        original: Tensor,
        weight: Tensor | None,
        residual: tuple[Tensor, Tensor] | None,
        target: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            inputs: X [..., I]; the leading dimensions are tokens.
            original: X0 [..., I].
            weight: a weight >= 0 of every token, [...]; None counts all the same.
            residual: R and R0 [..., O], in front of a writer.
            target: what a writer and R should add up to, [..., O], instead of W X0 + R0.
        """
        missing = self._missing(inputs, original, residual, target)
        if missing is None:
            return
        root_N1 = None if weight is None else weight.reshape(-1, 1).sqrt().to(inputs.dtype)
        self._total = add_product(self._total, _weighed(missing, root_N1), _weighed(inputs, root_N1))

    def _missing(
        self, inputs: Tensor, original: Tensor, residual: tuple[Tensor, Tensor] | None, target: Tensor | None
    ) -> Tensor | None:
        """What the inputs lack, or a writer's output; None of inputs that are not of one width."""
        if self._writer is None:
            return original - inputs if original.shape == inputs.shape else None
        transposed = self._writer.t().to(inputs.dtype)
        if target is not None and residual is not None:
            return target - residual[0] - inputs @ transposed
        if self._original is None:
            missing = (original - inputs) @ transposed
        else:
            missing = original @ self._original.t().to(original.dtype) - inputs @ transposed
        if residual is not None:
            missing += residual[1] - residual[0]
        return missing

    def total(self) -> Tensor | None:
        """What was added up, to be summed in place over parts of the calibration."""
        return self._total

    def clear(self) -> None:
        """Give the sums' memory back; nothing is corrected afterwards."""
        self._total = None

    def correct(self, weight: Tensor, hessian: Tensor, share: float, rows: Tensor | slice = slice(None)) -> Tensor:
        """The weights to quantize.

        Args:
            weight: float32 [O, I].
            hessian: X^T X, float32 [I, I], over the same tokens and weights.
            share: of the way to W'.
            rows: which of a writer's rows `weight` holds.

        Returns:
            Float32 [O, I]; not finite where the original's inputs are not. `weight` itself where the Hessian is not
            positive definite, which the solver has ways to repair.
        """
        if self._total is None:
            return weight
        wanted = weight @ self._total if self._writer is None else self._total[rows]
        damped = hessian.clone()
        damped.diagonal().add_((_DAMP * hessian.diagonal().mean()).clamp(min=torch.finfo(torch.float32).tiny))
        lower, failed = torch.linalg.cholesky_ex(damped)  # asking here whether it failed would wait for the device
        return torch.where(failed == 0, weight + share * torch.cholesky_solve(wanted.t(), lower).t(), weight)


def _weighed(batch: Tensor, root_N1: Tensor | None) -> Tensor:
    """Rows times the roots of their weights, on both sides of a product: whole ones may be too much for float16."""
    rows = batch.flatten(0, -2)
    return rows if root_N1 is None else rows * root_N1
