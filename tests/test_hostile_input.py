"""Values that nobody meant, put in turn into every place of a recipe and of a config: one clear line each, or none."""

import json
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import invoke
from desk import RECIPE, RUN, Desk

VALUES: list[Any] = [
    None, True, False, 0, -1, 3, 10**18, 10**30, -(10**18), 0.5, 1e300, float("inf"), float("nan"), "", "1", "a\0b",
    "\u202e", "\x1b[2J\n", "x" * 5000, [], [None], [[1]], ["a"], {}, {"": None}, [0] * 1000, "../../etc/passwd",
    "/dev/null", "~root", "{{x}}", "%s", "*", "[", "package:x", "a/b",
]  # fmt: skip
CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "quantization_config", "text_config", "num_experts",
    "per_layer_config", "is_encoder_decoder", "tie_word_embeddings", "dtype",
)  # fmt: skip


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield Desk(tmp_path, stack)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in items:
        yield from places(inside, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = put(copy.get(path[0], {}) if isinstance(copy, dict) else copy[path[0]], path[1:], new)
    return copy


def check(*arguments: str) -> None:
    """What a command says is a valid answer or clear lines, and nothing is written."""
    before = sorted(Path.cwd().iterdir())
    result = invoke(*arguments)
    assert result.exit_code in (0, 2), arguments
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert bool(errors) == (result.exit_code == 2)
    assert result.exit_code == 0 or result.stderr == "".join(f"{line}\n" for line in errors)
    assert all(line.isprintable() and len(line) < 1100 for line in errors) and len(errors) < 10
    assert sorted(Path.cwd().iterdir()) == before


def test_recipes(desk: Desk) -> None:
    recipe, draw = yaml.safe_load(RECIPE), random.Random(0)
    stage = ("bits", "method", "dtype", "overrides", "ignore", "damp", "format", "smooth", "kv_cache", "symmetric")
    every = [*places(recipe), *(("stages", 0, key) for key in stage), ("revision",), ("calibration", "seed")]
    for path in every:
        for value in draw.sample(VALUES, 5):
            desk.write("recipe.yaml", yaml.safe_dump(put(recipe, path, value), allow_unicode=True))
            check("validate", "recipe.yaml")
            check(*RUN, "--dry-run")


def test_values_of_set(desk: Desk) -> None:
    draw = random.Random(0)
    for key in ("stages.0.bits", "stages.0", "model", "output", "calibration.source", "evaluate.windows", "x.y", "[0]"):
        for value in draw.sample(VALUES, 6):
            check("validate", "recipe.yaml", "--set", f"{key}={json.dumps(value)}")


def test_configs(desk: Desk) -> None:
    draw, config = random.Random(0), json.loads(desk.file("model/config.json").read_text())
    for key in CONFIG_KEYS:
        for value in draw.sample(VALUES, 6):
            desk.write("model/config.json", json.dumps(config | {key: value}))
            check("validate", "recipe.yaml")
            check("inspect", "model")
