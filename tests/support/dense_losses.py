"""Losses over next tokens by their textbook formulas, on whole float64 logits with autograd, for tests."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.train.losses.fused import Weights, logit_loss
from compress.train.losses.inputs import Head, Sampled

WIDTHS = 24, 40
Gradients = dict[str, Tensor]
WEIGHTS = {
    "kl": Weights(kl=1.0),
    "kl at T 2": Weights(kl=0.7, temperature=2.0),
    "reverse_kl": Weights(reverse_kl=1.0),
    "reverse_kl at T 0.5": Weights(reverse_kl=1.3, temperature=0.5),
    "jsd": Weights(jsd=1.0),
    "jsd, beta 0.1": Weights(jsd=1.0, beta=0.1),
    "jsd, beta 0.9 at T 3": Weights(jsd=2.0, beta=0.9, temperature=3.0),
    "ce": Weights(ce=1.0),
    "ce beside T 2": Weights(kl=0.5, ce=0.25, temperature=2.0),
    "all": Weights(kl=0.5, reverse_kl=0.25, jsd=2.0, ce=0.125, temperature=1.5, beta=0.3),
}
"""Each term alone, with temperatures and shares, and mixtures."""


@dataclass(frozen=True)
class Problem:
    """Student and teacher, [N, D] and [N, Dt], with their heads, and the tokens that came next."""

    hidden: Tensor
    head: Head
    taught: Tensor
    teacher: Head
    targets: Tensor


def problem(
    tokens: int, vocabulary: int, seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float32, **head: object
) -> Problem:
    """Logits about as wide as a language model's. `head`: of both heads; `bias` asks for one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    bias = head.pop("bias", False)
    heads = [
        Head(normal(vocabulary, width) * 0.5, normal(vocabulary) if bias else None, **head)  # type: ignore[arg-type]
        for width in WIDTHS
    ]
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator).to(device)
    return Problem(normal(tokens, WIDTHS[0]), heads[0], normal(tokens, WIDTHS[1]), heads[1], targets)


def logits(hidden: Tensor, head: Head) -> Tensor:
    raw = hidden.double() @ head.weight.double().t()
    raw = head.scale * (raw if head.bias is None else raw + head.bias.double())
    return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)


def dense_terms(student: Tensor, teacher: Tensor, targets: Tensor, weights: Weights) -> dict[str, Tensor]:
    """The sum over rows of each term, from float64 logits [N, V]."""
    t, beta = weights.temperature, weights.beta
    there = (targets >= 0) & (targets < student.shape[1])
    log_p, log_q = (torch.log_softmax(each / t, dim=1) for each in (teacher, student))
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p + torch.tensor(beta).double().log(), log_q + torch.tensor(1 - beta).double().log())
    return {
        "kl": t**2 * (p * (log_p - log_q)).sum(),
        "reverse_kl": t**2 * (q * (log_q - log_p)).sum(),
        "jsd": t**2 * (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(),
        "ce": torch.nn.functional.cross_entropy(student[there], targets[there], reduction="sum"),
    }


def dense(
    case: Problem, weights: Weights, vocabulary: int | None = None
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    """Loss, terms and the gradients of hidden, weight and (where there is one) bias."""
    leaves, head = leaves_of(case, torch.float64)
    student, teacher = (
        logits(*each)[:, :vocabulary] for each in ((leaves["hidden"], head), (case.taught, case.teacher))
    )
    terms = dense_terms(student, teacher, case.targets, weights)
    loss = torch.stack([getattr(weights, name) * term for name, term in terms.items()]).sum()
    return loss.detach(), {name: term.detach() for name, term in terms.items()}, _gradients(loss, leaves)


def fused(
    case: Problem, weights: Weights, teacher: Sampled | None = None, vocabulary: int | None = None
) -> tuple[Tensor, dict[str, Tensor], Gradients]:
    """The same from `logit_loss`."""
    leaves, head = leaves_of(case, None)
    loss, terms = logit_loss(
        leaves["hidden"], head, weights, targets=case.targets, teacher=teacher or (case.taught, case.teacher),
        vocabulary=vocabulary,
    )  # fmt: skip
    return loss.detach(), terms, _gradients(loss, leaves)


def leaves_of(case: Problem, dtype: torch.dtype | None) -> tuple[dict[str, Tensor], Head]:
    """Copies that need gradients of hidden, weight and (where there is one) bias, and the head of the latter two."""
    tensors = {"hidden": case.hidden, "weight": case.head.weight, "bias": case.head.bias}
    leaves = {
        name: tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None
    }
    return leaves, replace(case.head, weight=leaves["weight"], bias=leaves.get("bias"))


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> Gradients:
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; where that is 0, the difference's own."""
    return float((found.double() - wanted.double()).norm()) / (float(wanted.double().norm()) or 1.0)
