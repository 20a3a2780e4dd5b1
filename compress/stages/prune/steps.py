"""A prune stage that heals, as stages of its own: pruned and trained, in one step or several. Never imports torch."""

import math

from compress.errors import ModelError
from compress.model.shapes import Shapes
from compress.prune.axes import anatomy
from compress.recipe.prune import PatternStage, PruneStage, Target
from compress.recipe.train import FinetuneStage
from compress.recipe.types import StageSpec

_ONE_STEP = 0.35  # share of the parameters that goes in one step where nobody says how many there are


def parts(spec: PruneStage | PatternStage, shapes: Shapes | None) -> list[StageSpec]:
    """The stage and its healing; several of both where the target is reached in steps."""
    if isinstance(spec, PatternStage) or spec.heal is None:
        return [spec]
    targets = _targets(spec, shapes)
    settings = spec.heal.model_dump(exclude_unset=True)
    tokens = max(1, spec.heal.tokens // len(targets))
    heal = FinetuneStage(**settings | {"kind": "finetune", "loss": spec.heal.loss, "tokens": tokens})
    return [
        stage
        for target in targets
        for stage in (spec.model_copy(update={"heal": None, "steps": None, "target": target}), heal)
    ]


def _targets(spec: PruneStage, shapes: Shapes | None) -> list[Target | None]:
    """What each step leaves, in parameters; one target, as it is, where there is one step."""
    if spec.target is None or spec.target.bytes is not None or shapes is None:
        return [spec.target]
    try:
        total, inside = anatomy(shapes).total
    except ModelError:  # the plan says so
        return [spec.target]
    if spec.target.sparsity is None:
        removed = float(total - (spec.target.parameters or total))
    else:
        removed = spec.target.sparsity * (inside if spec.target.of == "layers" else total)
    share = min(max(removed / total, 0.0), 1.0 - 1.0 / total)
    steps = spec.steps or max(1, math.ceil(math.log(1 - share) / math.log(1 - _ONE_STEP) - 1e-9))
    if steps == 1:
        return [spec.target]
    done = [_done(number / steps, share, spec.schedule) for number in range(1, steps + 1)]
    return [Target(parameters=round(total * (1 - share * each))) for each in done]


def _done(progress: float, share: float, schedule: str) -> float:
    """Which part of what is to be removed is gone after a part of the steps.

    Cubic: Zhu and Gupta 2017, "To prune, or not to prune" (arXiv:1710.01878).
    """
    if schedule == "linear":
        return progress
    if schedule == "geometric":
        return (1 - (1 - share) ** progress) / share if share else progress
    return 1 - (1 - progress) ** 3
