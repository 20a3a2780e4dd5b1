"""The layer loop: a model run one decoder layer at a time, so that it is never held.

A skeleton on the meta device comes from the config. Catchers in place of the decoder layers record what the model's
own forward passes to each (masks, rotary embeddings, sliding windows), so no family's forward code is repeated here.
Layers are then loaded one by one, the next one prefetched.

`steps` stops in front of each group of linears with a common input (interleave.py), which keeps activations where
there is room for them (activations.py).

Dimensions: B batch, S sequence, D hidden, I inputs of a linear, V vocabulary.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.errors import ModelError, NumericalError
from compress.loop.activations import Activations
from compress.loop.catcher import LayerCatcher, Reached, by_layers
from compress.loop.finite import all_finite
from compress.loop.groups import Group, Groups, linear_groups
from compress.loop.interleave import PathsDiffer, Step, interleaved, recompute
from compress.loop.kv_cache import Change, attention_modules, pass_through
from compress.loop.skeleton import assign, check_present, head_name, set_tensor, skeleton

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}  # a GPU is busy with fewer, but waits for launches

Kind = tuple[tuple[str, torch.Size], ...]


class Source(Protocol):
    """Where a stream's weights come from: a checkpoint, or a quantized one read as if it were dense."""

    @property
    def folder(self) -> Path:
        """Where its config.json lies."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Names of all tensors."""

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Those tensors, in any float dtype."""


class LayerStream:
    """A causal language model, streamed.

    Args:
        source: its config and weights.
        device: where it runs.
        dtype: in what precision it runs.
        trust_remote_code: as in transformers.
        room: bytes that activations may take on the device.

    Attributes:
        head: name of the output head's module; some families store it under another one (gpt_neox: embed_out).
        replaced: weights outside the layers that are used instead of the source's, by full name.
        inputs: what the inputs of a linear go through before it sees them, by its full name; none at the start. What is
            added while a layer runs counts from the next call of that linear on, the one that waits included.
        caches: what keys and values go through before attention sees them, by the attention module's full name.

    Raises:
        ModelError: a model that transformers can't build, or whose parts aren't found.
    """

    def __init__(
        self,
        source: Source,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        room: float = math.inf,
    ) -> None:
        self.device, self.dtype, self.source, self.room = device, dtype, source, room
        self.model, self.arch = skeleton(source.folder, dtype, trust_remote_code)
        self.layers: nn.ModuleList = self.model.get_submodule(self.arch.layers)
        self.head = head_name(self.model, self.arch)
        held = {self.module_name(name) for name in source.tensors}
        check_present([name for name, _ in self.model.named_parameters() if name not in held])
        self.replaced: dict[str, Tensor] = {}
        self.inputs: dict[str, Callable[[Tensor], Tensor]] = {}
        self.caches: dict[str, Change] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._through(name))
        for name, module in attention_modules(self.model).items():
            pass_through(module, name, self.caches)
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._groups: dict[tuple[Kind, int], Groups] = {}
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._inside = 0  # of how many `outer()`

    def _through(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            change = self.inputs.get(name)
            return None if change is None else (change(inputs[0]), *inputs[1:])

        return hook

    @property
    def unused(self) -> list[str]:
        """Tensors of the source that the model has no place for, as transformers sees it."""
        places = self.model.state_dict().keys()
        return [name for name in self.source.tensors if self.module_name(name) not in places]

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def prefix(self, index: int) -> str:
        """Where the tensors of a layer lie in the checkpoint: "model.layers.3."."""
        return f"{self.arch.layers}.{index}."

    def module_name(self, stored: str) -> str:
        """A module's or tensor's name in the model, from its name in the checkpoint."""
        rest = stored.removeprefix(self.arch.head)
        return self.head + rest if rest != stored and rest[:1] in ("", ".") else stored

    def start(self, tokens: Tensor, batch: int | None = None) -> Activations:
        """Embed tokens [N, S]: the activations in front of layer 0, in batches of `batch` sequences."""
        batch = batch or max(1, TOKENS_PER_BATCH[self.device.type] // tokens.shape[1])
        hidden: list[Tensor] = []
        arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        with self.outer():
            for part in tokens.split(batch):
                catchers = self._catchers(last=self.depth - 1)
                with suppress(Reached):
                    self._forward_through(catchers, input_ids=part.to(self.device))
                seen = [catcher.seen for catcher in catchers]
                if any(s is None for s in seen):
                    raise ModelError(f"{type(self.model).__name__}: its forward pass skips decoder layers")
                state: Tensor = seen[0][0]  # type: ignore[index]
                if state.shape[:2] != part.shape:
                    raise ModelError(
                        f"model_type {self.model.config.model_type!r} is not supported: its layers get a hidden state "
                        f"of shape {list(state.shape)} for tokens of shape {list(part.shape)}"
                    )
                fits = 2 * tokens.numel() * state.shape[2] * state.element_size() <= self.room
                hidden.append(state if fits or self.device.type == "cpu" else state.cpu().pin_memory())
                arguments.setdefault((part.shape[0], part.shape[1]), [s[1] for s in seen if s is not None])
        return Activations(hidden, arguments, self.device)

    def load_layer(self, index: int) -> dict[str, Tensor]:
        """Tensors of a layer as stored, on the device; starts reading the next layer."""
        tensors = self._fetch(index).result()
        self._next = None
        if index + 1 < self.depth:
            self._next = (index + 1, self._fetch(index + 1))
        return tensors

    def _fetch(self, index: int) -> "Future[dict[str, Tensor]]":
        if self._next is not None and self._next[0] == index:
            return self._next[1]
        prefix = self.prefix(index)
        names = [name for name in self.source.tensors if name.startswith(prefix)]
        return self._reader.submit(self._read, names)

    def _read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors on the device; a GPU copies them beside what it computes, not in between."""
        if self._copies is None:
            return self.source.load(names, self.device)
        main = torch.cuda.default_stream(self.device)
        with torch.no_grad(), torch.cuda.stream(self._copies):
            tensors = self.source.load(names, self.device)
            self._copies.synchronize()
        for tensor in tensors.values():
            tensor.record_stream(main)  # its memory is not used again before the computation is done with it
        return tensors

    def fill_layer(self, index: int, tensors: dict[str, Tensor]) -> nn.Module:
        """Put tensors (full names) into layer `index`, in the stream's dtype; a partial set replaces what it names.

        Raises:
            ModelError: a tensor of another shape, or one that the layer needs and the checkpoint lacks.
        """
        layer, prefix = self.layers[index], self.prefix(index)
        assign(layer, {n.removeprefix(prefix): t for n, t in tensors.items()}, self.device, self.dtype, prefix)
        check_present([prefix + name for name, tensor in layer.state_dict().items() if tensor.is_meta])
        return layer

    def empty_layer(self, index: int) -> None:
        """Give a layer's memory back."""
        self.layers[index].to("meta")

    def groups(self, index: int, activations: Activations) -> list[Group]:
        """Linears of a layer (local names) that share an input, in the order in which they are called.

        Layers with the same linears are taken to call them alike.
        """
        return self._grouped(index, activations).names

    def _grouped(self, index: int, activations: Activations) -> Groups:
        kind = self.kind(index), activations.hidden[0].shape[1]  # a token may hold more in a longer sequence
        if kind not in self._groups:
            layer, run = self.rehearsal(index, activations)
            with by_layers(self.model):
                self._groups[kind] = linear_groups(layer, run, activations.hidden[0][..., 0].numel())
        return self._groups[kind]

    def kind(self, index: int) -> Kind:
        """The linears of a layer: local names and shapes."""
        modules = self.layers[index].named_modules()
        return tuple((name, module.weight.shape) for name, module in modules if isinstance(module, nn.Linear))

    def rehearsal(self, index: int, activations: Activations) -> tuple[nn.Module, Callable[[], Any]]:
        """A copy of a layer on the meta device, and what runs it once."""
        filled = self.layers[index]
        without = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in filled.parameters()}
        layer = copy.deepcopy(filled, without).to("meta")  # copies no weights: they are taken as copied already
        hidden = torch.empty_like(activations.hidden[0], device="meta")
        arguments = _to_device(activations.of_layer(index, hidden), "meta")
        return layer, lambda: layer(hidden, **arguments)

    def run_layer(self, index: int, activations: Activations) -> None:
        """Run all batches through a filled layer, in place.

        Raises:
            NumericalError: NaN or inf in what the layer puts out.
        """
        for _ in self.steps(index, activations, []):
            pass

    def steps(self, index: int, activations: Activations, groups: list[Group] | None = None) -> Iterator[Step]:
        """`run_layer` as a generator, which has to be exhausted.

        Args:
            index: the layer.
            activations: replaced by what the layer puts out.
            groups: linears with a common input to stop in front of; None is all.

        Yields:
            Each group, in call order, with the batches' arrivals in front of it, to be gone through as often as needed.
            The group's weights may be replaced before the next step.
        """
        layer, finite = self.layers[index], [torch.tensor(True)] * len(activations.hidden)

        def work(number: int) -> None:
            hidden = activations.get(number)
            out = layer(hidden, **activations.of_layer(index, hidden))
            out = out[0] if isinstance(out, tuple) else out
            finite[number] = all_finite(out)
            activations.put(number, out)

        found = self._grouped(index, activations) if groups is None else Groups(groups, 0)
        run = interleaved if found.names and self._keeps_batches(found, activations) else recompute
        try:
            yield from run(layer, found.names, work, len(activations.hidden))
        except PathsDiffer as error:
            raise ModelError(
                f"batches take different paths through {self.prefix(index)[:-1]}; it is no dense layer"
            ) from error
        if not bool(torch.stack(finite).all()):
            raise NumericalError(
                f"NaN or inf in the activations behind {self.prefix(index)[:-1]}; "
                "the weights may be damaged, or the dtype's range too small"
            )

    def _keeps_batches(self, groups: Groups, activations: Activations) -> bool:
        """Whether there is room for all batches inside a layer, with the hidden states that it came with."""
        hidden: int = activations.hidden[0].shape[2] * self.dtype.itemsize
        return activations.tokens * (hidden + groups.held) <= self.room

    def head_inputs(self, hidden: Tensor) -> Tensor:
        """What the output head gets for the last layer's `hidden` [B, S, D]."""
        caught: list[Tensor] = []
        head = self.model.get_submodule(self.head)

        def catch(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.append(inputs[0])
            raise Reached

        handle = head.register_forward_pre_hook(catch)
        try:
            with suppress(Reached):
                self.logits(hidden)
        finally:
            handle.remove()
        return caught[0]

    def logits(self, hidden: Tensor, keep: int = 0) -> Tensor:
        """Logits [B, S, V] of the last layer's `hidden` [B, S, D], by the model's own forward; inside `outer()` only.

        Args:
            hidden: [B, S, D].
            keep: only this many last positions; 0 is all.
        """
        catchers = self._catchers(last=None)
        catchers[-1].answer = hidden
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        return self._forward_through(catchers, input_ids=tokens, logits_to_keep=keep).logits  # type: ignore[no-any-return]

    def _catchers(self, last: int | None) -> list[LayerCatcher]:
        return [LayerCatcher(layer, self._in_tuples, index == last) for index, layer in enumerate(self.layers)]

    @cached_property
    def _in_tuples(self) -> int:
        """The length of the tuples that layers put out, 0 for none: the first one is run on the meta device.

        Inside `outer()` only.
        """
        catcher = LayerCatcher(self.layers[0], 0, True)
        with suppress(Reached):
            tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            self._forward_through([catcher] * self.depth, input_ids=tokens)
        hidden, arguments = _to_device(catcher.seen, "meta")
        with by_layers(self.model):
            out = copy.deepcopy(self.layers[0]).to("meta")(hidden, **arguments)
        return len(out) if isinstance(out, tuple) else 0

    def _forward_through(self, catchers: Sequence[LayerCatcher], **inputs: Any) -> Any:
        parent, _, name = self.arch.layers.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(catchers))
        try:
            with by_layers(self.model):
                return self.model(**inputs, use_cache=False)
        finally:
            setattr(owner, name, self.layers)

    def outer(self) -> "_Outer":
        """Context in which embeddings, final norm and head are in memory; one inside another reads nothing again."""
        return _Outer(self)

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)


class _Outer:
    """Everything outside the decoder layers, in memory for the length of a `with`."""

    def __init__(self, stream: LayerStream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        stream = self.stream
        stream._inside += 1
        if stream._inside > 1:
            return
        inside = stream.arch.layers + "."
        outside = [name for name in stream.source.tensors if not name.startswith(inside)]
        loaded = stream.source.load(outside, stream.device)
        named = {stream.module_name(name): tensor for name, tensor in loaded.items()}
        assign(stream.model, named, stream.device, stream.dtype)
        with by_layers(stream.model):  # as from_pretrained: a head that is stored with other values is not tied
            stream.model.tie_weights(missing_keys=set(stream.model.state_dict()) - set(named), recompute_mapping=False)
        for name, weight in stream.replaced.items():
            set_tensor(stream.model, stream.module_name(name), nn.Parameter(weight, requires_grad=False))
            if name.startswith(stream.arch.embeddings):
                stream.model.tie_weights(recompute_mapping=False)
        layers = {id(p) for p in stream.layers.parameters()}
        check_present([n for n, p in stream.model.named_parameters() if p.is_meta and id(p) not in layers])

    def __exit__(self, *_: object) -> None:
        self.stream._inside -= 1
        if self.stream._inside:
            return
        for name, parameter in list(self.stream.model.named_parameters()):
            if not parameter.is_meta:
                set_tensor(self.stream.model, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self.stream.model.tie_weights(recompute_mapping=False)


def _to_device(arguments: Any, device: str) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, arguments)
