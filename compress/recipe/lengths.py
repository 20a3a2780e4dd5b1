"""How long sequences are where nobody said: 2048 tokens, or as many as the model has positions. Never imports torch."""

from pathlib import Path

from compress.recipe.load import is_bundled_spec, load_calibration_spec
from compress.recipe.schema import Recipe
from compress.recipe.text import DEFAULT_LENGTH, CalibrationSpec


def fitting_length(positions: int | None) -> int:
    """Tokens of a sequence for a model with so many positions; None has no limit."""
    return DEFAULT_LENGTH if positions is None else min(DEFAULT_LENGTH, positions)


def fitted_calibration(recipe: Recipe, positions: int | None) -> CalibrationSpec:
    """A recipe's calibration spec, read from its file where the recipe names one, with a length.

    A length that the recipe or a spec of the user's names stays, whatever the model's positions. The default, and that
    of a bundled spec, are fitted to them; more sequences then make up for shorter ones, unless their number was named.
    """
    spec = recipe.calibration
    bundled = isinstance(spec, str) and is_bundled_spec(spec)
    if isinstance(spec, str):
        spec = load_calibration_spec(spec, base=Path.cwd())
    if spec.sequence_length is not None and not bundled:
        return spec
    length, samples = min(spec.length, fitting_length(positions)), spec.samples
    if bundled or "samples" not in spec.model_fields_set:
        samples = -(-samples * spec.length // length)
    return spec.model_copy(update={"sequence_length": length, "samples": samples})


def shortened(recipe: Recipe, positions: int | None) -> list[str]:
    """A warning where an evaluation is shorter than usual because of the model's positions, or none."""
    length = fitting_length(positions)
    if recipe.evaluate is None or recipe.evaluate.sequence_length is not None or length == DEFAULT_LENGTH:
        return []
    return [
        f"evaluate: windows have {length} tokens and not {DEFAULT_LENGTH}, since the model has {positions} positions; "
        "figures of two lengths are never comparable"
    ]
