"""The fused losses over next tokens beside textbook formulas on whole float64 logits; the hidden states' loss."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from dense_losses import WEIGHTS, Problem, dense, fused, leaves_of, logits, problem, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import ModelError
from compress.train.losses import fused as module
from compress.train.losses.fused import Weights, logit_loss
from compress.train.losses.hidden import hidden_loss
from compress.train.losses.inputs import Head, Sampled

HEADS: dict[str, dict[str, object]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 1.5, "softcap": 5.0},
}
EVERYTHING = HEADS["everything"]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "_rows_at_once", lambda *_: 3)
    yield


def assert_meets(found: Any, wanted: Any, tolerance: float = 5e-6) -> None:
    """Loss, terms and gradients, relative to the norm of each; terms that nearly cancel cost the loss some digits."""
    for one, other in [(found[0], wanted[0]), *((term, wanted[1][name]) for name, term in found[1].items())]:
        assert float(one) == pytest.approx(float(other), rel=2 * tolerance, abs=1e-6), found[1]
    assert found[2].keys() == wanted[2].keys()
    for name, gradient in found[2].items():
        assert relative_error(gradient, wanted[2][name]) < tolerance, name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_terms_and_gradients_are_those_of_dense_float64(weights: str, head: str, short_chunks: None) -> None:
    case = problem(10, 97, 1, **HEADS[head])
    found = fused(case, WEIGHTS[weights])
    assert found[0].dtype == torch.float32 and not any(term.requires_grad for term in found[1].values())
    assert set(found[1]) == {name for name in module.TERMS if getattr(WEIGHTS[weights], name)}
    assert_meets(found, dense(case, WEIGHTS[weights]))


@given(rows=st.integers(1, 20), tokens=st.integers(1, 20), name=st.sampled_from(sorted(WEIGHTS)))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_chunks_change_nothing(rows: int, tokens: int, name: str) -> None:
    case = problem(tokens, 53, tokens, **EVERYTHING)
    wanted = fused(case, WEIGHTS[name])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_rows_at_once", lambda *_: rows)
        assert_meets(fused(case, WEIGHTS[name]), wanted, 1e-6)


def test_no_tensor_of_all_logits_exists(short_chunks: None) -> None:
    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for each in out if isinstance(out, tuple | list) else [out]:
                if isinstance(each, Tensor):
                    Largest.seen = max(Largest.seen, each.numel())
            return out

    case = problem(64, 97, 2)
    leaves = case.hidden.requires_grad_(), replace(case.head, weight=case.head.weight.requires_grad_())
    with Largest():
        loss, _ = logit_loss(*leaves, WEIGHTS["all"], targets=case.targets, teacher=(case.taught, case.teacher))
        loss.backward()
    assert Largest.seen == 97 * 40  # the teacher's matrix; a chunk has 3 * 97, all logits 64 * 97


@pytest.mark.parametrize("name", [name for name in WEIGHTS if "ce" not in name and name != "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_identity_all_is_exactly_zero(name: str, dtype: torch.dtype, short_chunks: None) -> None:
    case = problem(10, 97, 3, dtype=dtype, **EVERYTHING)
    same = replace(case, taught=case.hidden, teacher=case.head)
    loss, terms, gradients = fused(same, WEIGHTS[name])
    assert float(loss) == 0 and all(float(term) == 0 for term in terms.values())
    assert not any(bool(gradient.any()) for gradient in gradients.values())


@given(st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_divergences_of_extreme_logits_are_finite_and_not_negative(data: st.DataObject) -> None:
    """Logits up to 1e4 apart, where probabilities of either model are 0 in float32."""
    rows = st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4)
    student, teacher = (torch.tensor([data.draw(rows)]).requires_grad_() for _ in range(2))
    weights = Weights(kl=1.0, reverse_kl=1.0, jsd=1.0, beta=data.draw(st.sampled_from([0.01, 0.5, 0.99])))
    one = Head(torch.eye(4))
    loss, terms = logit_loss(student, one, weights, targets=None, teacher=(teacher.detach(), one))
    (gradient,) = torch.autograd.grad(loss, [student])
    assert all(float(term) >= 0 for term in terms.values()) and bool(loss.isfinite())
    assert bool(gradient.isfinite().all()) and float(gradient.sum().abs()) <= 1e-5 * float(gradient.abs().sum() + 1)


@pytest.mark.parametrize("widths", [(90, 97), (97, 90), (97, 97)])
def test_padding_is_cut_from_both_heads(widths: tuple[int, int], short_chunks: None) -> None:
    """One model has 97 logits, the other 90, of which 85 have a token: nothing of the rest is left in the losses."""
    full = problem(10, 97, 4, **EVERYTHING)

    def cut(head: Head, rows: int) -> Head:
        return replace(head, weight=head.weight[:rows], bias=None if head.bias is None else head.bias[:rows])

    targets = full.targets % 85
    padded = replace(full, head=cut(full.head, widths[0]), teacher=cut(full.teacher, widths[1]), targets=targets)
    wanted = dense(
        replace(full, head=cut(full.head, 85), teacher=cut(full.teacher, 85), targets=targets), WEIGHTS["all"]
    )
    loss, terms, gradients = fused(padded, WEIGHTS["all"], vocabulary=85)
    for name in ("weight", "bias"):
        assert gradients[name].shape[0] == widths[0] and not bool(gradients[name][85:].any())
        gradients[name] = gradients[name][:85]
    assert_meets((loss, terms, gradients), wanted)


def test_other_vocabularies_are_refused() -> None:
    small, large = problem(2, 5), problem(2, 7)
    mixed = replace(small, taught=large.taught, teacher=large.teacher)
    with pytest.raises(ModelError, match="the teacher has 7 logits and the student 5"):
        fused(mixed, WEIGHTS["kl"])
    with pytest.raises(ModelError, match="a vocabulary of 6 tokens, where the student has 5 logits and the teacher 7"):
        fused(mixed, WEIGHTS["kl"], vocabulary=6)


def whole(found: Problem) -> Sampled:
    """Every token as a draw, at its exact probability, in an order of its own in each row."""
    log_p = torch.log_softmax(logits(found.taught, found.teacher), dim=1)
    ids = torch.rand(log_p.shape, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    return Sampled(ids, log_p.exp().gather(1, ids).float(), -(log_p.exp() * log_p).sum(dim=1).float())


@pytest.mark.parametrize("weights", [Weights(kl=0.7), Weights(kl=0.7, ce=0.2)])
def test_all_tokens_as_draws_give_the_forward_kl(weights: Weights, short_chunks: None) -> None:
    case = problem(10, 97, 5, **EVERYTHING)
    assert_meets(fused(case, weights, whole(case)), dense(case, weights))


@pytest.mark.parametrize("head", HEADS)
def test_draws_are_a_weighted_cross_entropy(head: str, short_chunks: None) -> None:
    """One token twice, some places empty, some draws outside the vocabulary; beside the text's own tokens."""
    case = problem(7, 50, 6, **HEADS[head])
    drawn = [[3, 9, 3, 0], [49, -1, 0, 0], [1, 2, 50, 4], [0] * 4, [7, 8, 9, 10], [5, 6, 0, 0], [11, 1 << 40, 12, 13]]
    quarters = [[1, 2, 1, 0], [4, 0, 0, 0], [2, 1, 1, 0], [4, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [2, 1, 0, 1]]
    ids, shares = torch.tensor(drawn), torch.tensor(quarters) / 4
    entropy = torch.linspace(0, 3, 7)
    leaves, head = leaves_of(case, torch.float64)
    log_q = torch.log_softmax(logits(leaves["hidden"], head), dim=1)
    target = torch.zeros(7, 50, dtype=torch.float64)
    for n, k in itertools.product(range(7), range(4)):
        if shares[n, k] and 0 <= ids[n, k] < 50:
            target[n, ids[n, k]] += shares[n, k]
    kl = -(target * log_q).sum() - entropy.double().sum()
    ce = torch.nn.functional.nll_loss(log_q, case.targets, reduction="sum")
    loss = 2 * kl + 0.5 * ce
    gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    wanted = loss.detach(), {"kl": kl.detach(), "ce": ce.detach()}, gradients
    assert_meets(fused(case, Weights(kl=2.0, ce=0.5), Sampled(ids, shares, entropy)), wanted)


def test_rows_without_a_target_have_no_cross_entropy() -> None:
    case = problem(6, 50, 7, **EVERYTHING)
    targets = torch.tensor([-100, 3, 50, 7, -1, 1 << 40])
    loss, _, gradients = fused(replace(case, targets=targets), Weights(ce=1.0))
    kept = replace(case, hidden=case.hidden[[1, 3]], taught=case.taught[[1, 3]], targets=targets[[1, 3]])
    wanted, terms, wanted_gradients = dense(kept, Weights(ce=1.0))
    assert not bool(gradients["hidden"][[0, 2, 4, 5]].any())
    gradients["hidden"] = gradients["hidden"][[1, 3]]
    assert_meets((loss, {}, gradients), (wanted, terms, wanted_gradients))


def test_without_rows_the_loss_and_the_gradients_are_zero() -> None:
    loss, terms, gradients = fused(problem(0, 50, **EVERYTHING), WEIGHTS["all"])
    assert float(loss) == 0 and all(float(term) == 0 for term in terms.values()) and len(terms) == 4
    assert gradients["hidden"].shape == (0, 24) and not bool(gradients["weight"].any() | gradients["bias"].any())


def test_without_weights_the_loss_is_a_constant() -> None:
    case = problem(3, 50)
    loss, terms = logit_loss(case.hidden.requires_grad_(), case.head, Weights(), targets=None, teacher=None)
    assert float(loss) == 0 and loss.dtype == torch.float32 and not loss.requires_grad and not terms


def test_what_needs_no_gradient_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    case = problem(6, 50, 8)
    products: list[str] = []
    for name in ("_product", "_add_product"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, n=name: (products.append(n), f(*a)))

    def run(hidden: bool, weight: bool) -> Tensor:
        products.clear()
        leaf = case.hidden.clone().requires_grad_(hidden)
        head = replace(case.head, weight=case.head.weight.clone().requires_grad_(weight))
        teacher = case.taught, case.teacher
        loss, _ = logit_loss(leaf, head, WEIGHTS["kl"], targets=None, teacher=teacher)
        if loss.requires_grad:
            loss.backward()
        assert (leaf.grad is not None) == hidden and (head.weight.grad is not None) == weight
        return loss

    logits_of_both = ["_product", "_product"]
    assert not run(False, False).requires_grad and products == logits_of_both
    run(True, False)
    assert products == [*logits_of_both, "_product"]
    run(False, True)
    assert products == [*logits_of_both, "_add_product"]
    with torch.no_grad():
        leaf = case.hidden.clone().requires_grad_()
        products.clear()
        loss, _ = logit_loss(leaf, case.head, WEIGHTS["kl"], targets=None, teacher=(case.taught, case.teacher))
    assert not loss.requires_grad and products == logits_of_both


def test_the_arriving_gradient_multiplies_and_may_come_twice() -> None:
    case = problem(6, 50, 9)
    leaf, head = case.hidden.requires_grad_(), replace(case.head, weight=case.head.weight.requires_grad_())
    loss, _ = logit_loss(leaf, head, WEIGHTS["ce"], targets=case.targets, teacher=None)
    once = torch.autograd.grad(loss, [leaf, head.weight], retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, [leaf, head.weight])
    for one, three in zip(once, thrice, strict=True):
        torch.testing.assert_close(three, 3 * one, rtol=1e-6, atol=0)


def test_master_weights_get_a_float32_gradient_of_rounded_operands() -> None:
    """A bf16 hidden state with a float32 head, as under autocast, and what autocast does with a float32 one."""
    case = problem(6, 50, 10)
    rounded = replace(case, hidden=case.hidden.bfloat16())
    _, _, gradients = fused(rounded, WEIGHTS["kl"])
    assert gradients["weight"].dtype == torch.float32 and gradients["hidden"].dtype == torch.bfloat16
    wanted = dense(rounded, WEIGHTS["kl"])[2]
    assert relative_error(gradients["weight"], wanted["weight"]) < 2e-6
    assert relative_error(gradients["hidden"], wanted["hidden"]) < 3e-3
    both = replace(rounded, taught=case.taught.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        automatic = fused(case, WEIGHTS["kl"])[2]
    assert torch.equal(automatic["weight"], fused(both, WEIGHTS["kl"])[2]["weight"])
    assert automatic["hidden"].dtype == torch.float32


@pytest.mark.parametrize("projected", [True, False])
def test_hidden_loss_is_that_of_float64(projected: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    student, projection = torch.randn(9, 12, generator=generator), torch.randn(20, 12, generator=generator)
    teacher = torch.randn(9, 20 if projected else 12, generator=generator) * torch.logspace(-4, 4, 9)[:, None]
    teacher[4] = 0
    leaves = [student.requires_grad_(), projection.requires_grad_()][: 1 + projected]
    loss = hidden_loss(student, teacher, projection if projected else None)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found, rows = (wide[0] @ wide[1].t() if projected else wide[0]), [n for n in range(9) if n != 4]
    wanted = ((found - teacher)[rows].square().sum(1) / teacher.double()[rows].square().sum(1)).sum()
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, wide), strict=True):
        assert relative_error(one, other) < 1e-5


def test_hidden_loss_of_equal_states_is_zero() -> None:
    state = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert float(hidden_loss(state, state, None)) == 0 == float(hidden_loss(state[:0], state[:0], None))
