"""Recipes that train, checked against their models: other models that they name, texts, stages behind each other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_up import LLAMA_8B
from pydantic import TypeAdapter
from random_models import make_model
from trained import write_text

from compress.errors import ModelError, RecipeError
from compress.recipe.load import load_recipe
from compress.recipe.schema import bundled_dir
from compress.recipe.text import CalibrationSpec
from compress.runs.plan import RunPlan, plan_run
from compress.stages import KINDS
from compress.stages.contract import Plan, Setting

SIZES = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, small/ of half the depth, wide/ with more logits."""
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "base")
    make_model(folder / "small", num_hidden_layers=1)
    make_model(folder / "wide", num_hidden_layers=1, vocab_size=4160)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where recipes are: with texts/, a folder of two, and copy.jsonl, the same as one of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    for seed, name in enumerate(("one", "two")):
        write_text(tmp_path / "texts" / f"{name}.jsonl", documents=8, seed=seed)
    shutil.copy(tmp_path / "texts" / "two.jsonl", tmp_path / "copy.jsonl")
    write_text(tmp_path / "other.jsonl", documents=8, seed=2)
    return tmp_path


def planned(
    base: Path | None, *stages: dict[str, Any], evaluate: Any = False, calibration: Any = "general_en", **others: Path
) -> RunPlan:
    """A recipe in this folder; `others` are models by the names that stages call them."""
    given = {"name": "r", "model": "org/base", "output": "out", "calibration": calibration, "evaluate": evaluate}
    Path("recipe.yaml").write_text(json.dumps(given | {"stages": stages}))
    return plan_run(load_recipe("recipe.yaml"), base, {f"org/{name}": folder for name, folder in others.items()})


def problems(base: Path, *stages: dict[str, Any], **more: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        planned(base, *stages, **more)
    return caught.value.problems


def distill(student: str = "org/small", **more: Any) -> dict[str, Any]:
    return {"kind": "distill", "student": student, "data": {"source": "other.jsonl", "sequence_length": 32}} | more


def finetune(**more: Any) -> dict[str, Any]:
    return {"kind": "finetune", "data": {"source": "other.jsonl", "sequence_length": 32}} | more


QUANTIZE = {"kind": "quantize", "group_size": 32, "reference": "base"}
PRUNE = {"kind": "prune", "shape": {"intermediate_size": 64}, "multiple_of": 32}
SPARSE = {"kind": "prune", "pattern": "2:4"}


# Texts


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": "copy.jsonl"}, True),
        ({"source": "texts"}, True),  # a folder that holds it
        ([{"source": "other.jsonl"}, {"source": "copy.jsonl", "weight": 3}], True),
        ([{"source": "other.jsonl"}, {"source": "texts"}], True),
        ("text.yaml", True),
        (None, True),  # the recipe's calibration text
        ({"source": "other.jsonl"}, False),
        ([{"source": "other.jsonl"}, {"source": "org/dataset"}], False),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_training_on_the_text_of_the_evaluation(data: Any, said: bool, there: bool, here: Path, models: Path) -> None:
    """Whether or not the model is here."""
    (here / "text.yaml").write_text("source: texts/two.jsonl\n")
    base, evaluate = models / "base" if there else None, {"text": "texts/two.jsonl", "sequence_length": 32}
    texts: dict[str, Any] = {"evaluate": evaluate, "calibration": {"source": "copy.jsonl"}}
    found = [line for line in planned(base, finetune(data=data), **texts).warnings if "is trained on" in line]
    wanted = (
        "stages.0: is trained on the text of the evaluation (two.jsonl), which flatters the reported accuracy; train "
        "or measure on another"
    )
    assert found == ([wanted] if said else [])
    healed = PRUNE | {"heal": {"data": data}}
    assert (wanted in planned(base, healed, **texts).warnings) == said


def test_a_folder_without_text_is_left_to_who_reads_it(here: Path) -> None:
    (here / "empty").mkdir()
    evaluate = {"text": "texts/two.jsonl", "sequence_length": 32}
    assert planned(None, finetune(data={"source": "empty"}), evaluate=evaluate).warnings == []


# Other models


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"text_config": {}}, "llama is a multimodal model; give its text model alone as a folder"),
        ({"is_encoder_decoder": True}, "model_type 'llama' is no decoder-only language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized (gptq)"),
        ({"num_hidden_layers": 3}, "config.json says 3 layers, the weights have 1"),
        ({"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "odd.Odd"}}, "model_type 'odd' comes with code of"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_teacher_or_student_is_looked_at_as_the_recipes_model_is(
    config: dict[str, Any], said: str, there: bool, here: Path, models: Path
) -> None:
    folder = Path(shutil.copytree(models / "small", here / "strange"))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | config))
    for stage in (finetune(loss="kl", teacher="org/strange"), distill("org/strange")):
        with pytest.raises(ModelError) as caught:
            planned(models / "base" if there else None, stage, strange=folder)
        assert str(caught.value).startswith(f"org/strange: {said}") and "\n" not in str(caught.value)


def test_a_teacher_that_is_a_mixture_of_experts(here: Path, models: Path) -> None:
    folder = make_model(here / "experts", "mixtral", num_local_experts=2, num_experts_per_tok=1, **SIZES)
    with pytest.raises(ModelError, match=r"^org/experts: mixtral is a mixture of experts \(.+\); only dense models"):
        planned(models / "base", finetune(loss="kl", teacher="org/experts"), experts=folder)
    with pytest.raises(ModelError, match=r"^org/empty: .*config\.json"):
        planned(models / "base", distill("org/empty"), empty=here / "texts")


def test_a_student_with_other_logits_than_the_recipes_model(here: Path, models: Path) -> None:
    """They may be padded differently where nothing compares the two."""
    said = (
        "stages.0.student: has 4160 logits and the recipe's model 4096, and the evaluation compares the two; make the "
        "student `model`"
    )
    evaluate = {"text": "texts/two.jsonl", "sequence_length": 32}
    base, wide = models / "base", models / "wide"
    taught = f"{said} and org/base its `teacher`"
    assert problems(base, distill("org/wide"), evaluate=evaluate, wide=wide) == [taught]
    for stage in (distill("org/wide", losses={"ce": 1}), distill("org/wide", teacher="org/wide")):
        assert problems(base, stage, evaluate=evaluate, wide=wide) == [said]
    assert planned(base, distill("org/wide"), wide=wide).parts
    assert planned(base, distill(), evaluate=evaluate, small=models / "small").parts


# Stages behind each other


@pytest.mark.parametrize("between", [[], [PRUNE], [finetune()]])
def test_layers_of_a_student_of_its_own_are_not_compared_with_the_bases(
    between: list[dict[str, Any]], here: Path, models: Path
) -> None:
    number = 1 + len(between)
    assert problems(models / "base", distill(), *between, QUANTIZE, small=models / "small") == [
        f"stages.{number}.reference: is base, and stages.0 goes on with another model (student), whose layers are not "
        "base's; use parent"
    ]
    assert planned(models / "base", distill(), *between, QUANTIZE | {"reference": "parent"}, small=models / "small")
    trained = distill() | {"student": None}
    assert planned(models / "base", trained, *between, QUANTIZE)


def test_a_student_of_another_width_is_said_once(here: Path, models: Path) -> None:
    narrow = make_model(here / "narrow", **SIZES)
    (found,) = problems(models / "base", distill("org/narrow"), QUANTIZE, narrow=narrow)
    assert found.startswith("stages.1.reference: ")


@pytest.mark.parametrize("between", [[], [finetune()], [finetune(), finetune()]])
def test_additions_behind_a_stage_that_makes_zeros(between: list[dict[str, Any]], here: Path, models: Path) -> None:
    stages, number = [SPARSE, *between], 1 + len(between)
    assert problems(models / "base", *stages, finetune(lora={})) == [
        f"stages.{number}.lora: stages.0 makes zeros, and low-rank additions would fill them; train the weights "
        "themselves (remove lora)"
    ]
    assert planned(models / "base", *stages, finetune())
    assert planned(models / "base", finetune(lora={}), SPARSE)
    another = distill(lora={})  # which has no zeros
    assert planned(models / "base", *stages, another, small=models / "small")


# What a bundled recipe says of memory


@pytest.mark.parametrize(
    ("change", "gigabytes"),
    [
        ({}, 44),
        ({"lora": None, "optimizer": "adamw8bit"}, 86),
        ({"lora": None, "optimizer": "adamw8bit", "targets": "cached"}, 70),
    ],
)
def test_the_recipe_for_an_8b_model_says_the_memory_that_a_dry_run_prints(
    change: dict[str, Any], gigabytes: int
) -> None:
    file = bundled_dir("recipes") / "8b_prune_35.yaml"
    (written,) = yaml.safe_load(file.read_text())["stages"]
    spec = TypeAdapter(KINDS["prune"].load_spec()).validate_python(written | {"heal": written["heal"] | change})
    setting = Setting("stages.0", CalibrationSpec(source="text.txt", sequence_length=2048), base=LLAMA_8B)
    shapes: Any = LLAMA_8B
    for part in KINDS["prune"].parts(spec, shapes, setting):
        found: Plan = KINDS[part.kind].plan().plan(part, shapes, setting)
        assert not found.problems
        shapes = found.shapes
    least = dict(found.lines)["memory"].partition(" GB")[0]
    assert round(float(least)) == gigabytes
    assert f" {gigabytes} GB" in file.read_text()
