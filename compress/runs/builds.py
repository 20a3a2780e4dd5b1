"""Tries the shapes that stages will make: whether the installed transformers builds such a model, before any work."""

from compress.errors import ModelError, RecipeError
from compress.loop.skeleton import check_builds
from compress.runs.plan import RunPlan


def check_planned(planned: RunPlan) -> None:
    """Build every model that a stage gives new shapes, on the meta device.

    Raises:
        RecipeError: what transformers refuses, with its reason and what to do.
    """
    for plan in planned.stages:
        if plan.builds is None or plan.shapes is None:
            continue
        shapes = {name: info.shape for name, info in plan.shapes.tensors.items()}
        try:
            check_builds(plan.shapes.config, shapes)
        except ModelError as error:
            where, _, remedy = plan.builds.partition(": ")
            raise RecipeError([f"{where}: {error}; {remedy}"]) from error
