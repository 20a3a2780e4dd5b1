"""The layer loop: a model run one decoder layer at a time, so that it is never held.

A skeleton on the meta device comes from the config. Stand-ins in place of the decoder layers record what the model's
own forward passes to each (masks, rotary embeddings, sliding windows), so no family's forward code is repeated here.
Layers are then loaded one by one, the next one prefetched.

`run_layer` advances all batches through a layer together: every batch runs in a fibre (a greenlet) that stops in
front of each group of linears with a common input. When all have arrived, the caller sees all inputs, replaces the
weights, and the fibres go on with the new ones. So each linear is calibrated on what the compressed linears before it
put out, inside its own layer too, and each layer runs once, not twice. Left out: the two-pass loop (observe, transform,
run again), which costs twice the forward passes for coarser statistics.

Dimensions: B batch, S sequence, D hidden, I inputs of a linear, V vocabulary.
"""

import copy
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from compress.errors import ModelError, NumericalError
from compress.model.skeleton import assign, check_present, set_tensor, skeleton
from compress.model.stand_in import Reached, StandIn

TOKENS_PER_BATCH = 2048
Visit = Callable[[tuple[str, ...], Iterator[Tensor]], None]


@dataclass
class Activations:
    """Hidden states between two layers, and what each layer is called with.

    Args:
        hidden: one tensor [B, S, D] per batch, replaced as layers run.
        arguments: for each batch shape (B, S), the keyword arguments of every layer.
    """

    hidden: list[Tensor]
    arguments: dict[tuple[int, int], list[dict[str, Any]]]

    def of_layer(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """Keyword arguments with which layer `index` is called for this batch."""
        return self.arguments[(hidden.shape[0], hidden.shape[1])][index]


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

    Attributes:
        head: name of the output head's module; some families store it under another one (gpt_neox: embed_out).
        replaced: weights outside the layers that are used instead of the source's, by full name.

    Raises:
        ModelError: a model that transformers can't build, or whose parts aren't found.
    """

    def __init__(
        self, source: Source, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
    ) -> None:
        self.device, self.dtype, self.source = device, dtype, source
        self.model, self.arch = skeleton(source.folder, dtype, trust_remote_code)
        self.layers: nn.ModuleList = self.model.get_submodule(self.arch.layers)
        heads = {id(self.model.get_output_embeddings())}
        self.head = next((n for n, m in self.model.named_modules() if id(m) in heads), self.arch.head)
        held = {self.module_name(name) for name in source.tensors}
        check_present([name for name, _ in self.model.named_parameters() if name not in held])
        self.replaced: dict[str, Tensor] = {}
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._next: tuple[int, Future[dict[str, Tensor]]] | None = None

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
        batch = batch or max(1, TOKENS_PER_BATCH // tokens.shape[1])
        hidden: list[Tensor] = []
        arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        with self.outer():
            for part in tokens.split(batch):
                stand_ins = self._stand_ins(last=self.depth - 1)
                with suppress(Reached):
                    self._forward_through(stand_ins, input_ids=part.to(self.device))
                seen = [stand_in.seen for stand_in in stand_ins]
                if any(s is None for s in seen):
                    raise ModelError(f"{type(self.model).__name__}: its forward pass skips decoder layers")
                hidden.append(seen[0][0])  # type: ignore[index]
                arguments.setdefault((part.shape[0], part.shape[1]), [s[1] for s in seen if s is not None])
        return Activations(hidden, arguments)

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
        return self._reader.submit(self.source.load, names, self.device)

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

    def groups(self, index: int, activations: Activations) -> list[tuple[str, ...]]:
        """Linears of a layer (local names) that share an input, in the order in which they are called.

        Found by running the layer once on the meta device and comparing the inputs by identity.
        """
        filled = self.layers[index]
        without = {id(p): nn.Parameter(p.to("meta"), requires_grad=False) for p in filled.parameters()}
        layer = copy.deepcopy(filled, without).to("meta")  # copies no weights: they are taken as copied already
        hidden = activations.hidden[0]
        seen: list[tuple[Tensor, list[str]]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                for tensor, names in seen:
                    if tensor is inputs[0]:
                        names.append(name)
                        return
                seen.append((inputs[0], [name]))

            return hook

        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(note(name))
        meta = torch.empty_like(hidden, device="meta")
        layer(meta, **_to_device(activations.of_layer(index, hidden), "meta"))
        return [tuple(names) for _, names in seen]

    def run_layer(self, index: int, activations: Activations, visit: Visit | None = None) -> None:
        """Run all batches through a filled layer, in place.

        Args:
            index: the layer.
            activations: replaced by what the layer puts out.
            visit: called once per group of linears, in call order, with their local names and an iterator over the
                batches' inputs [B, S, I]. It may replace the group's weights before it returns.

        Raises:
            NumericalError: NaN or inf in what the layer puts out.
        """
        if visit is None:
            for number, hidden in enumerate(activations.hidden):
                activations.hidden[number] = self._run_batch(index, hidden, activations)
        else:
            self._run_in_step(index, activations, visit)
        finite = torch.stack([torch.isfinite(hidden).all() for hidden in activations.hidden])
        if not bool(finite.all()):
            raise NumericalError(
                f"NaN or inf in the activations behind {self.prefix(index)[:-1]}; "
                "the weights may be damaged, or the dtype's range too small"
            )

    def _run_batch(self, index: int, hidden: Tensor, activations: Activations) -> Tensor:
        out = self.layers[index](hidden, **activations.of_layer(index, hidden))
        return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]

    def _run_in_step(self, index: int, activations: Activations, visit: Visit) -> None:
        layer, main = self.layers[index], getcurrent()
        groups = self.groups(index, activations)

        def fibre(number: int) -> greenlet:
            def work() -> None:
                activations.hidden[number] = self._run_batch(index, activations.hidden[number], activations)

            return greenlet(work, main)

        fibres = [fibre(number) for number in range(len(activations.hidden))]

        def stop(group: tuple[str, ...]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
                main.switch(group, inputs[0])

            return hook

        paths_differ = ModelError(
            f"batches take different paths through {self.prefix(index)[:-1]}; it is no dense layer"
        )
        handles = [layer.get_submodule(group[0]).register_forward_pre_hook(stop(group)) for group in groups]

        def arrivals(group: tuple[str, ...]) -> Iterator[Tensor]:
            for each in fibres:
                arrived = each.switch()
                if each.dead or arrived[0] != group:
                    raise paths_differ
                yield arrived[1]

        try:
            for group in groups:
                inputs = arrivals(group)
                visit(group, inputs)
                for _ in inputs:
                    pass
            for each in fibres:
                each.switch()
                if not each.dead:
                    raise paths_differ
        finally:
            for handle in handles:
                handle.remove()

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
        stand_ins = self._stand_ins(last=None)
        stand_ins[-1].answer = hidden
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.long, device=self.device)
        return self._forward_through(stand_ins, input_ids=tokens, logits_to_keep=keep).logits  # type: ignore[no-any-return]

    def _stand_ins(self, last: int | None) -> list[StandIn]:
        return [StandIn(layer, self._in_tuples, index == last) for index, layer in enumerate(self.layers)]

    @cached_property
    def _in_tuples(self) -> bool:
        """Whether layers put out tuples: the first one is run on the meta device. Inside `outer()` only."""
        stand_in = StandIn(self.layers[0], False, True)
        with suppress(Reached):
            tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            self._forward_through([stand_in] * self.depth, input_ids=tokens)
        hidden, arguments = _to_device(stand_in.seen, "meta")
        return isinstance(copy.deepcopy(self.layers[0]).to("meta")(hidden, **arguments), tuple)

    def _forward_through(self, stand_ins: Sequence[StandIn], **inputs: Any) -> Any:
        parent, _, name = self.arch.layers.rpartition(".")
        owner = self.model.get_submodule(parent)
        setattr(owner, name, nn.ModuleList(stand_ins))
        try:
            return self.model(**inputs, use_cache=False)
        finally:
            setattr(owner, name, self.layers)

    def outer(self) -> "_Outer":
        """Context in which embeddings, final norm and head are in memory."""
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
        inside = stream.arch.layers + "."
        outside = [name for name in stream.source.tensors if not name.startswith(inside)]
        loaded = stream.source.load(outside, stream.device)
        named = {stream.module_name(name): tensor for name, tensor in loaded.items()}
        assign(stream.model, named, stream.device, stream.dtype)
        stream.model.tie_weights()
        for name, weight in stream.replaced.items():
            set_tensor(stream.model, stream.module_name(name), nn.Parameter(weight, requires_grad=False))
            if name.startswith(stream.arch.embeddings):
                stream.model.tie_weights()
        layers = {id(p) for p in stream.layers.parameters()}
        check_present([n for n, p in stream.model.named_parameters() if p.is_meta and id(p) not in layers])

    def __exit__(self, *_: object) -> None:
        for name, parameter in list(self.stream.model.named_parameters()):
            if not parameter.is_meta:
                set_tensor(self.stream.model, name, nn.Parameter(parameter.to("meta"), requires_grad=False))
        self.stream.model.tie_weights()
        gc.collect()


def _to_device(arguments: Any, device: str) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, arguments)
