"""The fused losses on one GPU, where the Triton kernel runs, beside textbook formulas on whole float64 logits."""

from dataclasses import replace

import pytest
import torch
from dense_losses import WEIGHTS, Problem, dense, fused, logits, problem, relative_error
from torch import Tensor

from compress.kernels import usable
from compress.train.losses import fused as module
from compress.train.losses.fused import Weights
from compress.train.losses.inputs import Sampled

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "softcap": {"softcap": 5.0},
    "everything": {"bias": True, "scale": 1.5, "softcap": 8.0},
}
# Of a gradient's norm: bf16 rounds the logits' gradient, and hidden's or weight's own, by 0.17 % each.
LARGEST = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New memory is NaN, so that nothing can depend on what happened to be there; chunks are short."""
    new_empty = Tensor.new_empty

    def poison(tensor: Tensor) -> Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: poison(new_empty(*a, **k)))
    monkeypatch.setattr(module, "_rows_at_once", lambda *_: 16)


def assert_meets(case: Problem, weights: Weights, draws: Sampled | None = None, vocabulary: int | None = None) -> None:
    assert usable(case.hidden)
    wanted_loss, wanted_terms, wanted = dense(case, weights, vocabulary)
    loss, terms, gradients = fused(case, weights, draws, vocabulary)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=2e-5, abs=1e-5)
    for name, term in terms.items():
        assert float(term) == pytest.approx(float(wanted_terms[name]), rel=2e-5, abs=1e-5), name
    for name, gradient in gradients.items():
        assert gradient.dtype == (case.hidden if name == "hidden" else case.head.weight).dtype
        assert relative_error(gradient, wanted[name]) < LARGEST[case.hidden.dtype], name
        if vocabulary is not None and name != "hidden":
            assert not bool(gradient[vocabulary:].any())


@pytest.mark.parametrize("weights", WEIGHTS)
def test_terms(weights: str) -> None:
    assert_meets(problem(37, 5003, 1, "cuda", torch.bfloat16), WEIGHTS[weights])
    assert_meets(problem(50, 8192, 1, "cuda", torch.float32), WEIGHTS[weights])


@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str) -> None:
    case = problem(37, 5003, 2, "cuda", torch.bfloat16, **HEADS[head])
    assert_meets(case, WEIGHTS["all"])
    assert_meets(case, WEIGHTS["all"], vocabulary=4099)


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize(("tokens", "vocabulary"), [(37, 1), (1, 333), (16, 4096), (300, 12289)])
def test_sizes_and_dtypes(tokens: int, vocabulary: int, dtype: torch.dtype) -> None:
    assert_meets(problem(tokens, vocabulary, 3, "cuda", dtype, **HEADS["everything"]), WEIGHTS["all"])


@pytest.mark.parametrize("vocabulary", [151936, 262144])
def test_large_vocabularies(vocabulary: int) -> None:
    assert_meets(problem(20, vocabulary, 3, "cuda", torch.bfloat16), WEIGHTS["all"])


@pytest.mark.parametrize("head", HEADS)
def test_all_tokens_as_draws_give_the_forward_kl(head: str) -> None:
    case = problem(33, 200, 4, "cuda", torch.bfloat16, **HEADS[head])
    case = replace(case, targets=torch.where(case.targets < 150, case.targets, -100))
    log_p = torch.log_softmax(logits(case.taught, case.teacher), dim=1)
    ids = torch.rand(log_p.shape, device="cuda").argsort(dim=1)
    draws = Sampled(ids, log_p.exp().gather(1, ids).float(), -(log_p.exp() * log_p).sum(dim=1).float())
    assert_meets(case, Weights(kl=0.7, ce=0.2), draws)


@pytest.mark.parametrize("draws", [1, 5, 64, 255])
def test_draws_are_the_twins(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some twice, some outside the vocabulary, in places no draw at all."""
    case = problem(33, 999, 5, "cuda", torch.float32)
    ids = torch.randint(-20, 1020, (33, draws), device="cuda") // 3 * 3
    shares = torch.rand(33, draws, device="cuda") * (torch.rand(33, draws, device="cuda") < 0.7)
    sampled = Sampled(ids, shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6), torch.rand(33, device="cuda"))
    loss, _, gradients = fused(case, Weights(kl=2.0, ce=0.5), sampled)
    monkeypatch.setattr(module, "usable", lambda _: False)
    wanted_loss, _, wanted = fused(case, Weights(kl=2.0, ce=0.5), sampled)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-4)
    assert all(relative_error(gradients[name], wanted[name]) < 1e-5 for name in wanted)


@pytest.mark.parametrize("name", ["kl", "reverse_kl at T 0.5", "jsd, beta 0.9 at T 3"])
def test_at_identity_all_is_exactly_zero(name: str) -> None:
    case = problem(37, 5003, 6, "cuda", torch.bfloat16, **HEADS["everything"])
    loss, _, gradients = fused(replace(case, taught=case.hidden, teacher=case.head), WEIGHTS[name])
    assert float(loss) == 0 and not any(bool(gradient.any()) for gradient in gradients.values())


def test_master_weights_get_a_float32_gradient() -> None:
    case = problem(37, 5003, 7, "cuda", torch.float32)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        _, _, gradients = fused(case, WEIGHTS["kl"])
    assert gradients["weight"].dtype == gradients["hidden"].dtype == torch.float32
    rounded = problem(37, 5003, 7, "cuda", torch.bfloat16)
    wanted = dense(rounded, WEIGHTS["kl"])[2]
    assert all(relative_error(gradients[name], wanted[name]) < LARGEST[torch.bfloat16] for name in wanted)
