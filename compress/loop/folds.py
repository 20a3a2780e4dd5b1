"""Where the scales of a linear's input channels can go: into the norm or the linear that the input comes from.

A fold divides a producer's output channels by s and multiplies the columns of the linears behind it by s, which
changes nothing if nobody else sees that output and all between the two scales along. No table of families says where
that holds: it is tried, with powers of two for s, which move exponents and change no digit. The layer's output has to
stay the same, bit for bit. A residual branch that takes the norm's output, or an activation function on the way,
shows at once.

Dimensions: B batch, S sequence, I inputs of a linear, P channels of a producer.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Fold:
    """One place for the scales of a group of linears.

    Args:
        group: the linears, by local name.
        producer: the norm or linear that takes the inverse scales, by local name.
        offset: of a norm's gain, which is `offset + weight` (Gemma's is 1 + weight); None for a linear.
        head: channels of an attention head whose keys and values several heads share; None where there is none between.
    """

    group: tuple[str, ...]
    producer: str
    offset: float | None
    head: int | None = None

    def spread(self, scale_P: Tensor, width: int) -> Tensor:
        """The producer's scales as those of the linears' inputs [I]."""
        if self.head is None:
            return scale_P
        shared = width // scale_P.numel()
        return scale_P.view(-1, 1, self.head).expand(-1, shared, -1).reshape(-1)

    def gather(self, values_I: Tensor, channels: int) -> Tensor:
        """The largest of the input channels that each of the producer's P channels feeds, [P]."""
        return values_I if self.head is None else self._fed(values_I, channels).amax(1).flatten()

    def total(self, values_I: Tensor, channels: int) -> Tensor:
        """The sum of the input channels that each of the producer's P channels feeds, [P]."""
        return values_I if self.head is None else self._fed(values_I, channels).sum(1).flatten()

    def _fed(self, values_I: Tensor, channels: int) -> Tensor:
        assert self.head is not None
        return values_I.view(-1, values_I.numel() // channels, self.head)


def find_folds(
    layer: nn.Module, groups: Sequence[tuple[str, ...]], run: Run, head_dim: int | None
) -> dict[str, Fold | None]:
    """The folds that hold in a layer, by the first linear of their group; None where no input of a group matters.

    Args:
        layer: filled with weights, in a dtype whose range has room for twice and half of all that they compute.
        groups: linears that share an input, in call order.
        run: runs the layer on a few tokens and returns its output.
        head_dim: channels of an attention head; None for a model without any.
    """
    expected = run()
    producers = {name: module for name, module in layer.named_modules() if _channels(module)}
    found: dict[str, Fold | None] = {}
    for group in groups:
        first = layer.get_submodule(group[0])
        assert isinstance(first, nn.Linear)
        width = first.in_features
        if torch.equal(_tried(layer, group, _powers(width), run), expected):
            found[group[0]] = None
            continue
        for name, module in producers.items():
            fold = _candidate(group, name, module, width, head_dim)
            if fold is not None and _holds(layer, fold, width, run, expected):
                found[group[0]] = fold
                break
    return found


def _channels(module: nn.Module) -> int:
    """Output channels of a norm or linear; 0 for anything else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(module, nn.Embedding) or list(module.children()):
        return 0
    return weight.shape[0] if isinstance(module, nn.Linear) or weight.dim() == 1 else 0


def _candidate(group: tuple[str, ...], name: str, module: nn.Module, width: int, head_dim: int | None) -> Fold | None:
    channels = _channels(module)
    if name in group or width % channels:
        return None
    head = head_dim if channels < width else None
    if channels < width and (head is None or channels % head):
        return None
    if isinstance(module, nn.Linear):
        return Fold(group, name, None, head)
    offset = gain_offset(module) if channels == width else None
    return None if offset is None else Fold(group, name, offset)


def gain_offset(norm: nn.Module) -> float | None:
    """What is added to a norm's weight before it multiplies; None for a norm of another form."""
    trial = copy.deepcopy(norm).double()
    weight, bias = trial.weight, getattr(trial, "bias", None)
    assert isinstance(weight, nn.Parameter)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, weight.numel(), generator=generator, dtype=torch.float64).to(weight.device)
    with torch.no_grad():
        weight.copy_(torch.rand(weight.numel(), generator=generator, dtype=torch.float64).to(weight.device) + 0.5)
        kept, whole = weight.clone(), trial(x)
        if isinstance(bias, Tensor):
            bias.mul_(0.5)
        for offset in (0.0, 1.0):
            weight.copy_((kept + offset) * 0.5 - offset)
            if torch.allclose(trial(x) * 2, whole, rtol=1e-5, atol=1e-6):
                return offset
    return None


def _holds(layer: nn.Module, fold: Fold, width: int, run: Run, expected: Tensor) -> bool:
    """Whether scales 1/2, 1 and 2 passed through a fold change nothing."""
    producer = layer.get_submodule(fold.producer)
    scale_P = _powers(_channels(producer))

    def divide(_: nn.Module, __: tuple[Any, ...], out: Tensor) -> Tensor:
        return out / scale_P.to(out)

    handle = producer.register_forward_hook(divide)
    try:
        return torch.equal(_tried(layer, fold.group, fold.spread(scale_P, width), run), expected)
    finally:
        handle.remove()


def _powers(count: int) -> Tensor:
    return torch.exp2(torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(0)).float())


def _tried(layer: nn.Module, group: tuple[str, ...], scale_I: Tensor, run: Run) -> Tensor:
    """The layer's output with the inputs of a group multiplied."""

    def multiply(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0] * scale_I.to(inputs[0]), *inputs[1:])

    with ExitStack() as hooks:
        for name in group:
            hooks.callback(layer.get_submodule(name).register_forward_pre_hook(multiply).remove)
        return run()


def apply_fold(tensors: dict[str, Tensor], fold: Fold, scale_P: Tensor, quantized: Callable[[str], bool]) -> None:
    """Fold scales into a layer's weights, in place of those in `tensors`.

    The product of what is divided and multiplied is exact: a norm's gain is rounded to its dtype first, and the linears
    get the ratio that it really has. Where a bias or 16-bit weights would be rounded too, scales become powers of two,
    and a channel that even those would round stays as it is; so does one whose gain would become 0 or infinite.

    Args:
        tensors: of the layer, by local name; linears become float32 (unless they stay in 16 bits).
        fold: where.
        scale_P: float32 [P], positive, of the producer's channels.
        quantized: whether a linear's weights are quantized afterwards.
    """
    weight, bias = tensors[f"{fold.producer}.weight"], tensors.get(f"{fold.producer}.bias")
    kept = [tensors[f"{name}.weight"] for name in fold.group if not quantized(name)]
    rounds_producer = fold.offset is None and not quantized(fold.producer)
    if bias is not None or kept or rounds_producer:
        scale_P = _exact_powers(
            scale_P, fold, weight if fold.offset is not None or rounds_producer else None, bias, kept
        )
    if fold.offset is None:
        divided = weight.float() / scale_P[:, None]
        tensors[f"{fold.producer}.weight"] = divided if quantized(fold.producer) else divided.to(weight.dtype)
    else:
        gain = weight.double() + fold.offset
        stored = (gain / scale_P - fold.offset).to(weight.dtype)
        real = stored.double() + fold.offset
        usable = real.isfinite() & (real != 0)
        tensors[f"{fold.producer}.weight"] = torch.where(usable, stored, weight)
        scale_P = torch.where(usable, gain / real, 1.0).float()
    if bias is not None:
        tensors[f"{fold.producer}.bias"] = (bias.float() / scale_P).to(bias.dtype)
    for name in fold.group:
        columns = tensors[f"{name}.weight"]
        multiplied = columns.float() * fold.spread(scale_P, columns.shape[1])
        tensors[f"{name}.weight"] = multiplied if quantized(name) else multiplied.to(columns.dtype)


def _exact_powers(
    scale_P: Tensor, fold: Fold, weight: Tensor | None, bias: Tensor | None, kept: Sequence[Tensor]
) -> Tensor:
    """The nearest powers of two, and 1 for channels in which even those would round a number.

    Args:
        scale_P: float32 [P].
        fold: where.
        weight: of the producer, where it is stored in its own dtype.
        bias: of the producer.
        kept: weights [O, I] of linears that keep their dtype.
    """
    powers_P = torch.exp2(scale_P.log2().round())
    exact_P = torch.ones_like(powers_P, dtype=torch.bool)
    if bias is not None:
        exact_P &= _exact(bias.float() / powers_P, bias.dtype)
    if weight is not None and fold.offset is not None:
        exact_P &= _exact((weight.double() + fold.offset) / powers_P - fold.offset, weight.dtype)
    elif weight is not None:
        exact_P &= _exact(weight.float() / powers_P[:, None], weight.dtype).all(1)
    for columns in kept:
        rounded_I = ~_exact(columns.float() * fold.spread(powers_P, columns.shape[1]), columns.dtype).all(0)
        exact_P &= ~fold.gather(rounded_I, powers_P.numel())
    return torch.where(exact_P, powers_P, 1.0)


def _exact(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Where values are numbers of a narrower dtype too."""
    return values.to(dtype).to(values.dtype) == values
