"""AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), kept by torchao, and moves as AdamW's are.

A block of 256 second moments has one scale and 7 decades below its largest, but second moments are squares: where the
gradients of a block lie 4 decades apart, as those of a seldom and a frequent token do, the smaller ones become 0. Their
first moments do not, and are then divided by epsilon: single weights moved by hundreds of times the learning rate. In
exact arithmetic no move is longer than `longest_move` times the rate, so moves are cut to that.
"""

from typing import Any

import torch
from torch import Tensor
from torchao.optim import AdamW8bit


def longest_move(first: float, second: float) -> float:
    """The largest ratio of AdamW's first moment to the root of its second, both without bias, by Cauchy and Schwarz.

    Args:
        first: its decay, beta 1.
        second: likewise beta 2, larger than the square of beta 1.
    """
    return float((1 - first) / ((1 - second) * (1 - first**2 / second)) ** 0.5)


class BoundedAdamW8bit(AdamW8bit):  # type: ignore[misc]
    """torchao's optimizer with another step; buffers and states are torchao's."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        with torch._dynamo.utils.disable_cache_limit():  # one for each shape
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (self._new_buffer(parameter, signed) for signed in (True, False))
        state["step"] += 1
        first, second = group["betas"]
        update: Any = torch.compile(_update, fullgraph=True, dynamic=False)
        update(
            parameter.detach(), parameter.grad, state["step"], state["exp_avg"], state["exp_avg_sq"], group["lr"],
            first, second, group["weight_decay"], group["eps"], longest_move(first, second),
        )  # fmt: skip


def _update(
    parameter: Tensor, gradient: Tensor, step: Tensor, mean: Tensor, square: Tensor, rate: Tensor, first: float,
    second: float, decay: float, epsilon: float, bound: float,
) -> None:  # fmt: skip
    """One parameter, and its moments, which are rounded behind their use."""
    means = mean.float().lerp(gradient.float(), 1 - first)
    squares = square.float().lerp(gradient.float().square(), 1 - second)
    mean.copy_(means)
    square.copy_(squares)
    root = (squares / (1 - second**step)).sqrt() + epsilon
    move = (means / (1 - first**step) / root).clamp(-bound, bound)
    parameter.copy_(parameter.float() * (1 - rate * decay) - rate * move)
