"""Recipes that prune and then quantize, planned from headers alone: the later stage sees the smaller model."""

import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command import invoke
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import make_model
from small_model import TRAINED

from compress.errors import ModelError, RecipeError
from compress.loop.skeleton import check_builds
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import parameter_count
from compress.prune.axes import anatomy
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import Recipe
from compress.recipe.shape import Shape
from compress.recipe.text import CalibrationSpec
from compress.recipe.train import DistillStage, FinetuneStage
from compress.recipe.types import StageSpec
from compress.runs.builds import check_planned
from compress.runs.plan import Part, RunPlan, plan_run
from compress.stages import KINDS
from compress.stages.contract import Plan, Setting
from compress.stages.prune.plan import plan, planned_shapes

SETTING = Setting("stages.0", CalibrationSpec(source="text.txt", samples=2, sequence_length=32))
RECIPE = """\
name: small
model: {model}
calibration: {{source: text.txt, samples: 2, sequence_length: 32}}
evaluate: false
output: out
stages:
  - {prune}
  - {{kind: quantize, group_size: {group}}}
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("The old library stood at the corner of two quiet streets.\n" * 30)


def write(prune: str, group: int = 128) -> None:
    """A recipe for the trained model: hidden 256, ffn 768, 6 layers, 8 heads of 32."""
    Path("recipe.yaml").write_text(RECIPE.format(model=TRAINED, prune=f"{{kind: prune, {prune}}}", group=group))


def test_the_group_size_is_checked_against_what_pruning_leaves() -> None:
    """128 divides 768 channels, not 576; and 640, where pruning may choose."""
    write("shape: {intermediate_size: 576}")
    for arguments in (["validate", "recipe.yaml"], ["run", "recipe.yaml", "--dry-run"]):
        refused = invoke(*arguments)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert refused.stderr == (
            "error: stages.1.group_size: 128 does not divide the width 576 of model.layers.*.mlp.down_proj "
            "(6 layers); use -1 or 32 or 64\n"
        )
    write("shape: {intermediate_size: 576}", group=64)
    assert invoke("validate", "recipe.yaml").stdout == "recipe.yaml: valid\n"
    write("target: {sparsity: 0.11}")
    assert invoke("validate", "recipe.yaml").stdout == "recipe.yaml: valid\n"


def test_problems_of_both_stages_come_at_once() -> None:
    write("shape: {intermediate_size: 1000}")
    Path("recipe.yaml").write_text(Path("recipe.yaml").read_text().replace("group_size: 128", 'ignore: ["*.up_prj"]'))
    lines = invoke("validate", "recipe.yaml").stderr.splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "stages.0.shape.intermediate_size",
        "stages.1",
    ]


def test_a_dry_run_prints_the_shape_and_both_shares() -> None:
    write("importance: greedy, shape: {intermediate_size: 512, num_attention_heads: 4}")
    body = anatomy(Checkpoint(TRAINED))
    left = body.count(replace(body.dims, ffn=512, heads=4))
    shares = [100 * (1 - after / before) for before, after in zip(body.total, left, strict=True)]
    printed = invoke("run", "recipe.yaml", "--dry-run").stdout
    shown = dict(re.findall(r"^(\w+) +(.+)$", printed, re.MULTILINE))
    assert shown["shape"] == "intermediate_size 768 -> 512, num_attention_heads 8 -> 4"
    removed = (body.total[0] - left[0]) / 1e6
    assert shown["removed"] == (
        f"{removed:.2f}M of 5.77M parameters: {shares[0]:.1f} % of all, {shares[1]:.1f} % of the layers'"
    )
    assert "stage    prune ffn, heads (greedy, compensated)\n" in printed
    assert [line.split()[0] for line in printed.splitlines()] == [
        "model", "stage", "result", "shape", "removed", "memory", "disk", "time",
        "stage", "result", "memory", "disk", "time", "output",
    ]  # fmt: skip
    assert not Path("out").exists() and not Path(".dscompress").exists()


def test_a_dry_run_shows_all_shapes_that_will_be_compared() -> None:
    write("target: {sparsity: 0.3}, axes: [ffn, layers], multiple_of: 8, allocate: auto", group=-1)
    printed = invoke("run", "recipe.yaml", "--dry-run").stdout
    shapes = re.findall(r"^shape (\d)  (.+)$", printed, re.MULTILINE)
    assert [number for number, _ in shapes] == ["1", "2", "3"] and len(set(shapes)) == 3


# stages that stand for several

BODY = anatomy(Checkpoint(TRAINED))
TOTAL, INSIDE = BODY.total


CHANNEL = 3 * BODY.dims.hidden * BODY.dims.layers  # parameters of one channel in all layers


def parts_of(stage: Any) -> list[Any]:
    return KINDS[stage.kind].parts(stage, Checkpoint(TRAINED), SETTING)


def steps_of(tokens: int = 900_000, **settings: Any) -> tuple[list[int], list[FinetuneStage]]:
    """The parameters that each step leaves, and its healing."""
    settings = {"axes": ["ffn"], "multiple_of": 1, **settings}
    stage = PruneStage.model_validate({"kind": "prune", "heal": {"tokens": tokens, "loss": "ce"}, **settings})
    found = parts_of(stage)
    assert [part.kind for part in found] == ["prune", "finetune"] * (len(found) // 2)
    left, shapes = [], BODY.dims
    for part in found[::2]:
        planned = plan(part, Checkpoint(TRAINED), SETTING)
        assert not planned.problems and isinstance(planned.spec, PruneStage) and isinstance(planned.spec.shape, Shape)
        sizes = planned.spec.shape.sizes
        assert all(sizes[key] <= size for key, size in shapes.sizes.items()), "what is gone comes back"
        shapes = replace(
            BODY.dims, ffn=sizes["intermediate_size"], heads=sizes["num_attention_heads"],
            kv_heads=sizes["num_key_value_heads"], layers=sizes["num_hidden_layers"], hidden=sizes["hidden_size"],
        )  # fmt: skip
        assert BODY.refusal(shapes) is None
        left.append(BODY.count(shapes)[0])
    return left, found[1::2]


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(2, 8),
    sparsity=st.floats(0.1, 0.55),
    of=st.sampled_from(["all", "layers"]),
    tokens=st.integers(12, 10**9),
)
def test_steps_remove_what_their_schedule_says(steps: int, sparsity: float, of: str, tokens: int) -> None:
    """All by another rule than the code's, to within a channel: by differences, by ratios, by what is still to go."""
    removed = sparsity * (TOTAL if of == "all" else INSIDE)
    for schedule in ("linear", "geometric", "cubic"):
        left, heals = steps_of(tokens, target={"sparsity": sparsity, "of": of}, steps=steps, schedule=schedule)
        assert left[-1] == pytest.approx(TOTAL - removed, abs=CHANNEL)
        assert all(b > a for b, a in pairwise([TOTAL, *left]))
        if len(left) == steps:  # none was smaller than a channel
            before = [TOTAL, *left[:-1]]
            if schedule == "linear":
                gone = [b - a for b, a in zip(before, left, strict=True)]
                assert gone == pytest.approx([removed / steps] * steps, abs=2 * CHANNEL)
            elif schedule == "geometric":
                wanted = [TOTAL * (1 - removed / TOTAL) ** (n / steps) for n in range(1, steps + 1)]
                assert left == pytest.approx(wanted, abs=2 * CHANNEL)
            else:
                still = [each - (TOTAL - removed) for each in before]
                wanted = [removed * (1 - n / steps) ** 3 for n in range(steps)]
                assert still == pytest.approx(wanted, abs=2 * CHANNEL)
        else:
            assert schedule == "cubic" and removed * (1 / steps) ** 3 < 2 * CHANNEL
        assert {heal.tokens for heal in heals} == {tokens // len(left)}
        assert all((heal.loss, heal.kind) == ("ce", "finetune") for heal in heals)


@pytest.mark.parametrize(("share", "steps"), [(0.1, 1), (0.35, 1), (0.37, 2), (0.57, 2), (0.59, 3), (0.71, 3)])
def test_where_nobody_says_how_many_steps_none_removes_much_more_than_a_third(share: float, steps: int) -> None:
    """(1 - 0.35)^n of the model is left behind n steps."""
    left, heals = steps_of(target={"sparsity": share}, axes=["ffn", "heads", "layers"], multiple_of=8)
    assert len(left) == len(heals) == steps


@pytest.mark.parametrize("axes", [["ffn"], ["ffn", "heads"], ["ffn", "heads", "hidden", "layers"]])
def test_steps_on_coarse_sizes_end_where_one_step_does(axes: list[str]) -> None:
    """Widths in multiples that the usual kernels like: fewer shapes lie between than there are steps."""
    coarse: dict[str, Any] = {"axes": axes, "multiple_of": None, "target": {"sparsity": 0.5}}
    left, _ = steps_of(**coarse, steps=8)
    (once,) = steps_of(**coarse, steps=1)[0]
    assert left[-1] == once and 1 < len(left) <= 8


def test_one_step_keeps_its_target_and_its_tokens() -> None:
    for target in ({"sparsity": 0.2}, {"parameters": 5_000_000}, {"bytes": 9_000_000}):
        stage = PruneStage.model_validate({"kind": "prune", "heal": {"tokens": 77}, "target": target})
        pruning, heal = parts_of(stage)
        assert (pruning.target, heal.tokens, heal.loss) == (stage.target, 77, "kl")
    assert parts_of(pruning) == [pruning]  # nothing to heal


def test_a_target_that_is_not_reached_is_refused_in_the_words_of_the_recipe() -> None:
    stage = PruneStage.model_validate({"kind": "prune", "heal": {}, "steps": 4, "target": {"sparsity": 0.95}})
    pruning, _ = parts_of(stage)
    (problem,) = plan(pruning, Checkpoint(TRAINED), SETTING).problems
    assert problem.startswith("stages.0.target.sparsity: 0.95 is reached by no shape over ffn")


def test_healing_keeps_what_its_settings_say() -> None:
    stage = PruneStage.model_validate(
        {
            "kind": "prune", "target": {"sparsity": 0.2},
            "heal": {
                "data": [{"source": "text.txt", "weight": 2.0}], "lora": {"rank": 4}, "teacher": "org/t", "draws": 9,
                "targets": "cached", "patience": 3,
            },
        }
    )  # fmt: skip
    _, heal = parts_of(stage)
    assert stage.heal is not None
    for key in type(stage.heal).model_fields:
        assert getattr(heal, key) == getattr(stage.heal, key), key


def test_a_run_prunes_in_steps_to_about_what_one_step_leaves() -> None:
    def parameters(**more: Any) -> list[int]:
        stage = {"kind": "prune", "target": {"sparsity": 0.5}, "axes": ["ffn", "heads"], "multiple_of": 8, **more}
        recipe = Recipe.model_validate(
            {
                "name": "r", "model": str(TRAINED), "output": "out", "stages": [stage],
                "calibration": {"source": "text.txt", "sequence_length": 32},
            }
        )  # fmt: skip
        planned = plan_run(recipe, TRAINED)
        assert [part.number for part in planned.parts] == [0] * len(planned.parts)
        return [parameter_count(part.plan.shapes) for part in planned.parts if part.plan.shapes is not None]

    (once,) = parameters()
    for schedule in ("cubic", "linear", "geometric"):
        found = parameters(heal={"tokens": "1M"}, steps=3, schedule=schedule)
        assert len(found) == 6 and found[::2] == found[1::2]  # healing changes no shape
        assert found[-1] == once


def test_a_student_of_another_shape_is_pruned_first_and_then_taught() -> None:
    shape = {"intermediate_size": 512, "num_hidden_layers": 4}
    stage = DistillStage.model_validate({"kind": "distill", "shape": shape, "temperature": 2.0})
    pruning, distilling = KINDS["distill"].parts(stage, None, SETTING)
    assert pruning == PruneStage.model_validate({"kind": "prune", "shape": shape})
    assert distilling == stage.model_copy(update={"shape": None})
    plain = DistillStage.model_validate({"kind": "distill"})
    assert KINDS["distill"].parts(plain, None, SETTING) == [plain]


def test_bytes_hold_behind_the_last_stage() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "r", "model": str(TRAINED), "output": "out",
            "calibration": {"source": "text.txt", "sequence_length": 32},
            "stages": [{"kind": "prune", "target": {"bytes": "4.2MB"}}, {"kind": "quantize", "group_size": 64}],
        }
    )  # fmt: skip
    planned = plan_run(recipe, TRAINED)
    pruned, quantized = (plan.shapes for plan in planned.stages)
    assert pruned is not None and quantized is not None
    assert quantized.bytes <= 4_200_000 < pruned.bytes


# what transformers builds


def test_a_llama_whose_width_is_no_multiple_of_its_heads_is_not_built() -> None:
    body = anatomy(Checkpoint(TRAINED))
    good = planned_shapes(body, replace(body.dims, hidden=128, ffn=512, heads=4, layers=2))
    shapes = {name: info.shape for name, info in good.tensors.items()}
    check_builds(good.config, shapes)
    with pytest.raises(
        ModelError, match=r"hidden size \(128\) is not a multiple of the number of attention heads \(6\)"
    ):
        check_builds(good.config | {"num_attention_heads": 6}, shapes)
    with pytest.raises(ModelError, match=r"transformers gives model\.layers\.0\.\S+ the shape \[512, 128\] and not"):
        check_builds(good.config, shapes | {"model.layers.0.mlp.up_proj.weight": (480, 128)})


def test_a_shape_that_transformers_refuses_is_said_before_the_run() -> None:
    """As a shape that our own rules let through would be."""
    body = anatomy(Checkpoint(TRAINED))
    shapes = planned_shapes(body, replace(body.dims, heads=6, kv_heads=3))
    text = CalibrationSpec(source="text.txt")
    recipe = Recipe.model_validate(
        {"name": "r", "model": "m", "output": "o", "stages": [{"kind": "prune", "shape": {"num_key_value_heads": 3}}]}
    )
    part = Part(0, recipe.stages[0], Plan(shapes, builds=True))
    with pytest.raises(RecipeError) as caught:
        check_planned(RunPlan(recipe, None, text, 32, [part], [], {}))
    (problem,) = caught.value.problems
    assert problem.startswith("stages.0: transformers cannot build this model: ")
    assert "(256) is not a multiple of the number of attention heads (6)" in problem
    assert problem.endswith("; choose another shape") and "/tmp" not in problem
    part = replace(part, plan=replace(part.plan, builds=False))
    check_planned(RunPlan(recipe, None, text, 32, [part], [], {}))


def test_what_becomes_of_a_pattern_is_said(tmp_path: Path) -> None:
    pattern = PatternStage.model_validate({"kind": "prune", "pattern": "2:4"})
    kept = WeightOnlyStage(kind="quantize", group_size=32, pattern="2:4")
    lost, whole = (
        kept.model_copy(update={"pattern": None}),
        PruneStage.model_validate({"kind": "prune", "target": {"sparsity": 0.1}}),
    )
    model = Checkpoint(make_model(tmp_path / "model"))

    def planned(stage: StageSpec) -> Plan:
        return plan(pattern, model, replace(SETTING, following=[stage]))

    assert not planned(kept).warnings and not planned(kept).problems
    (warning,) = planned(lost).warnings
    assert warning.startswith("stages.1: ") and warning.endswith("pattern: 2:4 in that stage keeps them")
    (problem,) = planned(whole).problems
    assert problem.startswith("stages.1: removes whole parts behind a pattern")
