"""The resumable walk over a model's layers: what a stage does to each of them is the stage's own.

Each finished layer is a file of its own, and a run that was stopped continues behind the last one. It replays the
finished layers with the weights that were written, which gives the activations that an uninterrupted run had, bit for
bit.
"""

import json
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from compress import records
from compress.errors import NumericalError
from compress.forecast_records import Forecast
from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.finite import all_finite
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint, merge_parts, read_part, write_part
from compress.model.side_files import copy_side_files
from compress.recipe.types import StageSpec
from compress.stages.contract import Result
from compress.system import distributed
from compress.system.files import write_text
from compress.system.memory import PeakMemory

_OUTER = "outer.safetensors"
_PACE = 2  # the layer whose time the others are taken to need: the first one pays for what starts with it


class LayerTransform(ABC):
    """What a stage does to a model. `Layerwise` calls the methods in the order in which they stand here."""

    calibrated: bool = True  # whether calibration text, where the stage has some, goes through the layers here

    def before_layers(self) -> None:
        """Change what the layers' inputs are computed from (the embeddings)."""
        return

    def check(self, probe: Activations) -> None:
        """Refuse a model, before anything costly is computed; `probe` is in front of the first layer."""
        return

    def start(self, calibration: Activations | None, probe: Activations) -> None:
        """Get ready with the activations in front of the first layer."""
        return

    def load(self, stream: LayerStream, index: int) -> dict[str, Tensor]:
        """The tensors of a layer, as `transform` gets them; the stream's layer is filled with them."""
        raw = stream.load_layer(index)
        check_finite(raw)
        stream.fill_layer(index, raw)
        return raw

    @abstractmethod
    def transform(
        self, index: int, tensors: dict[str, Tensor], calibration: Activations | None, probe: Activations
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Change a layer, which `load` has brought, and run `calibration` through it.

        Returns:
            The tensors to write, by full name, and what the report says of them. The layer is left as it runs then.
        """

    @abstractmethod
    def restore(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take up a layer that was finished before, from what was written for it; returns what it runs with."""

    @abstractmethod
    def after_layers(
        self, tensors: dict[str, Tensor], calibration: Activations | None
    ) -> tuple[dict[str, Tensor], Sequence[records.AnyModule]]:
        """Change what lies outside the layers (head, norm, embeddings); as `transform`."""

    def metadata(self, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, str]:
        """What every file's header says, from the shapes of all tensors."""
        return {}

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json of the result."""

    def extra_files(self, config: dict[str, Any]) -> Mapping[str, str]:
        """Further files of the result: their content by name."""
        return {}


class Layerwise:
    """One walk.

    Args:
        spec: the stage.
        parent: the checkpoint that the stream reads.
        stream: the layer loop.
        output: folder for the parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, calibration tokens, progress.
    """

    def __init__(
        self, spec: StageSpec, parent: Checkpoint, stream: LayerStream, output: Path, context: Context
    ) -> None:
        self.spec, self.parent, self.stream, self.output, self.context = spec, parent, stream, output, context

    @torch.no_grad()
    def run(self, stage: LayerTransform) -> Result:
        """Walk through the model.

        Raises:
            NumericalError: NaN or inf in the weights, or on the way.
            OutputError: nothing can be written.
        """
        started, memory, stream = time.monotonic(), PeakMemory(self.context.device), self.stream
        parts = [self.output / f"layer-{index:05d}.safetensors" for index in range(stream.depth)]
        if distributed.rank() == 0:
            self.output.mkdir(parents=True, exist_ok=True)
        finished = distributed.first(lambda: [part.exists() and _note(part).exists() for part in parts])
        if any(finished):
            self.context.reporter.say(f"continuing behind {sum(finished)} finished layers")
        check_finite(self.parent.load(self._outer_names(), self.context.device))
        calibration, probe = self._begin(stage)
        layers, foreseen = [], None
        with _Writer() as writer, self.context.reporter.task(self.spec.title, stream.depth, "layer") as advance:
            for index, part in enumerate(parts):
                begun = time.monotonic()
                if finished[index]:
                    layers.append(self._replay(stage, index, part, calibration))
                else:
                    raw = stage.load(stream, index)
                    tensors, modules = stage.transform(index, raw, calibration, probe)
                    del raw  # the next layer is read by then
                    seconds = time.monotonic() - begun
                    layers.append(records.Layer(layer=index, seconds=seconds, modules=list(modules)))
                    writer.write(part, tensors, layers[-1], self.context.device)
                stream.run_layer(index, probe)
                stream.empty_layer(index)
                advance()
                if foreseen is None and sum(not each for each in finished[: index + 1]) == _PACE:
                    ended = time.monotonic()
                    foreseen = ended - started + (ended - begun) * (stream.depth - index - 1)
        stream.close()
        outside, logits = self._outside(stage, calibration, probe)
        if distributed.rank() == 0:
            self._finish(stage, [self.output / _OUTER, *parts])
        host, gpu = memory.peak()
        record = records.Stage(
            kind=self.spec.kind, spec=self.spec.model_dump(mode="json"), seconds=time.monotonic() - started,
            peak_memory_bytes=host, peak_gpu_memory_bytes=gpu, cached=False, device=self._where(),
            dtype=str(self.context.dtype).removeprefix("torch."), resumed_layers=sum(finished),
            layers=layers + outside, forecast=Forecast(seconds=foreseen),
        )  # fmt: skip
        return Result(record, logits)

    def _where(self) -> str:
        """The device, for the record."""
        device, world = self.context.device, distributed.world()
        return str(device) if world == 1 else f"{world} x {device.type}"

    def _begin(self, stage: LayerTransform) -> tuple[Activations | None, Activations]:
        stage.before_layers()
        with self.stream.outer():
            probe = self.stream.start(self.context.probe)
            stage.check(probe)
            calibrated = self.spec.calibrates and stage.calibrated
            calibration = self.stream.start(self.context.calibration()) if calibrated else None
        stage.start(calibration, probe)
        return calibration, probe

    def _replay(self, stage: LayerTransform, index: int, part: Path, calibration: Activations | None) -> records.Layer:
        """Put a finished layer's weights back and run it."""
        tensors = {name: tensor.to(self.context.device) for name, tensor in read_part(part)[0].items()}
        self.stream.fill_layer(index, stage.restore(index, tensors))
        if calibration is not None:
            self.stream.run_layer(index, calibration)
        return records.Layer.model_validate_json(_note(part).read_text(encoding="utf-8"))

    def _outer_names(self) -> list[str]:
        """Names of the tensors outside the decoder layers."""
        inside = self.stream.arch.layers + "."
        return [name for name in self.parent.tensors if not name.startswith(inside)]

    def _outside(
        self, stage: LayerTransform, calibration: Activations | None, probe: Activations
    ) -> tuple[list[records.Layer], Tensor]:
        """Write embeddings, norm and head; returns also what the finished model says to the probe."""
        started = time.monotonic()
        tensors, modules = stage.after_layers(self.parent.load(self._outer_names()), calibration)
        with self.stream.outer():
            logits = self.stream.logits(probe.get(0))[0].float().cpu()
        if distributed.rank() == 0:
            write_part(self.output / _OUTER, tensors, {})
        seconds = time.monotonic() - started
        return [records.Layer(layer=None, seconds=seconds, modules=list(modules))] if modules else [], logits

    def _finish(self, stage: LayerTransform, parts: list[Path]) -> None:
        """Join the parts to a checkpoint folder with everything that a loader wants."""
        folder = self.output / "checkpoint"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        merge_parts(parts, folder, stage.metadata)
        copy_side_files(self.parent.folder, folder)
        config = stage.config()
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        for name, content in stage.extra_files(config).items():
            write_text(folder / name, content)


class _Writer:
    """Writes one layer behind the computation of the next; in the process that leads, and nowhere else."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "write")
        self._writing: Future[None] | None = None

    def write(self, part: Path, tensors: dict[str, Tensor], layer: records.Layer, device: torch.device) -> None:
        """Write a layer's tensors; what went wrong with the layer before is raised here."""
        self._wait()
        if distributed.rank() == 0:
            self._writing = self._thread.submit(_write, part, tensors, layer, _stream_behind(device))

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self._wait()


def _stream_behind(device: torch.device) -> torch.cuda.Stream | None:
    """A stream of a GPU that waits for what has been asked of it so far; None on a CPU."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    return stream


def _write(part: Path, tensors: dict[str, Tensor], layer: records.Layer, stream: torch.cuda.Stream | None) -> None:
    """Write a layer's tensors; a GPU copies them in `stream`, beside what it computes by then."""
    with torch.cuda.stream(stream):
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    write_text(_note(part), layer.model_dump_json())  # in front of the part, which says that the layer is done
    write_part(part, tensors, {})


def _note(part: Path) -> Path:
    """Where what the report says of a layer is kept: not in the part, which may become a shard of the result."""
    return part.with_suffix(".json")


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors (by name) that hold NaN or inf.

    Raises:
        NumericalError: naming the first.
    """
    found = {name: all_finite(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    if found and not bool(torch.stack(list(found.values())).all()):
        name = next(name for name, finite in found.items() if not finite)
        raise NumericalError(f"{name} holds NaN or inf: the model is damaged; download or export it again")
