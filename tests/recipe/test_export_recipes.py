"""`export:` in a recipe: what it may say, and the exact line that each mistake gets."""

import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from compress.errors import RecipeError
from compress.recipe.export import TARGETS, ExportSpec, To, Type, stem_of
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe, json_schema

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - {kind: quantize}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str, base: str = BASE) -> Recipe:
    Path("r.yaml").write_text(base + text)
    return load_recipe("r.yaml", overrides=overrides)


def names(recipe: Recipe) -> list[str]:
    return [each.file_name(stem_of(recipe.name)) for each in recipe.export]


def test_names_alone_take_the_defaults_and_mappings_stand_between_them() -> None:
    recipe = load("export: [gguf, {to: gguf, type: q8_0, split: 1.5GiB}, onnx]\n")
    assert recipe.export == [
        ExportSpec(to="gguf"), ExportSpec(to="gguf", type="q8_0", split=3 << 29), ExportSpec(to="onnx")
    ]  # fmt: skip
    assert names(recipe) == ["a.gguf", "a-Q8_0.gguf", "onnx"]
    assert load("").export == [] == load("export: [gguf]\n", "export=[]").export


def test_what_is_shown_is_read_again() -> None:
    """As points of a sweep and the recipe in a report are."""
    recipe = load("export: [gguf, {to: gguf, type: f16, split: 4GB}, {to: onnx, int8_inputs: true}]\n")
    shown = recipe.shown()
    assert shown["export"][1] == {"to": "gguf", "type": "f16", "split": 4_000_000_000}
    assert load_recipe(shown).export == recipe.export


def test_set_reaches_into_an_export() -> None:
    recipe = load("export: [{to: gguf}]\n", "export.0.type=q8_0", "export.0.split=500MB")
    assert recipe.export == [ExportSpec(to="gguf", type="q8_0", split=500_000_000)]


def test_the_table_has_all_that_a_recipe_may_say() -> None:
    assert set(get_args(To)) == set(TARGETS)
    assert set(get_args(Type)) == {kind for target in TARGETS.values() for kind in target.types}
    options = {option for target in TARGETS.values() for option in target.options}
    assert options | {"to", "type"} == set(ExportSpec.model_fields)


@pytest.mark.parametrize(
    ("export", "lines"),
    [
        ("gguf", ["export: 'gguf' is not a list; write [a, b], or a line with a dash for each item"]),
        ("[ggfu]", ["export.0: 'ggfu' is not allowed; use gguf, onnx or openvino (did you mean gguf?)"]),
        ("[{to: ONNX}]", ["export.0.to: 'ONNX' is not allowed; use gguf, onnx or openvino (did you mean onnx?)"]),
        (
            "[{type: f32}]",
            ["export.0.to: is missing; add it. gguf: a file for llama.cpp; onnx: a folder for ONNX Runtime GenAI; "
             "openvino: one for OpenVINO."],
        ),
        (
            "[4]",
            ["export.0: 4 is not a mapping; write lines of key: value (to, type, split, int8_inputs, python)"],
        ),
        ("[gguf, {to: onnx, tpye: f32}]", ["export.1.tpye: unknown key; did you mean type?"]),
        ("[{to: gguf, type: q4_k}]", ["export.0.type: 'q4_k' is not allowed; use auto, f32, bf16, f16 or q8_0"]),
        ("[{to: onnx, type: bf16}]", ["export.0.type: 'bf16' is not allowed with to: onnx; use auto, f32"]),
        ("[{to: gguf, split: big}]", ["export.0.split: 'big' is not a size; write one such as 4GB"]),
        ("[{to: gguf, split: 0}]", ["export.0.split: 0 is not a size; write one such as 4GB"]),
        ("[{to: onnx, split: 4GB}]", ["export.0.split: is for to: gguf; leave it out"]),
        (
            f"[{{to: gguf, int8_inputs: true, python: {sys.executable}}}]",
            ["export.0.int8_inputs: is for to: onnx or openvino; leave it out",
             "export.0.python: is for to: onnx or openvino; leave it out"],
        ),
        (
            "[{to: onnx, int8_inputs: 3}]",
            ["export.0.int8_inputs: 3 is not allowed; use true or false"],
        ),
        ("[gguf, onnx, {to: gguf, split: 4GB}]", ["export: two would be called a.gguf; keep one"]),
        ("[onnx, {to: onnx, type: f32}]", ["export: two would be called onnx; keep one"]),
        (
            "[{to: onnx, python: nowhere/python}]",
            ["export.0.python: nowhere/python: no such file; the folder nowhere is not there; name an environment's "
             "bin/python, or leave it out"],
        ),
    ],
)  # fmt: skip
def test_mistakes_are_said_by_name(export: str, lines: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load(f"export: {export}\n")
    assert caught.value.problems == [f"r.yaml:6: {line}" for line in lines]


def test_a_stage_that_leaves_a_gguf_file_has_nothing_to_export() -> None:
    gguf = BASE.replace("{kind: quantize}", "{kind: quantize, format: gguf}")
    with pytest.raises(RecipeError) as caught:
        load("export: [onnx]\n", base=gguf)
    assert caught.value.problems == [
        "r.yaml:6: export: is for a checkpoint, and the last stage (format: gguf) leaves a .gguf file alone; remove "
        "one of the two, or run dscompress export on the model that it starts from"
    ]


def test_an_interpreter_is_found_from_the_recipe_on(folder: Path) -> None:
    (folder / "env").mkdir()
    (folder / "env" / "python").symlink_to(sys.executable)
    recipe = load("export: [gguf, {to: onnx, python: env/python}]\n")
    assert recipe.export[1].python == str(folder / "env" / "python")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a", "a"), ("org/a b", "org-a-b"), ("8b.v2 bits=3,8", "8b.v2-bits=3,8"), ("../..", "model"),
        ("é" * 400, "é" * 100),
    ],
)  # fmt: skip
def test_a_recipes_name_becomes_a_files(name: str, stem: str) -> None:
    assert stem_of(name) == stem


def test_editors_accept_names_and_mappings() -> None:
    schema: dict[str, Any] = json_schema()
    name, mapping = schema["properties"]["export"]["items"]["anyOf"]
    assert name == {"enum": ["gguf", "onnx", "openvino"], "type": "string"}
    assert mapping == {"$ref": "#/$defs/ExportSpec"}
    split = schema["$defs"]["ExportSpec"]["properties"]["split"]["anyOf"]
    assert [option["type"] for option in split] == ["integer", "string", "null"]
