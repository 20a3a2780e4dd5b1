"""The order in which parts of every layer are best removed: one pass over the original model, shared by all targets.

Each layer's orders are a file of their own, so a run that was stopped goes on behind the last one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint, read_part, write_part
from compress.prune.axes import Anatomy, Dims, Parts
from compress.prune.compensation import damping
from compress.prune.importance import InputStatistics, by_unit, greedy_order
from compress.prune.surgery import Kept
from compress.quant.statistics import Gram
from compress.recipe.prune import PruneStage
from compress.stages.layerwise import check_finite
from compress.system.locks import FileLock

CODE_VERSION = 1


@contextmanager
def alone(shared: Path, context: Context) -> Iterator[None]:
    """Hold the folder that stages on one model and text share; waits where another process is at the same."""
    shared.parent.mkdir(parents=True, exist_ok=True)
    say = context.reporter.say
    with FileLock(shared.with_name(f"{shared.name}.lock")) as lock:
        lock.acquire(exclusive=True, waiting=lambda who: say(f"scores: waiting for {who}, which is at the same"))
        yield


class Scores:
    """Removal orders of a model's layers.

    Args:
        spec: the stage.
        parent: the model.
        body: its anatomy.
        context: device, calibration tokens, progress.
        shared: folder where the orders are kept.
        room: bytes that activations may take.
    """

    def __init__(
        self, spec: PruneStage, parent: Checkpoint, body: Anatomy, context: Context, shared: Path, room: float
    ) -> None:
        self.spec, self.parent, self.body, self.context, self.room = spec, parent, body, context, room
        self.ranking = spec.ranking
        more = f"-{spec.damp:g}" if self.ranking == "greedy" else ""
        self._reads = self.ranking != "magnitude" or "hidden" in spec.over  # whose norms are scaled by what they read
        if self.ranking == "magnitude" and self._reads:
            more = "-and-norms"
        self.folder = shared / f"{self.ranking}{more}-v{CODE_VERSION}"
        self._found: list[dict[str, Tensor]] = []
        self.files = [self.folder / f"layer-{index:05d}.safetensors" for index in range(body.dims.layers + 1)]

    def find(self) -> None:
        """Take up what is there and compute the rest; waits where another process is at the same."""
        with alone(self.folder.parent, self.context):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.context.fresh:
                for file in self.files:
                    file.unlink(missing_ok=True)
            if not all(file.is_file() for file in self.files):
                self._compute()
            self._found = [read_part(file)[0] for file in self.files]

    @torch.no_grad()
    def _compute(self) -> None:
        context, depth = self.context, self.body.dims.layers
        stream = LayerStream(self.parent, context.device, context.dtype, context.trust_remote_code, self.room)
        with stream.outer():
            calibration = stream.start(context.calibration() if self._reads else context.probe)
        with context.reporter.task(f"rank by {self.ranking}", depth, "layer") as advance:
            for index, file in enumerate(self.files[:depth]):
                raw = stream.load_layer(index)
                check_finite(raw)
                stream.fill_layer(index, raw)
                if file.is_file():
                    stream.run_layer(index, calibration)
                else:
                    write_part(file, self._of_layer(stream, index, raw, calibration), {})
                stream.empty_layer(index)
                advance()
        stream.close()
        norm = stream.arch.norm
        energy = _Energy()
        for batch in calibration:
            energy.add(batch)
        write_part(self.files[depth], {f"energy.{norm}.weight": energy.shares().cpu()}, {})

    def _of_layer(
        self, stream: LayerStream, index: int, raw: Mapping[str, Tensor], calibration: Activations
    ) -> dict[str, Tensor]:
        """Orders of a filled layer, which `calibration` goes through."""
        prefix = stream.prefix(index)
        found: dict[str, Tensor] = {}
        with _energies(stream.layers[index], norm_names(self.body), len(calibration.hidden)) as energies:
            for group, arrivals in stream.steps(index, calibration):
                wanted = [name for name in group if self._columns(name) in (("ffn",), ("q",))]
                if not wanted:
                    continue
                name, gram, statistics = wanted[0], Gram(), InputStatistics()
                if self.ranking == "greedy":
                    for arrival in arrivals:
                        gram.add(arrival.input)
                elif self.ranking != "magnitude":
                    for arrival in arrivals:
                        statistics.add(arrival.input)
                found |= self._orders(name, raw, prefix, gram.total(), statistics)
        found |= {f"energy.{norm}.weight": energy.shares() for norm, energy in energies.items()}
        found["hidden"] = self._hidden(raw, prefix, energies)
        return {name: tensor.cpu() for name, tensor in found.items()}

    def _columns(self, module: str) -> Parts:
        parts = self.body.layer.get(f"{module}.weight")
        return parts[0][1] if parts is not None and len(parts[0]) == 2 else ()

    def _orders(
        self, name: str, raw: Mapping[str, Tensor], prefix: str, gram: Tensor | None, statistics: InputStatistics
    ) -> dict[str, Tensor]:
        """The order of the units that are the inputs of this linear, first to be removed first."""
        weight, dims = raw[f"{prefix}{name}.weight"].float(), self.body.dims
        damp = self._damp(weight.shape[1])
        if self._columns(name) == ("ffn",):
            if gram is not None:
                return {"ffn": greedy_order(weight, gram, damp)[0]}
            return {"ffn": self._alone(name, weight, raw, prefix, statistics).argsort(stable=True)}
        inside = dims.heads // dims.kv_heads
        if gram is not None:
            order = greedy_order(weight, gram, damp, dims.head_dim, quota=inside)[0]
            groups = greedy_order(weight, gram, damp, dims.head_dim * inside)[0]
        else:
            scores = self._alone(name, weight, raw, prefix, statistics)
            order = by_unit(scores, dims.head_dim).argsort(stable=True)
            groups = by_unit(scores, dims.head_dim * inside).argsort(stable=True)
        rows = [order[order // inside == group] for group in range(dims.kv_heads)]
        return {"heads": torch.stack(rows), "groups": groups}

    def _damp(self, inputs: int) -> float:
        tokens = self.context.tokens
        return self.spec.damp if tokens is None else damping(tokens.count, inputs, self.spec.damp)

    def _alone(
        self, name: str, weight: Tensor, raw: Mapping[str, Tensor], prefix: str, statistics: InputStatistics
    ) -> Tensor:
        """A score of each input by itself, [I]; of its weights, the reach of those that make it did best."""
        if self.ranking == "activation":
            return statistics.activation()
        if self.ranking == "fluctuation":
            return (statistics.variance() * weight.square().sum(0)).sqrt()
        part, reach = self._columns(name), torch.zeros(weight.shape[1], device=weight.device)
        for full, (parts, shape) in self.body.layer.items():
            if len(shape) != 2 or part[0] not in parts[0]:
                continue
            rows, start = raw[prefix + full].float(), 0
            for each in parts[0]:
                length = self.body.dims.length((each,))
                if each == part[0]:
                    here = rows[start : start + length]
                    reach += here.amax(1) - here.amin(1)
                start += length
        return reach

    def _hidden(self, raw: Mapping[str, Tensor], prefix: str, energies: Mapping[str, "_Energy"]) -> Tensor:
        """What each residual channel weighs in this layer, [D].

        Its share of the states that norms read; `fluctuation` and `magnitude` count the linears' weights that read it.
        `greedy` ranks it as `activation` does, which did better than weights times states.
        """
        total = torch.zeros(self.body.dims.hidden, device=next(iter(raw.values())).device)
        reads = sum((each.shares().to(total) for each in energies.values()), torch.zeros_like(total))
        for full, (parts, shape) in self.body.layer.items():
            if len(shape) == 2 and parts[1] == ("hidden",):
                columns = raw[prefix + full].float().square().sum(0)
                if self.ranking == "fluctuation":
                    columns = columns * reads
                total += columns / columns.sum().clamp_min(1e-30)
        return reads if self.ranking in ("activation", "greedy") else total

    def kept(self, index: int, dims: Dims, hidden: Tensor | None) -> Kept:
        """What stays of a layer.

        Args:
            index: of the original's layer.
            dims: sizes afterwards.
            hidden: residual channels that stay; None is all.
        """
        before = self.body.dims
        ffn = heads = groups = None
        if replace(dims, layers=before.layers, hidden=before.hidden) == before:
            return Kept(before, hidden=hidden)
        found = self._found[index]
        if dims.ffn < before.ffn:
            ffn = found["ffn"][before.ffn - dims.ffn :].sort().values
        if (dims.heads, dims.kv_heads) != (before.heads, before.kv_heads):
            inside, left = before.heads // before.kv_heads, dims.heads // dims.kv_heads
            groups = found["groups"][before.kv_heads - dims.kv_heads :].sort().values
            heads = found["heads"][groups][:, inside - left :].flatten().sort().values
        return Kept(before, ffn, heads, groups, hidden)

    def hidden(self, width: int, layers: list[int]) -> Tensor | None:
        """Residual channels that stay, by their weight in these layers; None is all."""
        if width == self.body.dims.hidden:
            return None
        total = torch.stack([self._found[index]["hidden"] for index in layers]).sum(0)
        return total.argsort(descending=True, stable=True)[:width].sort().values

    def ratios(self, index: int, hidden: Tensor | None) -> dict[str, float]:
        """What the residual channels that stay have of a norm's root mean square, by its weight's name.

        Args:
            index: the original's layer; the number of layers: the norm behind them.
            hidden: the channels.
        """
        if hidden is None:
            return {}
        found = self._found[index].items()
        shares = {name.removeprefix("energy."): each for name, each in found if name.startswith("energy.")}
        return {name: float(each[hidden].mean().sqrt()) for name, each in shares.items()}


def norm_names(body: Anatomy) -> list[str]:
    """Modules of a layer (local names) whose weights are as long as the hidden states."""
    one = [name for name, (parts, shape) in body.layer.items() if len(shape) == 1 and parts[0] == ("hidden",)]
    return [name.removesuffix(".weight") for name in one if "norm" in name and name.endswith(".weight")]


@dataclass
class _Energy:
    """Of a norm's inputs: each channel's mean square, of vectors scaled to a root mean square of 1."""

    _sum: Tensor | None = None
    _tokens: int = 0
    batches: int = 0

    def add(self, batch: Tensor) -> None:
        """Add a batch [..., D]."""
        squares = batch.float().square().flatten(0, -2)
        found = (squares / squares.mean(-1, keepdim=True).clamp_min(1e-30)).sum(0)
        self._sum = found if self._sum is None else self._sum + found
        self._tokens += len(squares)
        self.batches += 1

    def shares(self) -> Tensor:
        """[D], of mean 1."""
        assert self._sum is not None, "the norm was called"
        return self._sum / self._tokens


@contextmanager
def _energies(layer: nn.Module, names: list[str], batches: int) -> Iterator[dict[str, _Energy]]:
    """Inside, what these norms read is added up, of each batch once: the layer may be run anew for each group."""
    energies = {name: _Energy() for name in names}

    def look(energy: _Energy) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if energy.batches < batches and not inputs[0].is_meta:  # which a rehearsal's are
                energy.add(inputs[0])

        return hook

    with ExitStack() as hooks:
        for name, energy in energies.items():
            hooks.callback(layer.get_submodule(name).register_forward_pre_hook(look(energy)).remove)
        yield energies
