"""Single weights of every linear become zero, as its inputs arrive: shapes, config and size on disk stay.

SparseGPT solves for what the original model puts out, whose drift so far it makes good by half, as GPTQ does
(compress/quant/error_propagation.py): a fifth less divergence on tiny-wiki-llama at 2:4. Few calibration tokens count
for less, likewise.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from compress import records
from compress.errors import ModelError
from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.reference import Pair, ReferenceModel
from compress.loop.stream import LayerStream
from compress.model.arch import depth_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import find_modules, has_own_head
from compress.prune.patterns import has_pattern, magnitude, output_error, solver_mask, wanda
from compress.quant.error_propagation import PropagatedError
from compress.quant.gptq import factorize, sparsify, visiting_order
from compress.quant.statistics import Gram, gram
from compress.recipe.prune import PatternStage
from compress.stages.contract import Result
from compress.stages.layerwise import LayerTransform, Layerwise
from compress.stages.quantize.few_tokens import damping, trust

_SPARSITY = 0.5  # where the recipe says none
_CORRECTION = 0.5  # share of the drift that is made good


class _Inputs(NamedTuple):
    """Sums over what linears with common inputs read.

    Args:
        names: of the linears, full.
        hessian: of their inputs; None where none is needed.
        propagated: what has drifted, by name.
    """

    names: list[str]
    hessian: Tensor | None
    propagated: dict[str, PropagatedError]


def sparsify_model(spec: PatternStage, parent: Checkpoint, output: Path, context: Context) -> Result:
    """Set weights of a checkpoint's decoder layers to zero.

    Args:
        spec: the stage.
        parent: a dense checkpoint.
        output: folder for parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, calibration tokens, progress.

    Raises:
        ModelError: damaged weights, layers without linears, or weights that are sparse already.
        NumericalError: NaN or inf on the way.
        OutputError: nothing can be written.
    """
    stage = _Sparsifying(spec, parent, context)
    return Layerwise(spec, parent, stage.stream, output, context).run(stage)


def check_not_sparse(tensors: Mapping[str, Tensor]) -> None:
    """Refuse a layer (tensors by full name) with a matrix that keeps 2 of every 4 weights, or 4 of every 8.

    Raises:
        ModelError: naming the matrix; what is removed or moved now would undo its zeros.
    """
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not name.endswith(".weight"):
            continue
        found = next((pattern for pattern in ("2:4", "4:8") if has_pattern(tensor, pattern)), None)
        if found is not None:
            raise ModelError(
                f"{name} is sparse already: {found.replace(':', ' of every ')} weights are kept; "
                "start from a dense checkpoint, and remove whole parts before single weights"
            )


class _Sparsifying(LayerTransform):
    """One prune stage with a pattern under way."""

    def __init__(self, spec: PatternStage, parent: Checkpoint, context: Context) -> None:
        self.spec, self.parent, self.context = spec, parent, context
        self.sparsity = _SPARSITY if spec.sparsity is None else spec.sparsity
        self.modules = find_modules(parent)
        self.stream = self._stream()
        self.reference: ReferenceModel | None = None
        self.linears = [
            name for name in self.modules.linears if isinstance(self.stream.model.get_submodule(name), nn.Linear)
        ]

    def _stream(self) -> LayerStream:
        """The parent; activations take half of what is free, since another model may run beside."""
        inside = [info for name, info in self.parent.tensors.items() if name.startswith(self.modules.layers + ".")]
        widths = [shape[1] for shape in self.modules.linears.values()]
        stored = sum(info.bytes for info in inside) // (depth_of(self.parent.config) or 1)
        room = self.context.room(5 * stored, max(widths), min(widths)) / 2
        return LayerStream(self.parent, self.context.device, self.context.dtype, self.context.trust_remote_code, room)

    def check(self, probe: Activations) -> None:
        """Refuse layers without linears, and linears whose inputs are not seen."""
        kind = self.stream.model.config.model_type
        if not self.linears:
            raise ModelError(f"model_type {kind!r} is not supported: its layers have no nn.Linear")
        if not self.spec.calibrates:
            return
        for index in range(self.stream.depth):
            prefix = self.stream.prefix(index)
            called = {prefix + name for group in self.stream.groups(index, probe) for name in group}
            unseen = next((name for name in self._inside(index) if name not in called), None)
            if unseen is not None:
                raise ModelError(
                    f"model_type {kind!r}: {unseen} is never used as a linear layer in the forward pass, so its inputs "
                    "are not seen; use method: magnitude"
                )

    def _inside(self, index: int) -> list[str]:
        return [name for name in self.linears if name.startswith(self.stream.prefix(index))]

    def start(self, calibration: Activations | None, probe: Activations) -> None:
        """Put the original model beside the sparse one, where its activations are aimed at."""
        if calibration is not None and self.spec.method == "sparsegpt":
            self.reference = ReferenceModel(self._stream(), calibration.copy(), probe.copy())

    def load(self, stream: LayerStream, index: int) -> dict[str, Tensor]:
        """As stored; a model that is sparse already is refused at its first layer."""
        tensors = super().load(stream, index)
        if index == 0:
            check_not_sparse(tensors)
        return tensors

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], list[records.AnyModule]]:
        """Make one layer sparse, group by group, so that each sees what the ones before it put out now."""
        found: dict[str, Tensor] = {}
        modules: list[records.AnyModule] = []
        for inputs in self._steps(index, tensors, calibration):
            weights = {name: tensors[f"{name}.weight"] for name in inputs.names}
            stored = {}
            for name, (target, sparse) in self._solve(weights, inputs).items():
                stored[f"{name}.weight"] = sparse.to(weights[name].dtype)
                modules.append(_described(name, target, stored[f"{name}.weight"], inputs.hessian))
            self.stream.fill_layer(index, stored)
            found |= stored
        return tensors | found, modules

    def _steps(self, index: int, tensors: Mapping[str, Tensor], calibration: Activations | None) -> Iterator[_Inputs]:
        """Linears with common inputs, in the order in which they are called; all at once where no inputs are needed."""
        linears, prefix = self._inside(index), self.stream.prefix(index)
        if calibration is None:
            yield _Inputs(linears, None, {})
        elif self.reference is None:
            for group, arrivals in self.stream.steps(index, calibration):
                names = [prefix + local for local in group if prefix + local in linears]
                yield _Inputs(names, gram(arrival.input for arrival in arrivals) if names else None, {})
        else:
            for group, pairs, writing in self.reference.beside(self.stream, index, calibration, tensors):
                names = [prefix + local for local in group if prefix + local in linears]
                writers = [name for name in names if name.removeprefix(prefix) in writing]
                yield _drifted(names, {name: tensors[f"{name}.weight"] for name in writers}, pairs if names else ())

    def _solve(self, weights: Mapping[str, Tensor], inputs: _Inputs) -> dict[str, tuple[Tensor, Tensor]]:
        """What matrices with common inputs should be, and what they become; [O, I] each, by name."""
        pattern, sparsity, hessian = self.spec.pattern, self.sparsity, inputs.hessian
        if hessian is None or not weights:
            return {name: (weight, magnitude(weight, pattern, sparsity)) for name, weight in weights.items()}
        if self.spec.method == "wanda":
            return {name: (weight, wanda(weight, hessian, pattern, sparsity)) for name, weight in weights.items()}
        assert self.context.tokens is not None, "inputs are those of calibration tokens"
        tokens, columns, diagonal = self.context.tokens.count, len(hessian), hessian.diagonal()
        mask = solver_mask(pattern, sparsity, silent=diagonal <= 0)
        order = visiting_order(diagonal, 1, act_order=False)
        factor = factorize(hessian, order, damping(tokens, columns, self.spec.damp))
        share, solved = _CORRECTION * trust(tokens, columns), {}
        for name, weight in weights.items():
            target = inputs.propagated[name].correct(weight.float(), hessian, share)
            solved[name] = target, sparsify(target, factor, mask)[0]
        return solved

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A finished layer as it was written; the original model goes through the layer too."""
        if self.reference is not None:
            self.reference.run(index, self.stream.load_layer(index))
        return dict(tensors)

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], list[records.AnyModule]]:
        """Embeddings, last norm and head stay."""
        return tensors, []

    def config(self) -> dict[str, Any]:
        """The parent's; a head that is stored with values of its own is not tied."""
        config: dict[str, Any] = dict(self.parent.config)
        if has_own_head(self.parent, self.modules):
            config["tie_word_embeddings"] = False
        return config


def _drifted(names: list[str], writers: Mapping[str, Tensor], pairs: Iterable[Pair]) -> _Inputs:
    """Sums over all batches.

    Args:
        names: of linears with common inputs.
        writers: the weights of those whose output is added to the residual stream.
        pairs: for each batch, their input and what the original model has in front of them.
    """
    hessian, readers = Gram(), PropagatedError()
    propagated = {name: PropagatedError(writers[name]) if name in writers else readers for name in names}
    for batch, beside in pairs:
        assert beside is not None, "the original model runs beside"
        hessian.add(batch)
        for each in dict.fromkeys(propagated.values()):
            each.add(batch, beside.original, None, beside.residual)
    return _Inputs(names, hessian.total(), propagated)


def _described(name: str, weight: Tensor, sparse: Tensor, hessian: Tensor | None) -> records.SparseModule:
    """What the report says of a matrix."""
    return records.SparseModule(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        zeros=float((sparse == 0).float().mean()),
        error=None if hessian is None else output_error(weight.float(), sparse.float(), hessian),
    )
