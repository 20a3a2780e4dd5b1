"""A model whose parameters are split over processes (FSDP2), one process included, and how it is filled and read.

Trained parameters are float32, the masters; what computes is a copy in the precision of the forward passes, made layer
by layer, or at once where a small model trains in one process: what FSDP does around modules costs a GPU more there
than the passes. Frozen ones are stored in that precision. Gradients are summed in float32. A layer is filled before it
is split, so that a process never holds more of the whole model than one layer.

Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

_SMALL = 1_000_000_000  # parameters up to which copies of all of them are made at once
_COMPILED_INPUTS = 8  # kinds of inputs of a layer: whole and ragged micro-batches, with gradients and without

Load = Callable[[Sequence[str]], dict[str, Tensor]]


@contextmanager
def mesh_of(device: torch.device) -> Iterator[DeviceMesh]:
    """All processes, as what parameters are split over; inside, a run of one process is a group of one."""
    alone = not dist.is_initialized()
    if alone:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),))
    finally:
        if alone:
            dist.destroy_process_group()


def set_trained(module: nn.Module, chosen: Callable[[str], bool], compute: torch.dtype) -> int:
    """Make some parameters, by name, masters that are trained, and freeze the others; returns how many weights train.

    All are on the meta device before and after; what is tied stays so.
    """
    made: dict[int, nn.Parameter] = {}
    count = 0
    for name, parameter in module.named_parameters():
        trained = chosen(name)
        empty = torch.empty(parameter.shape, dtype=torch.float32 if trained else compute, device="meta")
        made[id(parameter)] = nn.Parameter(empty, requires_grad=trained)
        count += parameter.numel() if trained else 0
    _replace(module, made)
    return count


def shard(
    module: nn.Module,
    decoder: nn.ModuleList,
    mesh: DeviceMesh,
    compute: torch.dtype,
    load: Load,
    device: torch.device,
    again: bool = False,
    compiled: bool = False,
    alone: bool = False,
) -> None:
    """Fill a module that is on the meta device, and split it over the processes.

    Args:
        module: with the decoder inside.
        decoder: layers that are made whole one at a time.
        mesh: the processes.
        compute: precision of forward and backward passes.
        load: tensors by the names of the module's parameters, on the CPU.
        device: where to.
        again: whether layers are computed again in the backward pass instead of keeping what they need for it.
        compiled: whether layers are compiled.
        alone: whether it is whole in each process instead: no part of it is trained, and there is room.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=None if compute == torch.float32 else compute, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    if compiled:
        _expect_variants(decoder)
    places = {id(parameter): name for name, parameter in module.named_parameters()}
    small = mesh.size() == 1 and not again and sum(each.numel() for each in module.parameters()) < _SMALL
    for part in [*decoder, module]:
        _fill(part, places, load, device)
        if part is module:
            _move_buffers(module, device)
        else:
            part.forward = torch.compile(part.forward, dynamic=False) if compiled else part.forward
            if again:
                part.forward = partial(checkpoint, part.forward, use_reentrant=False, preserve_rng_state=False)
        if not alone and not small:
            fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=part is not module and mesh.size() > 1)
    if small and not alone:
        _compute_in(module, compute)


def _compute_in(module: nn.Module, compute: torch.dtype) -> None:
    """Let a module's forward passes read copies of its masters in another precision."""
    masters = [each for each in module.parameters() if each.requires_grad and each.dtype != compute]
    if not masters:
        return
    numbers = {id(each): number for number, each in enumerate(masters)}
    places = [
        (holder._parameters, leaf, numbers[id(each)])
        for holder in module.modules()
        for leaf, each in holder.named_parameters(recurse=False, remove_duplicate=False)
        if id(each) in numbers
    ]

    def put(tensors: Sequence[Tensor]) -> None:
        for parameters, leaf, number in places:  # past __setattr__, which takes parameters alone
            parameters[leaf] = tensors[number]  # type: ignore[assignment]

    module.register_forward_pre_hook(lambda *_: put(_Copies.apply(compute, *masters)))  # type: ignore[no-untyped-call]
    module.register_forward_hook(lambda *_: put(masters), always_call=True)


class _Copies(torch.autograd.Function):
    """Masters in another precision; their gradients are float32."""

    @staticmethod
    def forward(ctx: Any, compute: torch.dtype, *masters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(_in_dtype(masters, compute))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        there = iter(_in_dtype([each for each in gradients if each is not None], torch.float32))
        return None, *(None if each is None else next(there) for each in gradients)


def _in_dtype(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.empty_like(each, dtype=dtype) for each in tensors]
    torch._foreach_copy_(made, list(tensors))
    return made


def _expect_variants(decoder: nn.ModuleList) -> None:
    """Let each kind of layer be compiled for its inputs; beyond a number torch gives up, and only warns of it."""
    kinds = {
        (getattr(layer, "attention_type", None), *((name, each.shape) for name, each in layer.named_parameters()))
        for layer in decoder
    }
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _COMPILED_INPUTS * len(kinds))
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 2 * config.recompile_limit)


def _fill(part: nn.Module, places: dict[int, str], load: Load, device: torch.device) -> None:
    """Give the parameters of a module that are on the meta device their values."""
    empty = {id(parameter): parameter for parameter in part.parameters() if parameter.is_meta}
    values = load([places[key] for key in empty])
    made = {}
    for key, parameter in empty.items():
        value = values.pop(places[key]).to(device, parameter.dtype)
        made[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    _replace(part, made)


def _replace(module: nn.Module, made: dict[int, nn.Parameter]) -> None:
    """Put parameters in the places of others, by the others' identity."""
    for holder in module.modules():
        for leaf, parameter in list(holder.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in made:
                setattr(holder, leaf, made[id(parameter)])


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for holder in module.modules():
        for leaf, buffer in list(holder.named_buffers(recurse=False)):
            setattr(holder, leaf, buffer.to(device))


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """A parameter as one tensor; all processes ask for the same."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


@torch.no_grad()
def set_whole(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter a value, of which each process takes its part; nothing is sent."""
    if isinstance(parameter, DTensor):
        placed = distribute_tensor(
            value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements, src_data_rank=None
        )
        parameter.to_local().copy_(placed.to_local())
    else:
        parameter.copy_(value)


def mean_over_processes(part: Tensor, count: int) -> float:
    """Mean of numbers of which each process has a part, `count` in all."""
    total = part.sum(dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / max(1, count)
