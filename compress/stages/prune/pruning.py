"""What structured pruning does to each layer: parts go, and what is kept is solved for the original model's outputs.

The original runs beside the smaller model. In front of each group of linears both models' inputs are known, so the
weights that are kept are solved at once (compress/prune/compensation.py), and later linears see what earlier ones now
put out. Where layers behind this one are gone, its last linear is solved for the states behind them: that is a linear
map in their place, without a parameter more. (Where a norm stands behind that linear, or attention beside it, there is
no such map.)
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import records
from compress.errors import ModelError
from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.folds import gain_offset
from compress.loop.groups import Group
from compress.loop.reference import Pair, ReferenceModel
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import is_tied
from compress.prune.axes import Anatomy, Dims, Parts
from compress.prune.compensation import ReaderFit, Refit, WriterFit, damping
from compress.prune.surgery import Kept, cut, cut_all
from compress.recipe.prune import PruneStage
from compress.stages.layerwise import LayerTransform, check_finite
from compress.stages.prune.blocks import choose_block, divergence
from compress.stages.prune.reconstruct import Wanted, reconstruct
from compress.stages.prune.scores import Scores, norm_names
from compress.stages.prune.smaller import Smaller, layers_without, scaled_norm
from compress.stages.prune.sparse import check_not_sparse

_DRIFT = 0.5  # share of its inputs' drift that a linear which reads the residual stream makes good: it is also noise


@dataclass
class _Layer:
    """A layer while it is pruned.

    Args:
        index: of the smaller model's layer.
        prefix: of the smaller layer's names.
        whole: the original's tensors, by local names.
        pieces: what is kept of them.
        kept: which entries that is.
        middle: the original's states behind the attention, batch by batch, where they are wanted.
    """

    index: int
    prefix: str
    whole: Mapping[str, Tensor]
    pieces: dict[str, Tensor]
    kept: Kept
    middle: list[Tensor] | None = None
    place: torch.device | None = None  # of states between layers: the host's memory where the device's is short


class Pruning(LayerTransform):
    """One prune stage under way.

    Args:
        spec: the stage.
        parent: the model.
        body: its anatomy.
        dims: sizes afterwards.
        output: the stage's folder.
        context: device, calibration tokens, progress.

    Attributes:
        kl: divergence from the original on calibration text, when the layers are done; None where nothing ran beside.
    """

    def __init__(
        self, spec: PruneStage, parent: Checkpoint, body: Anatomy, dims: Dims, output: Path, context: Context
    ) -> None:
        self.spec, self.parent, self.body, self.dims, self.context = spec, parent, body, dims, context
        self.calibrated = spec.compensate
        self.kl: float | None = None
        room = self._room()
        gone = body.dims.layers - dims.layers
        shared = context.shared or output / "scores"
        first = choose_block(spec, parent, gone, context, shared, room) if gone else 0
        self.layers = layers_without(body.dims.layers, first, gone)
        self.scores = Scores(spec, parent, body, context, shared, room)
        if replace(dims, layers=body.dims.layers) != body.dims:
            self.scores.find()
        self.hidden = self.scores.hidden(dims.hidden, self.layers)
        ratio = next(iter(self.scores.ratios(body.dims.layers, self.hidden).values()), 1.0)
        self.smaller = Smaller(parent, body, dims, self.layers, self.hidden, ratio, output / "shape")
        self.smaller.write_config()
        self.stream = LayerStream(self.smaller, context.device, context.dtype, context.trust_remote_code, room)
        self.original = LayerStream(parent, context.device, context.dtype, context.trust_remote_code, room)
        self.reference: ReferenceModel | None = None
        if self.hidden is not None:
            self.smaller.offset = self._offset()

    def _room(self) -> float:
        """Bytes that the activations of each of the two models may take."""
        dims = self.body.dims
        stored = sum(info.bytes for name, info in self.parent.tensors.items() if ".0." in name)
        held = 5 if self.spec.reconstruct == "off" else 16  # float32 weights, gradients and moments
        widest = max(dims.ffn, dims.heads * dims.head_dim)
        return self.context.room(held * stored, widest, dims.hidden) / (2 if self.spec.reconstruct == "off" else 4)

    def _offset(self) -> float:
        """What the model's norms add to their weights."""
        layer = self.original.fill_layer(0, self.original.load_layer(0))
        found = gain_offset(layer.get_submodule(norm_names(self.body)[0]))
        self.original.empty_layer(0)
        if found is None:
            raise ModelError(f"{self.parent.folder}: its norms are of an unknown form; prune other axes than hidden")
        return found

    def start(self, calibration: Activations | None, probe: Activations) -> None:
        """Put the original model beside the smaller one, whose outputs are aimed at."""
        if calibration is None:
            return
        with self.original.outer():
            states = self.original.start(self.context.calibration()), self.original.start(self.context.probe)
        self.reference = ReferenceModel(self.original, *states, self.layers)

    def load(self, stream: LayerStream, index: int) -> dict[str, Tensor]:
        """The original's layer, by local names."""
        raw = self.original.load_layer(self.layers[index])
        check_finite(raw)
        if index == 0:
            check_not_sparse(raw)
        prefix = self.original.prefix(self.layers[index])
        return {name.removeprefix(prefix): tensor for name, tensor in raw.items()}

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Cut one layer, and solve what is kept, group by group as its inputs arrive."""
        own, prefix = self.layers[index], self.stream.prefix(index)
        kept = self.scores.kept(own, self.dims, self.hidden)
        pieces = cut_all(tensors, self.body.layer, kept)
        for name, ratio in self.scores.ratios(own, self.hidden).items():
            pieces[name] = scaled_norm(pieces[name], ratio, self.smaller.offset)
        layer = _Layer(index, prefix, tensors, pieces, kept)
        self._fill(layer, pieces)
        if calibration is None or self.reference is None:
            return self._named(layer), []
        return self._compensated(layer, calibration, self.reference)

    def _named(self, layer: _Layer) -> dict[str, Tensor]:
        return {layer.prefix + name: tensor for name, tensor in layer.pieces.items()}

    def _fill(self, layer: _Layer, pieces: Mapping[str, Tensor]) -> None:
        self.stream.fill_layer(layer.index, {layer.prefix + name: tensor for name, tensor in pieces.items()})

    def _compensated(
        self, layer: _Layer, calibration: Activations, reference: ReferenceModel
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Solve a filled layer's weights, and run both models through it."""
        index, gone = layer.index, reference.gone(layer.index)
        trains = self.spec.reconstruct == "submodule"
        layer.middle, layer.place = [] if trains else None, calibration.hidden[0].device
        states = calibration.copy() if trains else calibration
        whole = {reference.prefix(index) + name: tensor for name, tensor in layer.whole.items()}
        solved: dict[str, Refit] = {}
        mapped = False
        for group, pairs, writing in reference.beside(self.stream, index, states, whole):
            found = self._solve(layer, reference, group, pairs, writing)
            changed = {f"{n}.weight": r.weight.to(layer.pieces[f"{n}.weight"].dtype) for n, r in found.items()}
            layer.pieces |= changed
            self._fill(layer, changed)
            solved |= found
            mapped |= bool(writing & {name for name in found if self._parts(name)[1] == ("ffn",)})
        if gone and not mapped:
            self.context.reporter.warn(
                f"layers {', '.join(map(str, gone))}: removed, and nothing makes up for them: what layer {gone[0] - 1} "
                "puts out is not added to the states as it is (a norm behind it, or attention beside it)"
            )
        rows = [self._described(layer, name, refit) for name, refit in solved.items()]
        if trains:
            rows[-1] = rows[-1].model_copy(update=self._train(layer, calibration, reference))
            self.stream.run_layer(index, calibration)
        return self._named(layer), rows

    def _train(self, layer: _Layer, states: Activations, reference: ReferenceModel) -> dict[str, float | None]:
        """Train the layer on from its solved weights; returns its errors before and after."""
        linears = [name for name, (parts, shape) in self.body.layer.items() if len(shape) == 2]
        reader = next(name for name in linears if self.body.layer[name][0][0][:1] == ("ffn",))
        ends = reference.activations
        if self.hidden is not None:
            ends = Activations([self._narrow(each).to(layer.place) for each in ends], ends.arguments, ends.device)
        module = self.stream.layers[layer.index]
        wanted = Wanted(reader.removesuffix(".weight"), layer.middle or [], ends)
        found = reconstruct(module, layer.index, states, wanted, linears, self.spec.reconstruct_steps)
        layer.pieces |= {name: weight.to(layer.pieces[name].dtype) for name, weight in found.weights.items()}
        self._fill(layer, {name: layer.pieces[name] for name in linears})
        return {"layer_error": found.before, "layer_error_trained": found.after}

    def _described(self, layer: _Layer, name: str, refit: Refit) -> records.PrunedModule:
        rows, columns = refit.weight.shape
        before = layer.whole[f"{name}.weight"].shape
        return records.PrunedModule(
            name=layer.prefix + name, shape=(rows, columns), before=(before[0], before[1]), error=refit.after,
            error_cut=refit.before,
        )  # fmt: skip

    def _solve(
        self, layer: _Layer, reference: ReferenceModel, group: Group, pairs: Iterable[Pair], writing: Collection[str]
    ) -> dict[str, Refit]:
        """Solve the linears of a group for what the original's put out.

        Args:
            layer: theirs.
            reference: the original model, in front of them.
            group: local names of linears that share their input.
            pairs: for each batch, their input and what the original model has in front of them.
            writing: those whose output is added to the residual stream.
        """
        known = [name for name in group if f"{name}.weight" in self.body.layer]
        readers = [name for name in known if self._parts(name)[1] == ("hidden",)]
        kept = {name: layer.pieces[f"{name}.weight"] for name in known}
        alone = {name: WriterFit(kept[name], self._rows(layer, name)) for name in known if name not in readers}
        last = any(self._parts(name)[1] == ("ffn",) for name in alone)
        together, share = ReaderFit(), _DRIFT if self.hidden is None else 1.0
        for number, (batch, beside) in enumerate(pairs if known else ()):
            assert beside is not None, "the original model runs beside"
            narrow = None if beside.residual is None else (beside.residual[0], self._narrow(beside.residual[1]))
            if last and layer.middle is not None and narrow is not None:
                layer.middle.append(narrow[1].to(layer.place))
            for name, fit in alone.items():
                writes = name in writing
                end = reference.end(number, layer.whole.get(f"{name}.bias")) if writes and last else None
                target = None if end is None else self._narrow(end)
                fit.add(batch, beside.original, narrow if writes else None, target)
            if readers:
                together.add(batch, beside.original)
        found = {name: fit.solve(self._damp(kept[name])) for name, fit in alone.items()}
        for name in readers:
            found[name] = together.solve(kept[name], self._rows(layer, name), self._damp(kept[name]), share)
        return found

    def _damp(self, weight: Tensor) -> float:
        """What holds the weights of a linear [O, I] back when they are solved."""
        tokens = self.context.tokens
        assert tokens is not None, "compensation calibrates"
        return damping(tokens.count, weight.shape[1], self.spec.damp)

    def _parts(self, name: str) -> Sequence[Parts]:
        return self.body.layer[f"{name}.weight"][0]

    def _rows(self, layer: _Layer, name: str) -> Tensor:
        """The original's weights, the rows that are kept."""
        return cut(layer.whole[f"{name}.weight"], (self._parts(name)[0], ()), layer.kept)

    def _narrow(self, states: Tensor) -> Tensor:
        """The residual channels that are kept."""
        return states if self.hidden is None else states.index_select(-1, self.hidden.to(states.device))

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A finished layer as it was written; the original model goes on too."""
        if self.reference is not None:
            self.reference.run(index, self.reference.load(index))
        return dict(tensors)

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Embeddings, last norm and head, cut; a head of its own is solved anew where the states are narrower."""
        if calibration is not None and self.reference is not None:
            if self.hidden is not None and not is_tied(self.parent, self.smaller.modules):
                self._solve_head(tensors, calibration, self.reference.activations)
            with self.stream.outer(), self.original.outer():
                self.kl = divergence((self.original, self.reference.activations), (self.stream, calibration))
        self.original.close()
        inside = self.smaller.modules.layers + "."
        return self.smaller.load([name for name in self.smaller.tensors if not name.startswith(inside)]), []

    def _solve_head(self, tensors: Mapping[str, Tensor], states: Activations, originals: Activations) -> None:
        """Solve the output head for the original's logits."""
        name, fit = f"{self.smaller.modules.head}.weight", ReaderFit()
        with self.stream.outer(), self.original.outer():
            for state, original in zip(states, originals, strict=True):
                fit.add(self.stream.head_inputs(state), self.original.head_inputs(original))
        kept = self.smaller.load([name], self.context.device)[name]
        refit = fit.solve(kept, tensors[name].to(self.context.device), self._damp(kept))
        self.smaller.changed[name] = refit.weight.to(kept.dtype).cpu()

    def config(self) -> dict[str, Any]:
        """The parent's with the new sizes."""
        return dict(self.smaller.config)

    def figures(self) -> records.Pruned:
        """What was removed."""
        before, after = self.body.dims, self.dims
        (total, inside), (left, left_inside) = self.body.total, self.body.count(after)
        return records.Pruned(
            before=before.sizes, after=after.sizes, parameters_before=total, parameters=left,
            share=1 - left / total, share_of_layers=1 - left_inside / inside,
            removed_layers=sorted(set(range(before.layers)) - set(self.layers)), calibration_kl=self.kl,
        )  # fmt: skip
