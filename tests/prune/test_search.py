"""Shapes for a target, against brute force over all of them and against the parameters of real models."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import LLAMA_3B, LLAMA_8B, QWEN2_7B
from pruned import SETTING, planned
from random_models import make_model
from small_model import TRAINED
from transformers import AutoConfig, AutoModelForCausalLM

from compress.model.checkpoint import Checkpoint
from compress.model.shapes import Shapes
from compress.prune.axes import Anatomy, Dims, anatomy, head_choices, smaller_config
from compress.prune.search import search
from compress.recipe.quantize import WeightOnlyStage
from compress.stages.contract import Plan
from compress.stages.quantize.plan import plan as plan_quantize

AXES = ("ffn", "heads", "hidden", "layers")


# hidden of the 3B is cut by 384 at once: by what both 128 and its 24 heads divide
MODELS: dict[str, Shapes] = {
    "tiny": Checkpoint(TRAINED), "llama 8B": LLAMA_8B, "llama 3B": LLAMA_3B, "qwen2 7B": QWEN2_7B,
}  # fmt: skip
SETTINGS = settings(deadline=None, max_examples=40)


def prune_plan(model: Shapes, groups: Sequence[int] = (), **stage: Any) -> Plan:
    """The plan of a stage that stages with these groups follow."""
    following = [WeightOnlyStage(kind="quantize", group_size=group) for group in groups]  # type: ignore[arg-type]
    return planned(model, replace(SETTING, following=following), **stage)  # type: ignore[arg-type]


def dims_after(plan: Plan) -> Dims:
    assert plan.shapes is not None and not plan.problems, plan.problems
    return anatomy(plan.shapes).dims


def cost(body: Anatomy, dims: Dims) -> int:
    return body.count(dims)[0]


# what is found


def check_legal(body: Anatomy, after: Dims, axes: Sequence[str], group: int) -> None:
    before = body.dims
    assert body.refusal(after) is None
    assert (after.heads, after.kv_heads) in head_choices(before) and after.head_dim == before.head_dim
    assert [axis for axis in AXES if after.of_axis(axis) < before.of_axis(axis) and axis not in axes] == []
    assert all(after.of_axis(axis) <= before.of_axis(axis) for axis in AXES)
    assert after.hidden % group == 0 and after.ffn % group == 0 and after.heads * after.head_dim % group == 0
    for axis in ("ffn", "hidden"):
        width, whole = after.of_axis(axis), before.of_axis(axis)
        assert width == whole or width % (128 if whole >= 2048 else 64) == 0


@SETTINGS
@given(
    name=st.sampled_from(list(MODELS)),
    axes=st.lists(st.sampled_from(AXES), min_size=1, max_size=2, unique=True),
    sparsity=st.floats(0.02, 0.9),
    of=st.sampled_from(["all", "layers"]),
    group=st.sampled_from([-1, 64, 128]),
)
def test_a_share_is_met_by_a_legal_shape_or_the_nearest_is_named(
    name: str, axes: list[str], sparsity: float, of: str, group: int
) -> None:
    body = anatomy(MODELS[name])
    plan = prune_plan(MODELS[name], [group], axes=axes, target={"sparsity": sparsity, "of": of})
    if plan.problems:
        (problem,) = plan.problems
        assert problem.startswith(f"stages.0.target.sparsity: {sparsity:g} is reached by no shape over ")
        assert "; the nearest is sparsity 0." in problem
        return
    after = dims_after(plan)
    check_legal(body, after, axes, max(1, group))
    part = of == "layers"
    assert abs(1 - body.count(after)[part] / body.total[part] - sparsity) <= 0.02 + 1e-9
    assert plan.shapes is not None
    later = plan_quantize(WeightOnlyStage(kind="quantize", group_size=group), plan.shapes, SETTING)  # type: ignore[arg-type]
    assert not later.problems


@SETTINGS
@given(
    axes=st.lists(st.sampled_from(AXES), min_size=3, max_size=4, unique=True),
    left=st.floats(0.3, 0.95),
    group=st.sampled_from([32, 64, 128]),
)
def test_many_axes_at_once(axes: list[str], left: float, group: int) -> None:
    body = anatomy(MODELS["tiny"])
    parameters = int(left * body.total[0])
    plan = prune_plan(MODELS["tiny"], [group], axes=axes, target={"parameters": parameters})
    if plan.problems:  # few shapes have such groups
        assert group > 32 and "is reached by no shape over" in plan.problems[0]
        return
    after = dims_after(plan)
    check_legal(body, after, axes, group)
    assert abs(cost(body, after) - parameters) <= (0.02 + 1e-9) * body.total[0]


@pytest.mark.parametrize("multiple_of", [1, 8, 96])
def test_widths_are_a_multiple_of_what_is_asked(multiple_of: int) -> None:
    found = prune_plan(MODELS["tiny"], axes=["ffn"], target={"sparsity": 0.31}, multiple_of=multiple_of)
    assert dims_after(found).ffn % multiple_of == 0
    both = prune_plan(MODELS["tiny"], [64], axes=["ffn"], target={"sparsity": 0.31}, multiple_of=multiple_of)
    assert dims_after(both).ffn % math.lcm(64, multiple_of) == 0


def test_the_most_even_of_those_that_meet_the_target_comes_first() -> None:
    body = anatomy(MODELS["tiny"])
    axes, steps = ("ffn", "layers"), {"q": 1, "ffn": 8, "hidden": 8}
    found = search(body, axes, steps, 0.7 * body.total[0], lambda dims: cost(body, dims), False).best
    assert len(found) > 2

    def ratio(dims: Dims) -> float:
        return abs(math.log((dims.ffn / body.dims.ffn) / (dims.layers / body.dims.layers)))

    assert [ratio(dims) for dims in found] == sorted(ratio(dims) for dims in found)


# against brute force


def along(body: Anatomy, axis: str, multiples: dict[str, int]) -> Iterator[Dims]:
    """Every legal shape along one axis."""
    whole = body.dims
    for heads, groups in head_choices(whole) if axis == "heads" else ():
        if heads == whole.heads or heads * whole.head_dim % multiples["q"] == 0:
            yield replace(whole, heads=heads, kv_heads=groups)
    for value in range(1, whole.of_axis(axis) + 1) if axis != "heads" else ():
        if value == whole.of_axis(axis) or value % multiples.get(axis, 1) == 0:
            yield replace(whole, **{axis: value})


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(list(MODELS)),
    axis=st.sampled_from(AXES),
    left=st.floats(0.05, 1),
    step=st.sampled_from([1, 16, 64, 128]),
    at_most=st.booleans(),
)
def test_no_legal_shape_along_an_axis_is_nearer(name: str, axis: str, left: float, step: int, at_most: bool) -> None:
    body = anatomy(MODELS[name])
    multiples, wanted = {"q": step, "ffn": step, "hidden": step}, left * body.total[0]
    found = search(body, [axis], multiples, wanted, lambda dims: cost(body, dims), at_most)
    legal = [cost(body, dims) for dims in along(body, axis, multiples) if body.refusal(dims) is None]
    if not at_most and wanted < body.total[0]:  # a smaller model is asked for: the whole one is no answer
        legal = [each for each in legal if each != cost(body, body.dims)]
    allowed = [each for each in legal if each <= wanted] if at_most else legal
    if not allowed:
        assert not found.best
        return
    least = min(abs(each - wanted) for each in allowed)
    assert body.refusal(found.nearest) is None
    assert abs(cost(body, found.nearest) - wanted) == pytest.approx(least)
    assert bool(found.best) == (at_most or least <= 0.02 * body.total[0])
    if found.best:
        assert abs(cost(body, found.best[0]) - wanted) == pytest.approx(least)


# bytes


@SETTINGS
@given(
    name=st.sampled_from(["tiny", "qwen2 7B"]),
    axis=st.sampled_from(AXES),
    left=st.floats(0.4, 1.2),
    groups=st.sampled_from([(), (64,), (128,)]),
)
def test_bytes_after_all_stages_are_never_more(name: str, axis: str, left: float, groups: tuple[int, ...]) -> None:
    model = MODELS[name]
    target = int(left * model.bytes / (4 if groups else 1))
    plan = prune_plan(model, groups, axes=[axis], target={"bytes": target})
    if plan.problems:
        assert plan.problems[0].startswith("stages.0.target.bytes: ")
        return
    shapes = plan.shapes
    for group in groups:
        assert shapes is not None
        shapes = plan_quantize(WeightOnlyStage(kind="quantize", group_size=group), shapes, SETTING).shapes  # type: ignore[arg-type]
    assert shapes is not None and shapes.bytes <= target


def test_bytes_are_met_where_only_the_pruned_width_can_be_quantized(tmp_path: Path) -> None:
    """Groups of 64 do not divide 96 channels: they do divide the 64 that are left."""
    model = Checkpoint(make_model(tmp_path / "model", num_hidden_layers=12, vocab_size=4096))
    smallest = plan_quantize(
        WeightOnlyStage(kind="quantize", group_size=64),
        planned(model, shape={"intermediate_size": 64}).shapes,  # type: ignore[arg-type]
        SETTING,
    ).shapes
    assert smallest is not None
    enough = prune_plan(model, [64], axes=["ffn"], target={"bytes": smallest.bytes})
    assert dims_after(enough).ffn == 64
    (problem,) = prune_plan(model, [64], axes=["ffn"], target={"bytes": smallest.bytes - 1000}).problems
    assert "is reached by no shape over ffn" in problem and "intermediate_size 96 -> 64" in problem


def test_bytes_that_a_later_stage_can_not_reach_with_any_shape_are_said_in_numbers(tmp_path: Path) -> None:
    """Groups of 128 divide no width of 64."""
    model = Checkpoint(make_model(tmp_path / "model"))
    (problem,) = prune_plan(model, [128], axes=["ffn"], target={"bytes": "100KB"}).problems
    assert problem.startswith("stages.0.target.bytes: 100 kB ")
    assert "inf" not in problem and "nan" not in problem


# against real models


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {},
    "mistral": {},
}
SHAPES = [
    Dims(64, 96, 4, 2, 16, 4),
    Dims(64, 64, 4, 2, 16, 4),
    Dims(64, 96, 2, 1, 16, 4),
    Dims(64, 96, 2, 2, 16, 4),
    Dims(48, 96, 4, 2, 16, 4),
    Dims(64, 96, 4, 2, 16, 3),
    Dims(32, 80, 2, 1, 16, 2),
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model_that_transformers_builds(family: str, tied: bool, tmp_path: Path) -> None:
    sizes = FAMILIES[family] | {"num_hidden_layers": 4, "tie_word_embeddings": tied}
    body = anatomy(Checkpoint(make_model(tmp_path / "model", family, **sizes)))
    for dims in SHAPES:
        config = smaller_config(body, dims, range(dims.layers))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config))
        inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
        assert body.count(dims) == (sum(p.numel() for p in model.parameters()), inside), dims
