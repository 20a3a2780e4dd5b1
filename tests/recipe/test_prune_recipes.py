"""Recipes that prune: what they mean, and the exact line that each mistake gets."""

from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.recipe.load import load_recipe
from compress.recipe.prune import PatternStage, PruneStage, Target
from compress.recipe.schema import json_schema
from compress.recipe.shape import Shape

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: prune\n"
SIZES = "intermediate_size, num_attention_heads, num_key_value_heads, hidden_size, num_hidden_layers"
KEYS = (
    "kind, target, shape, axes, importance, compensate, damp, reconstruct, reconstruct_steps, block, multiple_of, "
    "allocate, heal, steps, schedule"
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stage(*lines: str, overrides: tuple[str, ...] = ()) -> Any:
    """The stage of these lines, from line 6 of the recipe on."""
    Path("r.yaml").write_text(BASE + "".join(f"    {line}\n" for line in lines))
    return load_recipe("r.yaml", overrides=overrides).stages[0]


def problems(*lines: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        stage(*lines, overrides=overrides)
    return caught.value.problems


# What a stage means


@pytest.mark.parametrize(
    ("target", "meant"),
    [
        ("{sparsity: 0.35}", Target(sparsity=0.35)),
        ("{sparsity: 35e-2, of: layers}", Target(sparsity=0.35, of="layers")),
        ("{parameters: 5.2B}", Target(parameters=5_200_000_000)),
        ("{parameters: 5_200_000_000}", Target(parameters=5_200_000_000)),
        ("{bytes: 4GB}", Target(bytes=4_000_000_000)),
        ("{bytes: 7.5 GiB}", Target(bytes=15 * 2**29)),
        ("{bytes: 4000000000}", Target(bytes=4_000_000_000)),
    ],
)
def test_targets(target: str, meant: Target) -> None:
    assert stage(f"target: {target}") == PruneStage(kind="prune", target=meant)
    assert stage("target: {sparsity: 0.1}", overrides=(f"stages.0.target={target}",)).target == meant


@pytest.mark.parametrize("pattern", ["2:4", "4:8", '"2:4"', "unstructured"])
def test_a_pattern_needs_no_quotes(pattern: str) -> None:
    """YAML 1.1 reads 2:4 as a number of base 60."""
    meant = PatternStage(kind="prune", pattern=pattern.strip('"'))  # type: ignore[arg-type]
    assert stage(f"pattern: {pattern}") == meant
    assert stage("pattern: unstructured", overrides=(f"stages.0.pattern={pattern}",)) == meant
    assert stage("target: {sparsity: 0.1}", overrides=(f"stages.0={{kind: prune, pattern: {pattern}}}",)) == meant


def test_one_key_of_a_target_or_a_shape_by_set() -> None:
    assert stage(overrides=("stages.0.target.parameters=5.2B",)).target == Target(parameters=5_200_000_000)
    assert stage("target: {bytes: 1GB}", overrides=("stages.0.target.bytes=500MB",)).target == Target(bytes=500_000_000)
    changed = ("stages.0.shape.intermediate_size=8k", "stages.0.shape.num_hidden_layers=28")
    assert stage(overrides=changed).shape == Shape(intermediate_size=8000, num_hidden_layers=28)


def test_shapes_one_or_several() -> None:
    assert stage("shape: {intermediate_size: 8k}").shape == Shape(intermediate_size=8000)
    several = stage("shape: [{intermediate_size: 8192}, {hidden_size: 3_584, num_attention_heads: 28}]")
    assert several.shape == [Shape(intermediate_size=8192), Shape(hidden_size=3584, num_attention_heads=28)]
    assert several.over == ["ffn", "heads", "hidden"]


@pytest.mark.parametrize(
    ("lines", "over", "ranking", "calibrates"),
    [
        (["target: {sparsity: 0.3}"], ["ffn"], "activation", True),
        (["target: {sparsity: 0.3}", "axes: [heads, ffn]"], ["heads", "ffn"], "activation", True),
        (["shape: {hidden_size: 64}", "compensate: false"], ["hidden"], "activation", True),
        (["shape: {num_key_value_heads: 4}", "importance: fluctuation"], ["heads"], "fluctuation", True),
        (["shape: {hidden_size: 64}", "compensate: false", "importance: magnitude"], ["hidden"], "magnitude", True),
        (
            ["shape: {num_hidden_layers: 2}", "compensate: false", "importance: magnitude"],
            ["layers"], "magnitude", True,
        ),
    ],
)  # fmt: skip
def test_what_follows_from_what_is_left_out(lines: list[str], over: list[str], ranking: str, calibrates: bool) -> None:
    found = stage(*lines)
    assert (found.over, found.ranking, found.calibrates) == (over, ranking, calibrates)


def test_patterns_calibrate_where_inputs_count() -> None:
    assert [stage("pattern: 2:4", f"method: {each}").calibrates for each in ("sparsegpt", "wanda", "magnitude")] == [
        True, True, False,
    ]  # fmt: skip


def test_editors_accept_what_recipes_may_say() -> None:
    parts = json_schema()["$defs"]
    assert [option["type"] for option in parts["Target"]["properties"]["bytes"]["anyOf"]] == [
        "integer",
        "string",
        "null",
    ]
    one, several = parts["PruneStage"]["properties"]["shape"]["anyOf"][0]["oneOf"]
    assert one == {"$ref": "#/$defs/Shape"} and several["items"] == one
    assert parts["PatternStage"]["required"] == ["kind", "pattern"]
    assert parts["PatternStage"]["properties"]["pattern"]["enum"] == ["2:4", "4:8", "unstructured"]


# The lines of mistakes

NONE = "write one such as 0.01"


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("{}", "target: says nothing; give one of sparsity, parameters and bytes"),
        ("0.5", "target: 0.5 is not a mapping; write lines of key: value (sparsity, of, parameters, bytes)"),
        (
            "{sparsity: 0.3, bytes: 4GB}",
            "target: has sparsity and bytes; give one of sparsity, parameters and bytes",
        ),
        ("{parameters: 5B, of: layers}", "target: of is for sparsity; remove it"),
        ("{sparsity: 0.3, of: layer}", "target.of: 'layer' is not allowed; use all or layers (did you mean layers?)"),
        ("{sparsity: 1.5}", "target.sparsity: 1.5 is not allowed; use a number below 1"),
        ("{sparsity: 0}", "target.sparsity: 0 is not allowed; use a number above 0"),
        ("{sparsity: 35%}", f"target.sparsity: '35%' is not a number; {NONE}"),
        ("{parameters: 0}", "target.parameters: 0 is not allowed; use 1 or more"),
        (
            "{parameters: 5.2 GB}",
            "target.parameters: '5.2 GB' is not a whole number; write one such as 128, 64k, 20M or 1B",
        ),
        ("{bytes: 4 gigs}", "target.bytes: '4 gigs' is not a size; write one such as 4GB"),
        ("{bytes: 0}", "target.bytes: 0 is not a size; write one such as 4GB"),
        ("{bytes: true}", "target.bytes: true is not a size; write one such as 4GB"),
        ("{sparsities: 0.3}", "target.sparsities: unknown key; did you mean sparsity?"),
    ],
)
def test_mistakes_in_a_target(target: str, problem: str) -> None:
    assert problems(f"target: {target}") == [f"r.yaml:6: stages.0.{problem}"]


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("{}", f"shape: says nothing; give it one of {SIZES}"),
        ("[]", "shape: is empty; add at least one item"),
        ("[{intermediate_size: 8192}, {}]", f"shape.1: says nothing; give it one of {SIZES}"),
        ("8192", f"shape: 8192 is not a mapping; write lines of key: value ({SIZES})"),
        ("{ffn: 8192}", f"shape.ffn: unknown key; use {SIZES}"),
        ("{intermediate_sizes: 8192}", "shape.intermediate_sizes: unknown key; did you mean intermediate_size?"),
        ("[{hidden_sze: 1k}]", "shape.0.hidden_sze: unknown key; did you mean hidden_size?"),
        ("{num_hidden_layers: 0}", "shape.num_hidden_layers: 0 is not allowed; use 1 or more"),
        (
            "{hidden_size: 0.75}",
            "shape.hidden_size: 0.75 is not a whole number; write one such as 128, 64k, 20M or 1B",
        ),
    ],
)
def test_mistakes_in_a_shape(shape: str, problem: str) -> None:
    assert problems(f"shape: {shape}") == [f"r.yaml:6: stages.0.{problem}"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("axes: [ffn, heads, ffn]", "axes: names an axis twice; remove one"),
        ("axes: [ffn, head]", "axes.1: 'head' is not allowed; use ffn, heads, hidden or layers (did you mean heads?)"),
        ("axes: ffn", "axes: 'ffn' is not a list; write [a, b], or a line with a dash for each item"),
        ("axes: []", "axes: is empty; add at least one item"),
        ("importance: taylor", "importance: 'taylor' is not allowed; use greedy, activation, magnitude or fluctuation"),
        ("damp: 11", "damp: 11 is not allowed; use 10 or less"),
        ("reconstruct: yes", "reconstruct: true is not allowed; use off or submodule"),
        ("reconstruct_steps: 0", "reconstruct_steps: 0 is not allowed; use 1 or more"),
        ("steps: 0", "steps: 0 is not allowed; use 1 or more"),
        ("steps: 101", "steps: 101 is not allowed; use 100 or less"),
        ("schedule: cosine", "schedule: 'cosine' is not allowed; use cubic, linear or geometric"),
        ("block: cosine", "block: 'cosine' is not allowed; use kl or influence"),
        ("multiple_of: 0", "multiple_of: 0 is not allowed; use 1 or more"),
        ("sparsity: 0.5", f"sparsity: unknown key; use {KEYS}"),
        ("method: wanda", f"method: unknown key; use {KEYS}"),
    ],
)
def test_mistakes_beside_a_target(line: str, problem: str) -> None:
    assert problems("target: {sparsity: 0.3}", line) == [f"r.yaml:7: stages.0.{problem}"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (("target: {sparsity: 0.3}", "steps: 2"), "steps need healing in between; give heal, or remove steps"),
        (
            ("shape: {intermediate_size: 512}", "heal: {}", "steps: 2"),
            "steps need a target in sparsity or parameters; give one, or remove steps",
        ),
        (
            ("target: {bytes: 4MB}", "heal: {}", "steps: 2"),
            "steps need a target in sparsity or parameters; give one, or remove steps",
        ),
    ],
)
def test_steps_that_have_nothing_to_step_through(lines: tuple[str, ...], problem: str) -> None:
    assert problems(*lines) == [f"r.yaml:5: stages.0: {problem}"]


def test_healing_does_not_change_what_is_pruned() -> None:
    """So a stage with another healing takes up what was pruned before."""
    plain = stage("target: {sparsity: 0.3}")
    for lines in (("heal: {tokens: 5M, loss: ce}",), ("heal: {}", "steps: 3", "schedule: linear")):
        healed = stage("target: {sparsity: 0.3}", *lines)
        assert healed != plain and healed.identity() == plain.identity()
    assert stage("target: {sparsity: 0.3}", "reconstruct_steps: 3").identity() != plain.identity()


@pytest.mark.parametrize("order", [1, -1])
def test_training_goes_on_from_compensated_weights(order: int) -> None:
    lines = ["target: {sparsity: 0.3}", "compensate: false", "reconstruct: submodule"][::order]
    (found,) = problems(*lines)
    assert found == (
        f"r.yaml:{6 + lines.index('reconstruct: submodule')}: stages.0.reconstruct: goes on from compensated weights; "
        "use compensate: true"
    )


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ([], "needs a target or a shape"),
        (["target:"], "needs a target or a shape"),
        (["target: {sparsity: 0.3}", "shape: {hidden_size: 64}"], "has target and shape; keep one"),
        (
            ["shape: {intermediate_size: 64, hidden_size: 64}", "axes: [ffn]"],
            "shape.hidden_size is of axis hidden, which axes does not name; add it or remove axes",
        ),
        (
            ["shape: {hidden_size: 64}", "allocate: auto"],
            "allocate: auto chooses a shape and shape is given; remove one",
        ),
        (
            ["pattern: 2:4", "axes: [ffn]"],
            "axes removes whole parts and pattern single weights; make them two stages",
        ),
        (
            ["pattern: 2:4", "target: {sparsity: 0.5}"],
            "target removes whole parts and pattern single weights; make them two stages",
        ),
    ],
)
def test_keys_that_do_not_go_together(lines: list[str], problem: str) -> None:
    assert problems(*lines) == [f"r.yaml:5: stages.0: {problem}"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (
            ["pattern: 1:4"],
            "6: stages.0.pattern: '1:4' is not allowed; use 2:4, 4:8 or unstructured (did you mean 2:4?)",
        ),
        (["pattern:"], "6: stages.0.pattern: an empty value is not allowed; use 2:4, 4:8 or unstructured"),
        (
            ["pattern: 2:4", "sparsity: 0.5"],
            "7: stages.0.sparsity: follows from the pattern; remove it, or use pattern: unstructured",
        ),
        (["pattern: unstructured", "sparsity: 1.2"], "7: stages.0.sparsity: 1.2 is not allowed; use a number below 1"),
        (
            ["pattern: 4:8", "method: gptq"],
            "7: stages.0.method: 'gptq' is not allowed; use sparsegpt, wanda or magnitude",
        ),
        (["pattern: 2:4", "importance: greedy"], "7: stages.0.importance: unknown key; use kind, pattern, sparsity, "),
    ],
)
def test_mistakes_in_a_pattern(lines: list[str], problem: str) -> None:
    (found,) = problems(*lines)
    assert found.startswith(f"r.yaml:{problem}")


def test_mistakes_by_set_say_the_option() -> None:
    assert problems("target: {sparsity: 0.3}", overrides=("stages.0.target.bytes=4GB",)) == [
        "r.yaml:6: stages.0.target: has sparsity and bytes; give one of sparsity, parameters and bytes"
    ]
    assert problems("target: {sparsity: 0.3}", overrides=("stages.0.axes=[ffn, ffn]",)) == [
        "--set stages.0.axes=[ffn, ffn]: stages.0.axes: names an axis twice; remove one"
    ]
    assert problems("pattern: 2:4", overrides=("stages.0.pattern=2:3",)) == [
        "--set stages.0.pattern=2:3: stages.0.pattern: '2:3' is not allowed; use 2:4, 4:8 or unstructured "
        "(did you mean 2:4?)"
    ]
