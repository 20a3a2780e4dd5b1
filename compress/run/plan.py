"""A recipe beside its model: everything that would stop a run is said before it starts. Never imports torch."""

from pathlib import Path

from compress.model.arch import check_code, check_supported
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import check_depth, check_length
from compress.recipe.load import load_calibration_spec
from compress.recipe.schema import CalibrationSpec, Recipe
from compress.stages.quantize.cache_plan import check_cache
from compress.stages.quantize.plan import plan_matrices


def open_model(folder: Path, recipe: Recipe) -> Checkpoint:
    """A recipe's model, checked against everything that the recipe asks of it.

    Raises:
        ModelError: a damaged or unsupported model, or sequences longer than its positions.
        RecipeError: modules or group sizes that do not fit the model.
    """
    checkpoint = Checkpoint(folder)
    check_supported(checkpoint.config, {n: info.shape for n, info in checkpoint.tensors.items()}, recipe.model)
    check_code(checkpoint.config, recipe.model, recipe.trust_remote_code)
    check_depth(checkpoint)
    for number, stage in enumerate(recipe.stages):
        plan_matrices(stage, checkpoint, f"stages.{number}")
        check_cache(stage, checkpoint, f"stages.{number}")
    if any(stage.calibrates for stage in recipe.stages):
        check_length(checkpoint, calibration_of(recipe).sequence_length, "calibration.sequence_length")
    if recipe.evaluate is not None:
        check_length(checkpoint, recipe.evaluate.sequence_length, "evaluate.sequence_length")
    return checkpoint


def calibration_of(recipe: Recipe) -> CalibrationSpec:
    """A recipe's calibration spec, read from its file where the recipe names one."""
    spec = recipe.calibration
    return spec if isinstance(spec, CalibrationSpec) else load_calibration_spec(spec, base=Path.cwd())
