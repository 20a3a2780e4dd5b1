"""The prune stage: whole parts of a model (pruning.py), or single weights (sparse.py)."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compress.errors import ModelError
from compress.forecast_records import Forecast
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.prune.axes import Anatomy, Dims, anatomy
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.shape import Shape
from compress.records import Stage
from compress.stages.contract import Result
from compress.stages.layerwise import Layerwise
from compress.stages.prune import blocks, scores
from compress.stages.prune.plan import dims_of, words
from compress.stages.prune.pruning import Pruning
from compress.stages.prune.sparse import sparsify_model
from compress.system.memory import PeakMemory

CODE_VERSION = (1, blocks.CODE_VERSION, scores.CODE_VERSION)


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
    if isinstance(spec, PatternStage):
        return sparsify_model(spec, parent, output, context)
    body = anatomy(parent)
    shapes = [_dims(shape, body) for shape in (spec.shape if isinstance(spec.shape, list) else [spec.shape])]
    if len(shapes) == 1:
        return _to(shapes[0], spec, parent, body, output, context)
    return _best(shapes, spec, parent, body, output, context)


def _dims(shape: Shape | None, body: Anatomy) -> Dims:
    assert shape is not None, "the plan has filled it in"
    dims = dims_of(shape, body, "stages", {"q": 1, "ffn": 1, "hidden": 1})
    if isinstance(dims, str):
        raise ModelError(dims)
    return dims


def _to(dims: Dims, spec: PruneStage, parent: Checkpoint, body: Anatomy, output: Path, context: Context) -> Result:
    """Prune to one shape."""
    context.reporter.say(f"pruning: {words(dims, body.dims) or 'nothing changes'}")
    output.mkdir(parents=True, exist_ok=True)
    started, memory = time.monotonic(), PeakMemory(context.device)
    stage = Pruning(spec, parent, body, dims, output, context)
    host, gpu = memory.peak()  # of the ranking
    ranked = time.monotonic() - started
    result = Layerwise(spec, parent, stage.stream, output, context).run(stage)
    record = result.record
    figures = {
        "pruned": stage.figures(),
        "forecast": (record.forecast or Forecast()).later(ranked),
        "seconds": time.monotonic() - started,
        "peak_memory_bytes": _most(host, record.peak_memory_bytes),
        "peak_gpu_memory_bytes": _most(gpu, record.peak_gpu_memory_bytes),
    }
    return replace(result, record=record.model_copy(update=figures))


def _most(*bytes_: int | None) -> int | None:
    return max((each for each in bytes_ if each is not None), default=None)


def _best(
    shapes: Sequence[Dims], spec: PruneStage, parent: Checkpoint, body: Anatomy, output: Path, context: Context
) -> Result:
    """Prune to each shape, and keep the one with the least divergence on calibration text."""
    results = []
    for number, dims in enumerate(shapes):
        result = _to(dims, spec, parent, body, output / f"shape-{number}", context)
        assert result.record.pruned is not None and result.record.pruned.calibration_kl is not None
        results.append((result.record.pruned.calibration_kl, number, result))
        context = replace(context, fresh=False)  # what was ranked just now will do
        context.reporter.say(f"{words(dims, body.dims)}: KL {results[-1][0]:.4g} on the calibration text")
    _, number, best = min(results, key=lambda each: each[:2])
    shutil.rmtree(output / "checkpoint", ignore_errors=True)
    (output / f"shape-{number}" / "checkpoint").replace(output / "checkpoint")
    assert best.record.pruned is not None
    tried = {words(dims, body.dims): kl for dims, (kl, _, _) in zip(shapes, results, strict=True)}
    pruned = best.record.pruned.model_copy(update={"tried": tried})
    whole = [result.record for _, _, result in results]
    figures = {"pruned": pruned, "seconds": sum(each.seconds for each in whole), "forecast": _together(whole)}
    return replace(best, record=best.record.model_copy(update=figures))


def _together(stages: Sequence[Stage]) -> Forecast:
    """What was foreseen of each shape in its turn, where it was of all."""
    found = [each.forecast.seconds for each in stages if each.forecast is not None]
    seconds = [each for each in found if each is not None]
    return Forecast(seconds=sum(seconds) if len(seconds) == len(stages) else None)
