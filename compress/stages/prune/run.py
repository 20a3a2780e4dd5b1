"""The prune stage: parts of every layer go, and what is kept is solved for the original model's outputs."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from compress.prune.axes import Anatomy, Dims, anatomy
from compress.prune.compensation import ReaderFit, Refit, WriterFit
from compress.prune.surgery import Kept, cut, cut_all
from compress.recipe.prune import PatternStage, PruneStage, Shape
from compress.stages.contract import Result
from compress.stages.layerwise import LayerTransform, Layerwise, check_finite
from compress.stages.prune.blocks import choose_block
from compress.stages.prune.plan import dims_of, words
from compress.stages.prune.scores import Scores, norm_names
from compress.stages.prune.smaller import Smaller, layers_without, scaled_norm

CODE_VERSION = 1


def run(spec: PruneStage | PatternStage, parent: Checkpoint, output: Path, context: Context) -> Result:
    """Prune a checkpoint.

    Args:
        spec: the stage, with its shape.
        parent: a dense checkpoint.
        output: folder for parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, calibration tokens, progress.

    Raises:
        ModelError: damaged weights, or a model that can't be cut this way.
        NumericalError: NaN or inf on the way.
        OutputError: nothing can be written.
    """
    assert isinstance(spec, PruneStage) and isinstance(spec.shape, Shape)
    body = anatomy(parent)
    dims = dims_of(spec.shape, body, "stages", {"q": 1, "ffn": 1, "hidden": 1})
    if isinstance(dims, str):
        raise ModelError(dims)
    context.reporter.say(f"pruning: {words(dims, body.dims) or 'nothing'}")
    stage = _Pruning(spec, parent, body, dims, output, context)
    result = Layerwise(spec, parent, stage.stream, output, context).run(stage)
    return replace(result, record=result.record.model_copy(update={"pruned": stage.figures()}))


class _Pruning(LayerTransform):
    """One prune stage under way."""

    def __init__(
        self, spec: PruneStage, parent: Checkpoint, body: Anatomy, dims: Dims, output: Path, context: Context
    ) -> None:
        self.spec, self.parent, self.body, self.dims, self.context = spec, parent, body, dims, context
        self.calibrated = spec.compensate
        room = self._room()
        gone = body.dims.layers - dims.layers
        first = choose_block(spec, parent, gone, context, output / "scores") if gone else 0
        self.layers = layers_without(body.dims.layers, first, gone)
        self.scores = Scores(spec, parent, body, context, output / "scores", room)
        if replace(dims, layers=body.dims.layers) != body.dims:
            self.scores.find()
        self.hidden = self.scores.hidden(dims.hidden, self.layers)
        last = self.scores.ratios(body.dims.layers, self.hidden)
        ratio = next(iter(last.values()), 1.0)
        self.smaller = Smaller(parent, body, dims, self.layers, self.hidden, ratio, output / "shape")
        self.smaller.write_config()
        self.stream = LayerStream(self.smaller, context.device, context.dtype, context.trust_remote_code, room)
        self.original = LayerStream(parent, context.device, context.dtype, context.trust_remote_code, room)
        self.reference: ReferenceModel | None = None
        if self.hidden is not None:
            self.smaller.offset = self._offset()

    def _room(self) -> float:
        dims = self.body.dims
        stored = sum(info.bytes for name, info in self.parent.tensors.items() if ".0." in name)
        widest = max(dims.ffn, dims.heads * dims.head_dim)
        return self.context.room(5 * stored, widest, dims.hidden) / 2

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
            tokens = self.context.calibration()
            states = self.original.start(tokens), self.original.start(self.context.probe)
        self.reference = ReferenceModel(self.original, *states)

    def _followers(self, index: int) -> list[int]:
        """The original's layers behind one of its own that are gone."""
        own = self.layers[index]
        after = self.layers[index + 1] if index + 1 < len(self.layers) else self.body.dims.layers
        return list(range(own + 1, after))

    def load(self, stream: LayerStream, index: int) -> dict[str, Tensor]:
        """The original's layer, by local names."""
        own = self.layers[index]
        raw = self.original.load_layer(own)
        check_finite(raw)
        prefix = self.original.prefix(own)
        return {name.removeprefix(prefix): tensor for name, tensor in raw.items()}

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], list[records.AnyModule]]:
        """Cut one layer, and solve what is kept, group by group as its inputs arrive."""
        own, prefix = self.layers[index], self.stream.prefix(index)
        kept = self.scores.kept(own, self.dims, self.hidden)
        ratios = self.scores.ratios(own, self.hidden)
        pieces = cut_all(tensors, self.body.layer, kept)
        for name, ratio in ratios.items():
            pieces[name] = scaled_norm(pieces[name], ratio, self.smaller.offset)
        named = {prefix + name: tensor for name, tensor in pieces.items()}
        self.stream.fill_layer(index, named)
        if calibration is None or self.reference is None:
            return named, []
        reference, followers = self.reference, self._followers(index)
        ends = reference.ahead([own, *followers]) if followers else None
        there = self.original.prefix(own)
        full = {there + name: tensor for name, tensor in tensors.items()}
        solved: dict[str, Refit] = {}
        for group, pairs, writing in reference.beside(self.stream, index, calibration, full, own):
            found = self._solve(group, tensors, pieces, kept, pairs, writing, ends)
            changed = {prefix + f"{name}.weight": self._stored(refit, pieces, name) for name, refit in found.items()}
            self.stream.fill_layer(index, changed)
            named |= changed
            solved |= found
        for each in followers:
            reference.run(each, self.original.load_layer(each))
        return named, [self._described(prefix, name, tensors, refit) for name, refit in solved.items()]

    def _stored(self, refit: Refit, pieces: Mapping[str, Tensor], name: str) -> Tensor:
        """New weights in the dtype that the model is stored in."""
        return refit.weight.to(pieces[f"{name}.weight"].dtype)

    def _described(self, prefix: str, name: str, tensors: Mapping[str, Tensor], refit: Refit) -> records.PrunedModule:
        rows, columns = refit.weight.shape
        before = tensors[f"{name}.weight"].shape
        return records.PrunedModule(
            name=prefix + name, shape=(rows, columns), before=(before[0], before[1]), error=refit.after,
            error_cut=refit.before,
        )  # fmt: skip

    def _solve(
        self,
        group: Group,
        tensors: Mapping[str, Tensor],
        pieces: Mapping[str, Tensor],
        kept: Kept,
        pairs: Iterable[Pair],
        writing: Collection[str],
        ends: Activations | None,
    ) -> dict[str, Refit]:
        """Solve the linears of a group for what the original's put out.

        Args:
            group: local names of linears that share their input.
            tensors: the original's layer.
            pieces: what is kept of it.
            kept: which entries that is.
            pairs: for each batch, their input and what the original model has in front of them.
            writing: those whose output is added to the residual stream.
            ends: what the states should be behind the layer, where layers behind it are gone.
        """
        known = [name for name in group if f"{name}.weight" in self.body.layer]
        alone = [name for name in known if self._parts(name)[1] != ("hidden",)]
        readers = [name for name in known if name not in alone]
        fits = {name: WriterFit(pieces[f"{name}.weight"], self._rows(name, tensors, kept)) for name in alone}
        together = ReaderFit()
        for number, (batch, beside) in enumerate(pairs if known else ()):
            assert beside is not None, "the original model runs beside"
            for name, fit in fits.items():
                residual, target = None, None
                if name in writing and beside.residual is not None:
                    residual = beside.residual[0], self._narrow(beside.residual[1])
                    if ends is not None and self._parts(name)[1] == ("ffn",):
                        target = self._narrow(ends.get(number))
                fit.add(batch, beside.original, residual, target)
            if readers:
                together.add(batch, beside.original)
        found = {name: fit.solve(self._damp(name, pieces)) for name, fit in fits.items()}
        for name in readers:
            weight = pieces[f"{name}.weight"]
            found[name] = together.solve(weight, self._rows(name, tensors, kept), self._damp(name, pieces))
        return found

    def _damp(self, name: str, pieces: Mapping[str, Tensor]) -> float:
        return self.spec.damp

    def _parts(self, name: str) -> Any:
        return self.body.layer[f"{name}.weight"][0]

    def _rows(self, name: str, tensors: Mapping[str, Tensor], kept: Kept) -> Tensor:
        """The original's weights, the rows that are kept."""
        return cut(tensors[f"{name}.weight"], (self._parts(name)[0], ()), kept)

    def _narrow(self, states: Tensor) -> Tensor:
        """The residual channels that are kept."""
        return states if self.hidden is None else states.index_select(-1, self.hidden.to(states.device))

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A finished layer as it was written; the original model goes on too."""
        if self.reference is not None:
            for each in (self.layers[index], *self._followers(index)):
                self.reference.run(each, self.original.load_layer(each))
        return dict(tensors)

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], list[records.AnyModule]]:
        """Embeddings, last norm and head, cut; a head of its own is solved anew where the states are narrower."""
        self.original.close()
        inside = self.smaller.modules.layers + "."
        return self.smaller.load([name for name in self.smaller.tensors if not name.startswith(inside)]), []

    def config(self) -> dict[str, Any]:
        """The parent's with the new sizes."""
        return dict(self.smaller.config)

    def figures(self) -> records.Pruned:
        """What was removed."""
        before, after = self.body.dims, self.dims
        (total, inside), (left, left_inside) = self.body.total, self.body.count(after)
        return records.Pruned(
            before=_sizes(before), after=_sizes(after), parameters_before=total, parameters=left,
            share=1 - left / total, share_of_layers=1 - left_inside / inside,
            removed_layers=sorted(set(range(before.layers)) - set(self.layers)),
        )  # fmt: skip


def _sizes(dims: Dims) -> dict[str, int]:
    return {
        "hidden_size": dims.hidden, "intermediate_size": dims.ffn, "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads, "num_hidden_layers": dims.layers,
    }  # fmt: skip
