"""Recipes that ask for more than can be meant: each gets its line at once, whatever PyYAML would make of it."""

import time
from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.recipe.load import load_recipe

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: quantize\n"
TOO_DEEP = "is nested more than 20 levels deep; no key of a recipe is"
TOO_LONG = "is too long; a name in a path can have 240 bytes, the path 3,900"
TOO_MUCH = "its aliases (*) stand for themselves or for too much; write the values out"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdef", "bcdefg", strict=True)
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def problems(text: str, *overrides: str, **options: Any) -> list[str]:
    Path("r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", overrides=overrides, **options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: " + "[" * 100_000, f"r.yaml:1: {TOO_DEEP}"),
        ("- " * 100_000, f"r.yaml:1: {TOO_DEEP}"),
        ("\n".join(" " * depth + "a:" for depth in range(1000)), f"r.yaml:21: {TOO_DEEP}"),
        (BOMB, f"r.yaml:1: {TOO_MUCH}"),
        ("k: 1\n" * 15_000, "r.yaml:10000: has more than 20,000 keys and values; no recipe has"),
        (
            "".join(f"k{number}: 1\n" for number in range(200_000)),
            "r.yaml: has more than 1,000,000 bytes; name a YAML file",
        ),
        ("a: " + "9" * 5000, "r.yaml:1: a number has 5,000 characters; use at most 100, or put text in quotes"),
        ("a: 0x" + "f" * 6000, "r.yaml:1: a number has 6,002 characters; use at most 100, or put text in quotes"),
        ("a: 1" + ":1" * 5000, "r.yaml:1: a number has 10,001 characters; use at most 100, or put text in quotes"),
        ("a: !!bool x\n", "r.yaml:1: not YAML: 'x' is not what its tag says"),
    ],
    ids=["flow", "sequences", "blocks", "bomb", "keys", "size", "digits", "hexadecimal", "base 60", "bool"],
)
def test_more_than_a_recipe_can_mean_is_refused_at_once(text: str, line: str) -> None:
    started = time.monotonic()
    assert problems(text) == [line]
    assert time.monotonic() - started < 5


def test_what_is_set_has_the_same_limits() -> None:
    assert problems(BASE, "stages=" + "[" * 100_000) == [f"--set stages={'[' * 190}...: {TOO_DEEP}"]
    assert problems(BASE, ".".join("a" * 30) + "=1") == [f"--set {'.'.join('a' * 30)}=1: {TOO_DEEP}"]


def test_only_so_many_problems_are_looked_for() -> None:
    assert len(problems(BASE + "".join(f"k{number}: 1\n" for number in range(9_000)))) == 50
    assert len(problems("name: a\n" * 9_000)) == 50


@pytest.mark.parametrize("key", ["name", "model", "output", "calibration"])
def test_nul_in_a_text(key: str) -> None:
    (line,) = problems(BASE, f'{key}="a\\0b"')
    assert line.endswith(f": {key}: holds a NUL character, which no name or path can have; remove it")


@pytest.mark.parametrize("output", ["o" * 300, f"{'o' * 300}/x", "o/" * 3000])
def test_output_that_is_too_long(output: str) -> None:
    (line,) = problems(BASE, output=f"/{output}")
    assert line == f"--output: '/{output[:55]}... {TOO_LONG}"


@pytest.mark.parametrize("model", ["m" * 300, f"org/{'m' * 300}", f"package:p/{'m' * 300}.gguf"])
def test_model_that_is_too_long(model: str) -> None:
    assert problems(BASE, model=model) == [f"--model: '{model[:56]}... {TOO_LONG}"]
