"""The quantize stage: the linears of every decoder layer are replaced as their inputs arrive."""

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress import records
from compress.errors import RecipeError
from compress.formats.base import DTYPES, AnyGrid, AnyQuantized
from compress.formats.facts import measured_bits
from compress.formats.table import FORMATS
from compress.kernels.replayed import replays_on
from compress.loop.activations import Activations
from compress.loop.attention import received_attention
from compress.loop.context import Context
from compress.loop.groups import Group
from compress.loop.interleave import Arrival, Passes
from compress.loop.reference import Pair, ReferenceModel
from compress.loop.stream import LayerStream
from compress.model.arch import ATTENDED
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.model.shapes import find_modules, has_own_head, is_tied, model_dtype
from compress.prune.axes import LINEARS
from compress.quant.error_propagation import PropagatedError
from compress.quant.grid import FakeQuantize, Grid
from compress.quant.statistics import Gram, gram
from compress.recipe.gguf import GgufStage
from compress.recipe.quantize import QuantizeStage, WeightActivationStage, WeightOnlyStage
from compress.recipe.weights import WeightStage
from compress.stages.contract import Result
from compress.stages.layerwise import LayerTransform, Layerwise
from compress.stages.quantize.activations import ActivationScales
from compress.stages.quantize.few_tokens import few_tokens
from compress.stages.quantize.input_squares import InputSquares
from compress.stages.quantize.matrix import Matrix
from compress.stages.quantize.plan import plan_matrices
from compress.stages.quantize.preflight import check_calls, check_modules, check_weights
from compress.stages.quantize.solve import Solved, Solver
from compress.system import distributed

CODE_VERSION = 7
_LAST = tuple(name for name, (_, columns) in LINEARS.items() if columns == ("ffn",))  # a layer's last linear


def run(spec: QuantizeStage, parent: Checkpoint, output: Path, context: Context) -> Result:
    """Quantize the linears of a checkpoint.

    Args:
        spec: the stage.
        parent: a dense checkpoint.
        output: folder for parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, calibration tokens, progress.

    Raises:
        RecipeError: modules that the format or the group size can't hold.
        ModelError: damaged weights.
        CalibrationError: text that gives no scales for the inputs.
        NumericalError: NaN or inf on the way.
        OutputError: nothing can be written.
    """
    stage = _Quantization(spec, parent, output, context)
    if context.tokens is not None:
        amount = context.tokens.count, context.tokens.sequence_length
        for line in few_tokens(spec, list(stage.matrices.values()), *amount):
            context.reporter.warn(line)
    result = Layerwise(spec, parent, stage.stream, output, context).run(stage)
    modules = [m for layer in result.record.layers for m in layer.modules if isinstance(m, records.Module)]
    fallbacks = sum(module.fallback is not None for module in modules)
    if fallbacks:
        context.reporter.warn(f"{fallbacks} of {len(modules)} matrices fell back to round-to-nearest")
    if stage.squares is not None and context.tokens is not None:
        distributed.first(partial(stage.squares.join, stage.stream.depth, output / "checkpoint", context.tokens))
    shapes = {name: matrix.shape for name, matrix in stage.matrices.items()}
    bits = distributed.first(lambda: measured_bits(Checkpoint(output / "checkpoint").tensors, shapes))
    record = result.record.model_copy(update={"format": spec.format, "quantized_bits_per_weight": bits})
    return replace(result, record=record)


class _Alike(NamedTuple):
    """What linears with a common input have in common beside it, so that they share their sums.

    Args:
        weighted: whether tokens count by the attention that they receive.
        rounding: of their inputs; None where these stay as they are.
        writer: the linear itself, where its output is added to the residual stream as it is; else "".
    """

    weighted: bool
    rounding: FakeQuantize | None
    writer: str


@dataclass
class _Layer:
    """A layer while its linears are quantized.

    Args:
        index: of the layer.
        prefix: of its tensors' names.
        tensors: as they are stored, by full name.
        received: attention that each token receives, [B, S] a batch; None where it does not count.
        solved: what its linears have become so far.
        original: tensors of the layer that it was in the model that is aimed at.
    """

    index: int
    prefix: str
    tensors: dict[str, Tensor]
    received: list[Tensor] | None = None
    solved: dict[str, Solved] = field(default_factory=dict)
    original: dict[str, Tensor] = field(default_factory=dict)


class _Quantization(LayerTransform):
    """One quantize stage under way."""

    def __init__(self, spec: QuantizeStage, parent: Checkpoint, output: Path, context: Context) -> None:
        self.spec, self.parent, self.context = spec, parent, context
        self.matrices = {matrix.name: matrix for matrix in plan_matrices(spec, parent, "stages")}
        self.modules = find_modules(parent)
        self.format = FORMATS[spec.layout]
        self.dtype = model_dtype(parent)
        self.grids = {name: self._grid(matrix) for name, matrix in self.matrices.items()}
        problems = self.format.problems(
            {name: matrix.shape for name, matrix in self.matrices.items()}, self.grids, self._embeddings()
        )
        if problems:
            raise RecipeError([f"stages: {problem}" for problem in problems])
        tokens = 0 if context.tokens is None else context.tokens.count
        self.solver = Solver(spec, self.grids, tokens, replays_on(context.device))
        models = 2 if self.solver.correction else 1
        self.stream = LayerStream(parent, context.device, context.dtype, context.trust_remote_code, self._room(models))
        self.reference: ReferenceModel | None = None
        aims_at_base = isinstance(spec, WeightStage) and spec.reference == "base"
        self.original = context.base if aims_at_base else None  # None: the parent
        self.squares = InputSquares(output) if isinstance(spec, GgufStage) and spec.imatrix else None
        self.inputs: ActivationScales | None = None
        self.embedded: dict[str, Solved] = {}
        if isinstance(spec, WeightActivationStage):
            grids = {name: grid for name, grid in self.grids.items() if isinstance(grid, Grid)}
            self.inputs = ActivationScales(spec, self.matrices, grids, self.stream, self.format.rounds_inputs)

    def _room(self, models: int) -> float:
        """Bytes that the activations of each of so many models may take."""
        inside = {name: info for name, info in self.parent.tensors.items() if name.startswith(self.modules.layers)}
        layers = {name.removeprefix(self.modules.layers).split(".")[1] for name in inside}
        widths = [shape[1] for shape in self.modules.linears.values()]
        stored = sum(info.bytes for info in inside.values()) // len(layers)
        itemsize = min(DTYPES[info.dtype].itemsize for info in inside.values() if info.dtype in DTYPES)
        held = 2 + models * self.context.dtype.itemsize / itemsize
        if isinstance(self.spec, WeightActivationStage) and self.spec.smooth is not None:
            held += 4 / itemsize - 1  # what is read becomes float32
        return self.context.room(int(held * stored), max(widths), min(widths)) / models

    def _embeddings(self) -> list[str]:
        return [name for name in self.matrices if name == self.modules.embeddings]

    def _grid(self, matrix: Matrix) -> AnyGrid:
        if matrix.block is not None:
            return BLOCK_TYPES[matrix.block]
        return Grid(
            matrix.bits, matrix.group_size, matrix.symmetric, self.format.scale_dtype(self.dtype),
            self.format.zero_minimum, signed_scale=matrix.inputs is None, float8=matrix.dtype == "fp", rows=matrix.rows,
        )  # fmt: skip

    def before_layers(self) -> None:
        """Quantize the token embeddings where the spec asks, before anything is computed from them."""
        name = self.modules.embeddings
        if name in self.matrices:
            weight = self.parent.load([f"{name}.weight"], self.context.device)
            self.embedded = self.solver.solve({name: weight[f"{name}.weight"]}, None)
            self.stream.replaced[f"{name}.weight"] = self._weight(self.embedded[name].quantized)

    def check(self, probe: Activations) -> None:
        """Refuse modules that are no linears, are never called, or whose weights other code reads."""
        check_modules(self.stream, self.matrices)
        if self.spec.calibrates:
            check_calls(self.stream, self.matrices, probe)
        if isinstance(self.spec, WeightOnlyStage):  # no loader puts blocks of a .gguf in a module's place
            check_weights(self.stream, self.matrices, probe, self.spec.format)

    def start(self, calibration: Activations | None, probe: Activations) -> None:
        """Put the original model beside the quantized one, where its activations are aimed at."""
        if not self.solver.correction or calibration is None:
            return
        context = self.context
        model = self.original or self.parent
        stream = LayerStream(model, context.device, context.dtype, context.trust_remote_code, self.stream.room)
        if not self.stream.replaced and self.original is None:
            self.reference = ReferenceModel(stream, calibration.copy(), probe.copy())
            return
        with stream.outer():
            tokens = context.calibration()
            states = stream.start(tokens), stream.start(context.probe)
        layers = None if self.original is None else context.layers
        self.reference = ReferenceModel(stream, *states, layers)

    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a finished layer, dequantized; the original model goes through the layer too."""
        if self.inputs is not None:
            self.inputs.restore(self.stream.prefix(index), tensors)
        if self.reference is not None:
            source = self.stream.load_layer if self.original is None else self.reference.load
            self.reference.run(index, source(index))
        dense: dict[str, Tensor] = {}
        packed: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            module, _, local = name.rpartition(".")
            if module in self.grids and local in self.format.parts:
                packed.setdefault(module, {})[local] = tensor
            else:
                dense[name] = tensor
        for module, local_tensors in packed.items():
            unpacked = self.format.unpack(local_tensors, self.grids[module])
            dense[f"{module}.weight"] = self._weight(unpacked)
        return dense

    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], list[records.Module]]:
        """Quantize one layer, group by group as its inputs arrive."""
        stream = self.stream
        layer = _Layer(index, stream.prefix(index), tensors)
        if self.inputs is not None:
            self.inputs.prepare(index, tensors, calibration, probe)
        if calibration is None:
            for name in (name for name in self.matrices if name.startswith(layer.prefix)):
                self._solve(layer, (name.removeprefix(layer.prefix),), ())
        else:
            if self.spec.weight_rounding == "gptq" and any(map(self._is_attended, self._inside(layer))):
                layer.received = received_attention(stream, index, calibration)
            if self.reference is not None:
                layer.original = tensors if self.original is None else self.reference.load(index)
                for group, pairs, writing in self.reference.beside(stream, index, calibration, layer.original):
                    self._solve(layer, group, pairs, writing)
            else:
                for group, arrivals in stream.steps(index, calibration):
                    self._solve(layer, group, Passes(partial(map, _alone, arrivals)))
        if self.squares is not None:
            self.squares.keep(index)
        modules = [each.module for each in layer.solved.values()]  # in the order in which they are used
        scales = {} if self.inputs is None else self.inputs.tensors(index, layer.solved)
        return self._packed(tensors, layer.solved) | scales, modules

    def _inside(self, layer: _Layer) -> list[str]:
        return [name for name in self.matrices if name.startswith(layer.prefix)]

    def _weight(self, matrix: AnyQuantized) -> Tensor:
        """What a linear runs with, as loaders will have it."""
        return self.format.weight(matrix, self.context.dtype, self.format.dense(self.grids, self._embeddings()))

    def _is_attended(self, name: str) -> bool:
        return name.rpartition(".")[2] in ATTENDED

    def _solve(self, layer: _Layer, group: Group, pairs: Iterable[Pair], writing: Collection[str] = ()) -> None:
        """Quantize the linears of a group.

        Args:
            layer: gets what they have become.
            group: local names of the linears.
            pairs: for each batch, their input and what the original model has in front of them.
            writing: those whose output is added to the residual stream.
        """
        if self.squares is not None:
            pairs = self.squares.noting([layer.prefix + name for name in group], pairs)
        names = [layer.prefix + name for name in group if layer.prefix + name in self.matrices]
        if not names:
            deque(() if self.squares is None else pairs, maxlen=0)
            return
        if self.inputs is not None:
            inputs = Passes(partial(map, itemgetter(0), pairs))
            pairs = map(_unpaired, self.inputs.decide(names, inputs, layer.tensors))
        alike: dict[_Alike, list[str]] = {}
        for name in names:
            rounding = None if self.inputs is None else self.inputs.rounding[name]
            writer = name if name.removeprefix(layer.prefix) in writing else ""
            weighted = layer.received is not None and self._is_attended(name)
            alike.setdefault(_Alike(weighted, rounding, writer), []).append(name)
        found: dict[str, Solved] = {}
        for sums, members in self._accumulate(layer, alike, pairs):
            found |= self.solver.solve({n: layer.tensors[f"{n}.weight"] for n in members}, sums[0].total(), sums[1])
        if self.inputs is not None:
            found = self.inputs.described(found, layer.tensors)
        layer.solved.update(found)
        weights = {f"{n}.weight": self._weight(s.quantized) for n, s in found.items()}
        self.stream.fill_layer(layer.index, weights)

    def _accumulate(
        self, layer: _Layer, alike: Mapping[_Alike, list[str]], pairs: Iterable[Pair]
    ) -> Iterable[tuple[tuple[Gram, PropagatedError], list[str]]]:
        """The Hessian and the propagated error of each kind of linears, over all batches; given away one by one."""
        sums = {kind: (Gram(), self._propagated(layer, kind.writer)) for kind in alike}
        for number, (batch, beside) in enumerate(pairs if self.spec.weight_rounding == "gptq" else ()):
            for kind, (hessian, propagated) in sums.items():
                weight = layer.received[number] if kind.weighted and layer.received is not None else None
                hessian.add(batch if kind.rounding is None else kind.rounding(batch), weight)
                if beside is not None and self.reference is not None:
                    target = None
                    if kind.writer.endswith(_LAST):
                        target = self.reference.end(number, layer.tensors.get(f"{kind.writer}.bias"))
                    propagated.add(batch, beside.original, weight, beside.residual, target)
        for kind, members in alike.items():
            yield sums.pop(kind), members

    def _propagated(self, layer: _Layer, writer: str) -> PropagatedError:
        """For a linear that writes to the residual stream, or for others ("")."""
        if not writer:
            return PropagatedError()
        weight = layer.tensors[f"{writer}.weight"]
        if self.original is None:
            return PropagatedError(weight)
        return PropagatedError(weight, layer.original[f"{self._original_name(layer, writer)}.weight"])

    def _original_name(self, layer: _Layer, name: str) -> str:
        """A linear's name in the model that is aimed at."""
        assert self.reference is not None, "there is a model to aim at"
        return self.reference.prefix(layer.index) + name.removeprefix(layer.prefix)

    def _packed(self, raw: Mapping[str, Tensor], solved: Mapping[str, Solved]) -> dict[str, Tensor]:
        """Tensors to write: packed modules in place of their weights, the rest as it was stored."""
        kept = {name: tensor for name, tensor in raw.items() if name.removesuffix(".weight") not in solved}
        for name, each in solved.items():
            kept |= {f"{name}.{local}": tensor for local, tensor in self.format.pack(each.quantized).items()}
        return kept

    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], list[records.Module]]:
        """Quantize the output head where the spec asks, on what the last layer and the final norm put out."""
        solved = self.embedded | self._head(tensors, calibration)
        if is_tied(self.parent, self.modules):
            tensors.pop(f"{self.modules.head}.weight", None)  # stored once
        return self._packed(tensors, solved), [each.module for each in solved.values()]

    def _head(self, raw: Mapping[str, Tensor], calibration: Activations | None) -> dict[str, Solved]:
        name = self.modules.head
        if name not in self.matrices:
            return {}
        weight = raw.get(f"{name}.weight", raw.get(f"{self.modules.embeddings}.weight"))
        assert weight is not None, "plan_matrices names a head only where its weights are"
        with self.stream.outer():
            hessian = gram(map(self.stream.head_inputs, calibration or ()))
            solved = self.solver.solve({name: weight.to(self.context.device)}, hessian)
        self.stream.replaced[f"{name}.weight"] = self._weight(solved[name].quantized)
        return solved

    def metadata(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, str]:
        """As the format wants it."""
        return self.format.metadata(self.grids, shapes)

    def config(self) -> dict[str, Any]:
        """The parent's, with a `quantization_config`; a quantized head is no longer tied."""
        config: dict[str, Any] = dict(self.parent.config)
        grids = {self.stream.module_name(name): grid for name, grid in self.grids.items()}
        linears = [name for name, module in self.stream.model.named_modules() if isinstance(module, torch.nn.Linear)]
        config["quantization_config"] = self.format.config(
            grids,
            [name for name in linears if name not in grids],
            self._embeddings(),
            self.inputs.rounding if self.inputs else {},
            self.inputs.cache_strategy if self.inputs else None,
        )
        if isinstance(self.spec, GgufStage):
            config["quantization_config"]["mix"] = self.spec.type
        if self.modules.head in self.matrices or has_own_head(self.parent, self.modules):
            config["tie_word_embeddings"] = False
        if not config.get("dtype") and not config.get("torch_dtype"):
            config["dtype"] = str(DTYPES[self.dtype]).removeprefix("torch.")  # else loaders take that of some tensor
        return config

    def extra_files(self, config: dict[str, Any]) -> Mapping[str, str]:
        """As the format wants them."""
        return self.format.extra_files(config["quantization_config"])


def _alone(arrival: Arrival) -> Pair:
    """A batch as it arrives, with no original model beside it."""
    return arrival.input, None


def _unpaired(batch: Tensor) -> Pair:
    """The same of the batch itself; a `zip` would hold on to one more of them."""
    return batch, None
