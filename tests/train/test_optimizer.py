"""AdamW with 8-bit moments beside torchao's own and beside AdamW: the same moves, none longer than AdamW's can be."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.train.optimizer import make_optimizer

RATE = 1e-3
adamw8bit = pytest.importorskip("compress.train.adamw8bit")


@pytest.fixture(autouse=True, scope="module")
def _not_compiled() -> Iterator[None]:
    """Compiling takes longer than all else here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@given(
    gradients=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60).filter(lambda all_: any(map(abs, all_))),
    first=st.sampled_from([0.8, 0.9]),
    second=st.sampled_from([0.95, 0.999]),
)
def test_no_move_of_adamw_is_longer(gradients: list[float], first: float, second: float) -> None:
    mean = square = 0.0
    for step, gradient in enumerate(gradients, 1):
        mean = first * mean + (1 - first) * gradient
        square = second * square + (1 - second) * gradient**2
        if square:
            moved = abs(mean / (1 - first**step)) / (square / (1 - second**step)) ** 0.5
            assert moved <= adamw8bit.longest_move(first, second) * (1 + 1e-9)


def test_the_longest_move_is_reached() -> None:
    """By gradients that grow as beta 1 over beta 2 has them."""
    first, second, mean, square = 0.9, 0.95, 0.0, 0.0
    for step in range(300):
        gradient = (second / first) ** step
        mean, square = first * mean + (1 - first) * gradient, second * square + (1 - second) * gradient**2
    assert mean / square**0.5 == pytest.approx(adamw8bit.longest_move(first, second), rel=1e-3)


def trained(name: str, gradients: list[Tensor]) -> Tensor:
    module = nn.Module()
    module.weight = nn.Parameter(torch.ones(gradients[0].shape))
    made = make_optimizer(module, name, 0.1)
    return stepped(made, module.weight, gradients)


def stepped(optimizer: torch.optim.Optimizer, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    for gradient in gradients:
        weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"].fill_(RATE) if isinstance(group["lr"], Tensor) else RATE
        optimizer.step()
    return weight.detach()


def test_moves_that_can_be_are_those_of_torchao() -> None:
    """From gradients of one size, whose moments 8 bits tell apart."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(64, 256, generator=generator).sign() * 1e-3 for _ in range(6)]
    from torchao.optim import AdamW8bit

    weight = nn.Parameter(torch.ones(64, 256))
    theirs = stepped(
        AdamW8bit([weight], lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1), weight, gradients
    )  # fmt: skip
    assert torch.allclose(trained("adamw8bit", gradients), theirs, atol=1e-7)


def test_weights_of_seldom_tokens_move_no_farther_than_by_adamw() -> None:
    """Rows of other sizes share blocks of moments: small second moments become 0 in 8 bits, first ones do not."""
    generator = torch.Generator().manual_seed(1)
    size = 10.0 ** (-3 * torch.rand(512, 1, generator=generator))
    gradients = []
    for _ in range(20):
        there = torch.rand(512, 1, generator=generator) < 0.3
        gradients.append(torch.where(there, size * torch.randn(512, 48, generator=generator) * 1e-3, torch.zeros(())))
    exact, eight = (trained(name, gradients).sub(1).abs().max() / RATE for name in ("adamw", "adamw8bit"))
    assert exact < 20 and eight < 1.7 * exact  # torchao's own: more than 100 times the rate
