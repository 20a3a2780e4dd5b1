"""A recipe beside its model: everything that would stop a run is said before it starts. Never imports torch."""

from pathlib import Path

from compress.model.arch import check_code, check_supported, positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import check_depth, check_length
from compress.recipe.lengths import fitted_calibration, fitting_length
from compress.recipe.schema import CalibrationSpec, EvaluateSpec, Recipe
from compress.stages.quantize.plan import plan_matrices


def open_model(folder: Path, recipe: Recipe) -> Checkpoint:
    """A recipe's model, checked against everything that the recipe asks of it.

    Raises:
        ModelError: a damaged or unsupported model, or sequences longer than its positions.
        RecipeError: modules or group sizes that do not fit the model.
    """
    checkpoint = Checkpoint(folder)
    check_supported(checkpoint.config, recipe.model)
    check_code(checkpoint.config, recipe.model, recipe.trust_remote_code)
    check_depth(checkpoint)
    for number, stage in enumerate(recipe.stages):
        plan_matrices(stage, checkpoint, f"stages.{number}")
    if any(stage.calibrates for stage in recipe.stages):
        check_length(checkpoint, calibration_of(recipe, checkpoint).length, "calibration.sequence_length")
    if recipe.evaluate is not None:
        check_length(checkpoint, evaluation_length(recipe.evaluate, checkpoint), "evaluate.sequence_length")
    return checkpoint


def calibration_of(recipe: Recipe, base: Checkpoint | None = None) -> CalibrationSpec:
    """A recipe's calibration spec, read from its file where the recipe names one, and fitted to its model."""
    return fitted_calibration(recipe, None if base is None else positions_of(base.config))


def evaluation_length(spec: EvaluateSpec, base: Checkpoint) -> int:
    """Tokens of an evaluation's window."""
    return spec.sequence_length or fitting_length(positions_of(base.config))
