"""Trains a pruned layer for some steps towards what the original's put out, after least squares has set its weights.

The layer's own forward runs on the states that the smaller model really brings to it; wanted are the original's states
behind the attention and behind the layer. Weights are float32 while they are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compress.loop.activations import Activations
from compress.loop.groups import norms

LEARNING_RATE = 1e-3
WARM_UP = 0.1  # of the steps
_HELD_OUT = 8  # every so many batches one is not trained on, where there are as many


@dataclass(frozen=True)
class Wanted:
    """What the original model's states are, batch by batch.

    Args:
        reader: a linear of the MLP (local name) that reads what a norm puts out.
        middle: states that that norm reads, behind the attention; empty where they were not seen.
        end: states behind the layer.
    """

    reader: str
    middle: list[Tensor]
    end: Activations


class Trained(NamedTuple):
    """What came of a layer: its weights in float32, none where training made it no better; errors before and after.

    The errors are None where there is one batch, of which none could be kept out of the training.
    """

    weights: dict[str, Tensor]
    before: float | None
    after: float | None


@torch.enable_grad()
def reconstruct(
    layer: nn.Module, index: int, states: Activations, wanted: Wanted, trained: Sequence[str], steps: int
) -> Trained:
    """Train a filled layer from the weights that it has.

    Args:
        layer: the layer.
        index: which layer it is.
        states: in front of it.
        wanted: the original's states.
        trained: local names of the parameters to train.
        steps: of Adam.

    Returns:
        The weights, and relative output errors on batches that were not trained on.
    """
    own = dict(layer.named_parameters())
    master = {name: own[name].detach().float().requires_grad_() for name in trained}
    count = len(states.hidden)
    held = [number for number in range(count) if number % _HELD_OUT == _HELD_OUT - 1] or [count - 1][: count - 1]
    used = [number for number in range(count) if number not in held]
    optimizer = torch.optim.Adam(master.values(), LEARNING_RATE, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(index)

    def losses(number: int) -> tuple[Tensor, Tensor]:
        cast = {name: value.to(own[name].dtype) for name, value in master.items()}
        return _errors(layer, cast, index, states, wanted, number)

    def held_out() -> float | None:
        with torch.no_grad():
            return sum(float(losses(number)[1]) for number in held) / len(held) if held else None

    before = held_out()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        number = used[int(torch.randint(len(used), (1,), generator=generator))]
        middle, end = losses(number)
        optimizer.zero_grad(set_to_none=True)
        (middle + end).backward()
        optimizer.step()
    after = held_out()
    if before is not None and after is not None and not after < before:
        return Trained({}, before, before)
    return Trained({name: value.detach() for name, value in master.items()}, before, after)


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up, then linear to zero."""
    start = max(1, round(WARM_UP * steps))
    return min((step + 1) / start, (steps - step) / max(1, steps - start))


def _errors(
    layer: nn.Module, weights: dict[str, Tensor], index: int, states: Activations, wanted: Wanted, number: int
) -> tuple[Tensor, Tensor]:
    """Relative squared errors behind the attention and behind the layer, for one batch."""
    seen: list[Tensor] = []
    middle: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    def stop(_: nn.Module, __: tuple[Any, ...]) -> None:
        middle.extend(seen[-1:])

    handles = [norm.register_forward_pre_hook(look) for norm in norms(layer)]
    handles.append(layer.get_submodule(wanted.reader).register_forward_pre_hook(stop))
    hidden = states.get(number)
    try:
        out = functional_call(layer, weights, (hidden,), states.of_layer(index, hidden))
    finally:
        for handle in handles:
            handle.remove()
    out = out[0] if isinstance(out, tuple) else out
    end = _relative(out, wanted.end.get(number), hidden)
    if not wanted.middle:
        return torch.zeros_like(end), end
    return _relative(middle[0], wanted.middle[number].to(hidden.device), hidden), end


def _relative(out: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean over tokens of |out - target|^2 / |target - hidden|^2."""
    missed = (out.float() - target.float()).square().sum(-1)
    moved = (target.float() - hidden.float()).square().sum(-1)
    return (missed / (moved + 1e-6 * target.float().square().sum(-1)).clamp_min(1e-20)).mean()
