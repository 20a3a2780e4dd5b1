"""The fused losses' Triton kernel beside its plain-torch twin, on a CPU in Triton's interpreter.

test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1: the variable is read when triton is
imported and holds for the process.
"""

import os
from typing import Any

import pytest
import torch
from dense_losses import WEIGHTS
from torch import Tensor

from compress.kernels import divergence as kernels
from compress.train.losses import fused

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_interpreted.py"

HEADS: dict[str, Any] = {
    "plain": ((1.0, None), (1.0, None)),
    "scale": ((0.25, None), (2.0, None)),
    "softcap": ((1.5, 5.0), (1.0, None)),
    "both softcap": ((1.0, 8.0), (0.5, 3.0)),
}


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", 64)


def raw(rows: int, width: int, seed: int) -> Tensor:
    """Logits [rows, width] in memory with longer rows."""
    return (torch.randn(rows, width + 5, generator=torch.Generator().manual_seed(seed)) * 3)[:, :width]


def both(case: tuple[Any, ...], dtype: torch.dtype | None = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Losses and gradient of the twin, and of the kernel, in memory that was NaN."""
    found = []
    rows, width = case[0].shape
    for call in (fused.divergence, kernels.divergence):
        losses = torch.zeros(4, rows + 3)[:, 1 : rows + 1]
        gradient = torch.full((rows, width + 3), torch.nan, dtype=dtype or torch.float32)[:, :width]
        call(*case, losses, None if dtype is None else gradient)
        found.append((losses, gradient))
    return found


def assert_close(found: list[tuple[Tensor, Tensor]], largest: float = 1e-5) -> None:
    (wanted_losses, wanted), (losses, gradient) = found
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(gradient.float(), wanted.float(), rtol=largest, atol=largest, equal_nan=True)


@pytest.mark.parametrize("width", [1, 64, 150])
@pytest.mark.parametrize("name", WEIGHTS)
def test_terms_over_widths(name: str, width: int) -> None:
    weights = WEIGHTS[name]
    targets = torch.tensor([0, width - 1, width, -100, 1 << 40])
    case = (raw(5, width, 0), raw(5, width, 1), None, targets, weights.factors, weights.temperature, weights.beta)
    assert_close(both((*case, HEADS["plain"])))


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str) -> None:
    weights, targets = WEIGHTS["all"], torch.tensor([3, 90, -1])
    case = (raw(3, 100, 2), raw(3, 100, 3), None, targets, weights.factors, weights.temperature, weights.beta)
    assert_close(both((*case, HEADS[head])))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ce", [0.0, 0.5])
@pytest.mark.parametrize("width", [1, 3])
def test_draws(width: int, ce: float, head: str) -> None:
    """One token twice, one that is the target too, empty places, draws outside the vocabulary."""
    ids = torch.tensor([[3, 9, 3], [99, -1, 0], [1, 100, 2], [0, 1 << 40, 0]])[:, :width]
    shares = torch.tensor([[0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]])[:, :width]
    targets = torch.tensor([9, 98, 100, 0]) if ce else None
    case = (raw(4, 100, 4), None, (ids, shares, torch.linspace(0, 2, 4)), targets, (2.0, 0.0, 0.0, ce), 1.0, 0.5)
    assert_close(both((*case, HEADS[head])))


def test_cross_entropy_needs_no_teacher() -> None:
    case = (raw(2, 100, 5), None, None, torch.tensor([1, 2]), WEIGHTS["ce"].factors, 1.0, 0.5, HEADS["softcap"])
    assert_close(both(case))


@pytest.mark.parametrize("name", ["kl", "ce", "all"])
def test_without_a_gradient_nothing_else_changes(name: str) -> None:
    weights = WEIGHTS[name]
    case = (raw(2, 100, 6), raw(2, 100, 7), None, torch.tensor([1, 2]), weights.factors, weights.temperature, 0.3)
    (wanted, _), (losses, gradient) = both((*case, HEADS["plain"]), None)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=2e-6)
    assert bool(gradient.isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients(dtype: torch.dtype) -> None:
    """Rounded once; the interpreter cuts bfloat16 off instead, which errs by twice as much."""
    weights = WEIGHTS["all"]
    case = (raw(3, 100, 8), raw(3, 100, 9), None, torch.tensor([1, 2, 3]), weights.factors, 1.5, 0.3, HEADS["plain"])
    assert_close(both(case, dtype), torch.finfo(dtype).eps)


@pytest.mark.parametrize("head", HEADS)
def test_at_identity_all_is_exactly_zero(head: str) -> None:
    logits, cap = raw(3, 150, 10), HEADS[head][0]
    case = (logits, logits.clone(), None, None, (1.0, 2.0, 3.0, 0.0), 1.7, 0.3, (cap, cap))
    _, (losses, gradient) = both(case)
    assert not bool(losses.any()) and not bool(gradient.any())


def test_logits_far_apart() -> None:
    """Probabilities that are 0 in float32, of one model and of the other."""
    student, teacher = torch.zeros(2, 100), torch.zeros(2, 100)
    student[0, 3], teacher[0, 7], student[1, 99], teacher[1, 99] = 300.0, 200.0, 1e4, -1e4
    for beta in (0.01, 0.5, 0.99):
        found = both((student, teacher, None, None, (1.0, 1.0, 1.0, 0.0), 1.0, beta, HEADS["plain"]))
        assert bool(found[1][0].isfinite().all() & found[1][1].isfinite().all())
        torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-3)
