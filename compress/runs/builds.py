"""Tries the shapes that stages will make: whether the installed transformers builds such a model, before any work."""

from compress.errors import ModelError, RecipeError
from compress.loop.skeleton import check_builds
from compress.runs.plan import RunPlan


def check_planned(planned: RunPlan) -> None:
    """Build every model that a stage gives new shapes, on the meta device.

    Raises:
        RecipeError: what transformers refuses, with its reason and what to do.
    """
    for part in planned.parts:
        plan = part.plan
        if not plan.builds or plan.shapes is None:
            continue
        shapes = {name: info.shape for name, info in plan.shapes.tensors.items()}
        try:
            check_builds(plan.shapes.config, shapes)
        except ModelError as error:
            raise RecipeError([f"stages.{part.number}: {error}; choose another shape"]) from error
