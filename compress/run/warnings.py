"""What is no mistake in a recipe, but what its user should hear before the run: a line each.

Never imports torch, so that `validate` answers at once.
"""

from pathlib import Path

from compress.formats import openers
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import find_modules
from compress.recipe.load import load_evaluation_spec
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import CalibrationSpec, Recipe, is_local_source
from compress.run.plan import calibration_of
from compress.stages.quantize.plan import plan_matrices
from compress.system.fingerprint import sha256


def cautions(recipe: Recipe, base: Checkpoint | None = None) -> list[str]:
    """Lines for `Reporter.warn`.

    Args:
        recipe: valid.
        base: its model where that is here; some lines need its tensors' names and shapes.
    """
    lines = [
        f"stages.{number}.lm_head: a quantized head in format gptq is opened by GPTQModel; transformers with optimum "
        "takes it for a missing one and fills it with random weights (for transformers, use format: compressed-tensors)"
        for number, stage in enumerate(recipe.stages)
        if isinstance(stage, WeightOnlyStage) and stage.format == "gptq" and stage.lm_head
    ]
    if recipe.evaluate is not None and any(stage.calibrates for stage in recipe.stages):
        calibration, evaluation = calibration_of(recipe), load_evaluation_spec(recipe.evaluate.text)
        if _same_text(calibration, evaluation):
            lines.append(
                f"calibration and evaluate.text are the same text ({evaluation.name or Path(evaluation.source).name}), "
                "which flatters the reported accuracy; calibrate on another, such as general_en"
            )
    for number, stage in enumerate(recipe.stages):
        if base is not None:
            where, modules, kind = f"stages.{number}", find_modules(base), str(base.config.get("model_type"))
            matrices = plan_matrices(stage, base, where)
            lines += openers.cautions(stage.layout, matrices, modules.linears, modules.embeddings, kind, where)
    return lines


def _same_text(one: CalibrationSpec, other: CalibrationSpec) -> bool:
    """The same file by its bytes, or the same split of a hub dataset; how many samples are drawn does not matter."""
    if not (is_local_source(one.source) and is_local_source(other.source)):
        return (one.source, one.subset, one.split) == (other.source, other.subset, other.split)
    first, second = Path(one.source).expanduser(), Path(other.source).expanduser()
    if not (first.is_file() and second.is_file()):
        return False  # reading them says so
    if first.samefile(second):
        return True
    return first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second)
