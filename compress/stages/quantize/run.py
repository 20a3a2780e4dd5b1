"""The quantize stage: every decoder layer through the layer loop, its linears replaced as their inputs arrive.

Each finished layer is a file of its own; a run that was stopped continues behind the last one. It replays the finished
layers with the weights that were written, which gives the activations that an uninterrupted run had, bit for bit.
"""

import json
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import records
from compress.errors import NumericalError, RecipeError
from compress.formats.base import DTYPES
from compress.formats.table import FORMATS
from compress.loop.activations import Activations
from compress.loop.attention import received_attention
from compress.loop.finite import all_finite
from compress.loop.groups import Group
from compress.loop.interleave import Passes
from compress.loop.reference import Pair, ReferenceModel
from compress.loop.stream import LayerStream
from compress.model.arch import ATTENDED
from compress.model.checkpoint import Checkpoint, merge_parts, read_part, write_part
from compress.model.shapes import find_modules, model_dtype
from compress.quant.error_propagation import PropagatedError
from compress.quant.grid import FakeQuantize, Grid, Quantized
from compress.quant.statistics import Gram, gram
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.stages.context import Context
from compress.stages.quantize.activations import ActivationScales
from compress.stages.quantize.plan import Matrix, plan_matrices
from compress.stages.quantize.preflight import check_calls, check_modules, check_weights
from compress.stages.quantize.solve import Solved, Solver
from compress.system import distributed
from compress.system.files import write_text
from compress.system.memory import PeakMemory

CODE_VERSION = 7  # raised when the same inputs give other codes, so that old artefacts are not taken for new ones
_OUTER = "outer.safetensors"
PROBE = "probe.safetensors"
_NOT_COPIED = (  # by first and by last letters: weights, and what is written anew
    (".", "config.json", "README.md", "dscompress.json", "report."),
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json"),
)


def quantize(
    spec: WeightOnlyStage | WeightActivationStage, parent: Checkpoint, output: Path, context: Context
) -> records.Stage:
    """Quantize the linears of a checkpoint.

    Args:
        spec: the stage.
        parent: a dense checkpoint.
        output: folder for parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, calibration tokens, progress.

    Returns:
        The stage's record. The file PROBE in `output` holds the finished model's logits [S, V] on the probe.

    Raises:
        RecipeError: modules that the format or the group size can't hold.
        ModelError: damaged weights.
        CalibrationError: text that gives no scales for the inputs.
        NumericalError: NaN or inf on the way.
        OutputError: nothing can be written.
    """
    return _Quantization(spec, parent, output, context).run()


class _Quantization:
    """One quantize stage under way."""

    def __init__(
        self, spec: WeightOnlyStage | WeightActivationStage, parent: Checkpoint, output: Path, context: Context
    ) -> None:
        self.spec, self.parent, self.output, self.context = spec, parent, output, context
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
        self.solver = Solver(spec, self.grids)
        models = 2 if self.solver.correction else 1
        self.stream = LayerStream(parent, context.device, context.dtype, context.trust_remote_code, self._room(models))
        self.original: ReferenceModel | None = None
        self.inputs: ActivationScales | None = None
        if isinstance(spec, WeightActivationStage):
            self.inputs = ActivationScales(spec, self.matrices, self.grids, self.stream, self.format.rounds_inputs)
        self.resumed = 0

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

    def _grid(self, matrix: Matrix) -> Grid:
        return Grid(
            matrix.bits, matrix.group_size, matrix.symmetric, self.format.scale_dtype(self.dtype),
            self.format.zero_minimum, signed_scale=matrix.inputs is None, float8=matrix.dtype == "fp", rows=matrix.rows,
        )  # fmt: skip

    @torch.no_grad()
    def run(self) -> records.Stage:
        started, memory = time.monotonic(), PeakMemory(self.context.device)
        parts = [self.output / f"layer-{index:05d}.safetensors" for index in range(self.stream.depth)]
        if distributed.rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
        finished = distributed.first(lambda: [part.exists() for part in parts])
        self.resumed = sum(finished)
        if self.resumed:
            self.context.reporter.say(f"continuing behind {self.resumed} finished layers")
        _check_finite(self.parent.load(self._outer_names(), self.context.device))
        layers = self._layers(parts, finished)
        if distributed.rank() == 0:
            self._finish([self.output / _OUTER, *parts])
        fallbacks = sum(1 for layer in layers for module in layer.modules if module.fallback)
        if fallbacks:
            self.context.reporter.warn(f"{fallbacks} of {len(self.matrices)} matrices fell back to round-to-nearest")
        host, gpu = memory.peak()
        return records.Stage(
            kind=self.spec.kind, spec=self.spec.model_dump(mode="json"), seconds=time.monotonic() - started,
            peak_memory_bytes=host, peak_gpu_memory_bytes=gpu, cached=False, device=self._where(),
            dtype=str(self.context.dtype).removeprefix("torch."), resumed_layers=self.resumed, layers=layers,
        )  # fmt: skip

    def _where(self) -> str:
        """The device, for the record."""
        device, world = self.context.device, distributed.world()
        return str(device) if world == 1 else f"{world} x {device.type}"

    def _layers(self, parts: list[Path], finished: Sequence[bool]) -> list[records.Layer]:
        """Run all layers, then what lies outside of them; one part is written for each that was not finished before."""
        stream, records = self.stream, []
        outside = self._embed()
        with stream.outer():
            probe = stream.start(self.context.probe)
            check_modules(stream, self.matrices)
            if self.spec.calibrates:
                check_calls(stream, self.matrices, probe)
            if isinstance(self.spec, WeightOnlyStage):
                check_weights(stream, self.matrices, probe, self.spec.format)
            activations = stream.start(self._calibration()) if self.spec.calibrates else None
        if self.solver.correction and activations is not None:
            self.original = self._beside(activations, probe)
        with ThreadPoolExecutor(1, "write") as writer:
            writing: Future[None] | None = None
            with self.context.reporter.task(self.spec.title, stream.depth, "layer") as advance:
                for index, part in enumerate(parts):
                    if finished[index]:
                        records.append(self._replay(index, part, activations))
                    else:
                        tensors, record = self._transform(index, activations, probe)
                        if writing is not None:
                            writing.result()
                        if distributed.rank() == 0:
                            behind = _stream_behind(self.context.device)
                            writing = writer.submit(_write, part, tensors, record, behind)
                        records.append(record)
                    stream.run_layer(index, probe)
                    stream.empty_layer(index)
                    advance()
            if writing is not None:
                writing.result()
        stream.close()
        records += self._outside(outside, activations, probe)
        return records

    def _beside(self, activations: Activations, probe: Activations) -> ReferenceModel:
        """The original model, in front of its first layer as the quantized one is with these activations."""
        context = self.context
        stream = LayerStream(self.parent, context.device, context.dtype, context.trust_remote_code, self.stream.room)
        if not self.stream.replaced:
            return ReferenceModel(stream, activations.copy(), probe.copy())
        with stream.outer():
            return ReferenceModel(stream, stream.start(self._calibration()), stream.start(context.probe))

    def _calibration(self) -> Tensor:
        """This process's sequences."""
        assert self.context.tokens is not None, "the runner reads them where a stage calibrates"
        return self.context.tokens.tokens[distributed.rank() :: distributed.world()]

    def _replay(self, index: int, part: Path, activations: Activations | None) -> records.Layer:
        """Put a finished layer's weights back and run it."""
        tensors, metadata = read_part(part)
        tensors = {name: tensor.to(self.context.device) for name, tensor in tensors.items()}
        self.stream.fill_layer(index, self._dense(tensors))
        if self.inputs is not None:
            self.inputs.restore(self.stream.prefix(index), tensors)
        if activations is not None:
            self.stream.run_layer(index, activations)
        if self.original is not None:
            self.original.run(index, self.stream.load_layer(index))
        return records.Layer.model_validate_json(metadata["layer"])

    def _dense(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a part with the quantized modules dequantized."""
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

    def _weight(self, matrix: Quantized) -> Tensor:
        """What a linear runs with, as loaders will have it."""
        return self.format.weight(matrix, self.context.dtype, self.format.dense(self.grids, self._embeddings()))

    def _transform(
        self, index: int, activations: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], records.Layer]:
        """Quantize one layer; returns what is written for it and its record."""
        started = time.monotonic()
        stream, prefix = self.stream, self.stream.prefix(index)
        raw = stream.load_layer(index)
        _check_finite(raw)
        stream.fill_layer(index, raw)
        if self.inputs is not None:
            self.inputs.prepare(index, raw, activations, probe)
        solved: dict[str, Solved] = {}
        attended = {n for n in self.matrices if n.startswith(prefix) and n.rpartition(".")[2] in ATTENDED}
        solves = self.spec.weight_rounding == "gptq"
        wanted = attended and solves
        received = received_attention(stream, index, activations) if activations is not None and wanted else None

        def visit(group: Group, pairs: Iterable[Pair], writing: Collection[str] = ()) -> None:
            names = [prefix + name for name in group if prefix + name in self.matrices]
            if not names:
                return
            if self.inputs is not None:
                pairs = map(_alone, self.inputs.decide(names, Passes(partial(map, itemgetter(0), pairs)), raw))
            alike: dict[tuple[bool, FakeQuantize | None, str], list[str]] = {}
            for name in names:
                change = None if self.inputs is None else self.inputs.rounding[name]
                writer = name if name.removeprefix(prefix) in writing else ""
                alike.setdefault((received is not None and name in attended, change, writer), []).append(name)
            sums = {kind: (Gram(), PropagatedError(raw[f"{kind[2]}.weight"] if kind[2] else None)) for kind in alike}
            for number, (batch, beside) in enumerate(pairs if solves else ()):
                for (weighted, change, _), (hessian, drift) in sums.items():
                    weight = received[number] if weighted and received is not None else None
                    hessian.add(batch if change is None else change(batch), weight)
                    if beside is not None:
                        drift.add(batch, beside.original, weight, beside.residual)
            found: dict[str, Solved] = {}
            for kind, members in alike.items():
                hessian, drift = sums.pop(kind)
                found |= self.solver.solve({n: raw[f"{n}.weight"] for n in members}, hessian.total(), drift)
            if self.inputs is not None:
                found = self.inputs.described(found, raw)
            solved.update(found)
            stream.fill_layer(index, {f"{name}.weight": self._weight(each.quantized) for name, each in found.items()})

        if activations is None:
            for name in (each for each in self.matrices if each.startswith(prefix)):
                visit((name.removeprefix(prefix),), ())
        elif self.original is not None:
            for group, pairs, writing in self.original.beside(stream, index, activations, raw):
                visit(group, pairs, writing)
        else:
            stream.run_layer(index, activations, lambda group, x: visit(group, Passes(partial(map, _alone, x))))
        modules = [each.module for each in solved.values()]  # in the order in which they are used
        tensors = self._packed(raw, solved) | ({} if self.inputs is None else self.inputs.tensors(index, solved))
        return tensors, records.Layer(layer=index, seconds=time.monotonic() - started, modules=modules)

    def _packed(self, raw: Mapping[str, Tensor], solved: Mapping[str, Solved]) -> dict[str, Tensor]:
        """Tensors to write: packed modules in place of their weights, the rest as it was stored."""
        kept = {name: tensor for name, tensor in raw.items() if name.removesuffix(".weight") not in solved}
        for name, each in solved.items():
            kept |= {f"{name}.{local}": tensor for local, tensor in self.format.pack(each.quantized).items()}
        return kept

    def _outer_names(self) -> list[str]:
        """Names of the tensors outside the decoder layers."""
        return [name for name in self.parent.tensors if not name.startswith(self.modules.layers + ".")]

    def _embed(self) -> dict[str, Solved]:
        """Quantize the token embeddings where the spec asks, before anything is computed from them."""
        name = self.modules.embeddings
        if name not in self.matrices:
            return {}
        weight = self.parent.load([f"{name}.weight"], self.context.device)
        solved = self.solver.solve({name: weight[f"{name}.weight"]}, None)
        self.stream.replaced[f"{name}.weight"] = self._weight(solved[name].quantized)
        return solved

    def _head(self, raw: Mapping[str, Tensor], activations: Activations | None) -> dict[str, Solved]:
        """Quantize the output head where the spec asks, on what the last layer and the final norm put out."""
        name = self.modules.head
        if name not in self.matrices:
            return {}
        weight = raw.get(f"{name}.weight", raw.get(f"{self.modules.embeddings}.weight"))
        assert weight is not None, "plan_matrices names a head only where its weights are"
        with self.stream.outer():
            hessian = gram(map(self.stream.head_inputs, activations or ()))
            solved = self.solver.solve({name: weight.to(self.context.device)}, hessian)
        self.stream.replaced[f"{name}.weight"] = self._weight(solved[name].quantized)
        return solved

    def _outside(
        self, solved: dict[str, Solved], activations: Activations | None, probe: Activations
    ) -> list[records.Layer]:
        """Write embeddings, norm and head, and what the finished model says to the probe."""
        started = time.monotonic()
        raw = self.parent.load(self._outer_names())
        solved |= self._head(raw, activations)
        if self.parent.config.get("tie_word_embeddings") and f"{self.modules.embeddings}.weight" in raw:
            raw.pop(f"{self.modules.head}.weight", None)  # stored once
        with self.stream.outer():
            logits = self.stream.logits(probe.get(0))[0]
        if distributed.rank() == 0:
            write_part(self.output / _OUTER, self._packed(raw, solved), {})
            write_part(self.output / PROBE, {"logits": logits.float().cpu()}, {})
        modules = [each.module for each in solved.values()]
        return [records.Layer(layer=None, seconds=time.monotonic() - started, modules=modules)] if modules else []

    def _finish(self, parts: list[Path]) -> None:
        """Join the parts to a checkpoint folder with everything that a loader wants."""
        folder = self.output / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        merge_parts(parts, folder, partial(self.format.metadata, self.grids))
        for file in self.parent.folder.iterdir():
            if file.is_file() and not file.name.startswith(_NOT_COPIED[0]) and not file.name.endswith(_NOT_COPIED[1]):
                shutil.copyfile(file, folder / file.name)
        config: dict[str, Any] = dict(self.parent.config)
        grids = {self.stream.module_name(name): grid for name, grid in self.grids.items()}
        linears = [name for name, module in self.stream.model.named_modules() if isinstance(module, torch.nn.Linear)]
        unquantized = [name for name in linears if name not in grids]
        config["quantization_config"] = self.format.config(
            grids,
            unquantized,
            self._embeddings(),
            self.inputs.rounding if self.inputs else {},
            self.inputs.cache_strategy if self.inputs else None,
        )
        if self.modules.head in self.matrices:
            config["tie_word_embeddings"] = False
        if not config.get("dtype") and not config.get("torch_dtype"):
            config["dtype"] = str(DTYPES[self.dtype]).removeprefix("torch.")  # else loaders take that of some tensor
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for name, content in self.format.extra_files(config["quantization_config"]).items():
            write_text(folder / name, content)


def _stream_behind(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of a GPU that waits for what has been asked of it so far; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _write(part: Path, tensors: dict[str, Tensor], record: records.Layer, stream: torch.cuda.Stream | None) -> None:
    """Write a layer's tensors; a GPU copies them in `stream`, beside what it computes by then."""
    with torch.cuda.stream(stream):
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_part(part, tensors, {"layer": record.model_dump_json()})


def _alone(batch: Tensor) -> Pair:
    """A batch with no original model beside it."""
    return batch, None


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    found = {name: all_finite(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if found and not bool(torch.stack(list(found.values())).all()):
        name = next(name for name, finite in found.items() if not finite)
        raise NumericalError(f"{name} holds NaN or inf: the model is damaged; download or export it again")
