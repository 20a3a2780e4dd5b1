"""The quantize stage by itself, without a runner around it."""

from pathlib import Path

from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, write_part
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.records import Stage
from compress.stages.quantize.run import run

PROBE = "probe.safetensors"


def quantize(
    spec: WeightOnlyStage | WeightActivationStage, parent: Checkpoint, output: Path, context: Context
) -> Stage:
    """Run the stage; what the finished model says to the probe goes into the file PROBE in `output`."""
    result = run(spec, parent, output, context)
    write_part(output / PROBE, {"logits": result.logits}, {})
    return result.record
