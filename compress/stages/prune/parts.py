"""A prune stage that heals, as stages of its own: pruned and trained, in one step or several. Never imports torch."""

import math
from collections.abc import Sequence
from dataclasses import replace

from compress.errors import ModelError
from compress.model.shapes import Shapes
from compress.prune.axes import Anatomy, Dims, anatomy, head_choices
from compress.recipe.prune import PatternStage, PruneStage, Target
from compress.recipe.shape import AXIS_OF, Shape
from compress.recipe.train import FinetuneStage
from compress.recipe.types import StageSpec
from compress.stages.contract import Setting
from compress.stages.prune.plan import multiples_of, plan

_ONE_STEP = 0.35  # share of the parameters that goes in one step where nobody says how many there are


def parts(spec: PruneStage | PatternStage, shapes: Shapes | None, setting: Setting) -> list[StageSpec]:
    """The stage and its healing; several of both where the target is reached in steps."""
    if isinstance(spec, PatternStage) or spec.heal is None:
        return [spec]
    alone = spec.model_copy(update={"heal": None, "steps": None})
    stages = [alone] if shapes is None else _in_steps(spec, alone, shapes, setting)
    settings = spec.heal.model_dump(exclude_unset=True)
    tokens = max(1, spec.heal.tokens // len(stages))
    heal = FinetuneStage(**settings | {"kind": "finetune", "loss": spec.heal.loss, "tokens": tokens})
    return [
        each
        for number, stage in enumerate(stages)
        for each in (stage, heal.model_copy(update={"after": heal.after + number * tokens}))
    ]


def _in_steps(spec: PruneStage, alone: PruneStage, shapes: Shapes, setting: Setting) -> list[PruneStage]:
    """The pruning of each step; one where the target takes one, or can't be met, which its plan says."""
    if spec.target is None or spec.target.bytes is not None or spec.allocate == "auto":
        return [alone]
    found = plan(alone, shapes, setting)
    if found.problems or not isinstance(found.spec, PruneStage) or not isinstance(found.spec.shape, Shape):
        return [alone]
    try:
        body = anatomy(shapes)
    except ModelError:
        return [alone]
    last = _dims(found.spec.shape, body.dims)
    share = 1 - body.count(last)[0] / body.total[0]
    steps = spec.steps or max(1, math.ceil(math.log(1 - _wanted(spec.target, body)) / math.log(1 - _ONE_STEP) - 1e-9))
    multiples = multiples_of(spec, body, setting.following)
    on_the_way = [
        between(body, last, _done(number / steps, share, spec.schedule), multiples) for number in range(1, steps)
    ]
    kept = [body.dims]
    for dims in on_the_way:
        if dims not in (None, kept[-1], last):
            kept.append(dims)
    if not kept[1:]:
        return [alone]
    chosen = [Shape(**_sizes(dims, spec)) for dims in [*kept[1:], last]]
    return [alone.model_copy(update={"target": None, "shape": shape, "axes": spec.over}) for shape in chosen]


def _wanted(target: Target, body: Anatomy) -> float:
    """Share of all parameters that a target in sparsity or parameters removes."""
    total, inside = body.total
    if target.sparsity is None:
        return max(0.0, 1 - (target.parameters or total) / total)
    return target.sparsity * (inside / total if target.of == "layers" else 1.0)


def _dims(shape: Shape, whole: Dims) -> Dims:
    """Sizes of the model whose shape a plan has filled in."""
    sizes = whole.sizes | shape.sizes
    return Dims(
        sizes["hidden_size"], sizes["intermediate_size"], sizes["num_attention_heads"], sizes["num_key_value_heads"],
        whole.head_dim, sizes["num_hidden_layers"],
    )  # fmt: skip


def _sizes(dims: Dims, spec: PruneStage) -> dict[str, int]:
    return {key: size for key, size in dims.sizes.items() if AXIS_OF[key] in spec.over}


def between(body: Anatomy, last: Dims, done: float, multiples: dict[str, int]) -> Dims | None:
    """A legal shape on the way from a model to a smaller one; None where loaders accept none.

    Args:
        body: the model.
        last: the shape at the end of the way.
        done: how much of the way lies behind, 0 to 1.
        multiples: what ffn, hidden and the heads' joined width (q) must be a multiple of.
    """
    whole = body.dims

    def size(before: int, after: int, step: int) -> int:
        wanted = before - done * (before - after)
        return min(before, max(after, round(wanted / step) * step))

    dims = replace(
        whole,
        hidden=size(whole.hidden, last.hidden, multiples["hidden"]),
        ffn=size(whole.ffn, last.ffn, multiples["ffn"]),
        layers=size(whole.layers, last.layers, 1),
    )
    wanted = whole.heads - done * (whole.heads - last.heads)
    for heads, groups in sorted(_heads(whole, last, multiples), key=lambda each: abs(each[0] - wanted)):
        trial = replace(dims, heads=heads, kv_heads=groups)
        if body.refusal(trial) is None:
            return trial
    return None


def _heads(whole: Dims, last: Dims, multiples: dict[str, int]) -> Sequence[tuple[int, int]]:
    """Query and key-value heads from which the last ones can still be reached by removing some."""
    inside = last.heads // last.kv_heads
    return [
        (heads, groups)
        for heads, groups in head_choices(whole)
        if groups >= last.kv_heads
        and heads // groups >= inside
        and ((heads, groups) == (whole.heads, whole.kv_heads) or heads * whole.head_dim % multiples["q"] == 0)
    ]


def _done(progress: float, share: float, schedule: str) -> float:
    """Which part of what is to be removed is gone after a part of the steps.

    Cubic: Zhu and Gupta 2017, "To prune, or not to prune" (arXiv:1710.01878).
    """
    if schedule == "linear":
        return progress
    if schedule == "geometric":
        return (1 - (1 - share) ** progress) / share if share else progress
    return 1 - (1 - progress) ** 3
