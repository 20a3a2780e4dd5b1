"""What a user can get wrong in `kind: prune`, and the one line that it gets; two layers, 96 channels, two heads."""

from collections.abc import Callable

from desk import RECIPE, Case, Desk

KEYS = "intermediate_size, num_attention_heads, num_key_value_heads, hidden_size, num_hidden_layers"


def stage(*lines: str, following: str = "") -> Callable[[Desk], list[str]]:
    """A stage of these keys, from line 8 of the recipe on, and what follows it."""
    text = "".join(f"    {line}\n" for line in lines) + following
    return lambda desk: desk.write("recipe.yaml", RECIPE.replace("quantize\n    group_size: 32\n", f"prune\n{text}"))


def validated(arrange: Callable[[Desk], list[str]]) -> Callable[[Desk], list[str]]:
    """The same mistake, given to validate."""
    return lambda desk: ["validate", arrange(desk)[1]]


CASES = [
    Case("prune: no target", stage("axes: [ffn]"), "recipe.yaml:7: stages.0: needs a target or a shape"),
    Case(
        "prune: two targets",
        stage("target: {sparsity: 0.3, parameters: 300k}"),
        "recipe.yaml:8: stages.0.target: has sparsity and parameters; give one of sparsity, parameters and bytes",
    ),
    Case(
        "prune: sparsity above 1",
        stage("target: {sparsity: 1.5}"),
        "recipe.yaml:8: stages.0.target.sparsity: 1.5 is not allowed; use a number below 1",
    ),
    Case(
        "prune: sparsity outside of target",
        stage("sparsity: 0.3"),
        "recipe.yaml:8: stages.0.sparsity: unknown key; use kind, target, shape, axes, …",
    ),
    Case(
        "prune: more than the MLPs have",
        stage("target: {sparsity: 0.3}"),
        "stages.0.target.sparsity: 0.3 is reached by no shape over ffn; the nearest is sparsity 0.093 "
        "(intermediate_size 96 -> 16); use that, or more axes",
    ),
    Case(
        "prune: more than the MLPs have, by validate",
        validated(stage("target: {sparsity: 0.3}")),
        "stages.0.target.sparsity: 0.3 is reached by no shape over ffn; the nearest is sparsity 0.093 "
        "(intermediate_size 96 -> 16); use that, or more axes",
    ),
    Case(
        "prune: fewer bytes than there can be",
        stage("target: {bytes: 100KB}"),
        "stages.0.target.bytes: 100 kB is reached by no shape over ffn; the nearest is … kB "
        "(intermediate_size 96 -> 16); use that, or more axes",
    ),
    Case(
        "prune: an axis twice",
        stage("target: {sparsity: 0.05}", "axes: [ffn, ffn]"),
        "recipe.yaml:9: stages.0.axes: names an axis twice; remove one",
    ),
    Case(
        "prune: an axis that is none",
        stage("target: {sparsity: 0.05}", "axes: [head]"),
        "recipe.yaml:9: stages.0.axes.0: 'head' is not allowed; use ffn, heads, hidden or layers (did you mean heads?)",
    ),
    Case(
        "prune: shape outside of the axes",
        stage("shape: {hidden_size: 32}", "axes: [ffn]"),
        "recipe.yaml:7: stages.0: shape.hidden_size is of axis hidden, which axes does not name; add it or remove axes",
    ),
    Case(
        "prune: shape larger than the model",
        stage("shape: {intermediate_size: 128}"),
        "stages.0.shape.intermediate_size: 128 is more than the model's 96; pruning only removes",
    ),
    Case(
        "prune: shape without sizes",
        stage("shape: {}"),
        f"recipe.yaml:8: stages.0.shape: says nothing; give it one of {KEYS}",
    ),
    Case(
        "prune: a width that the heads do not divide",
        stage("shape: {hidden_size: 33}"),
        "stages.0.shape: transformers wants hidden_size (33) to be a multiple of num_attention_heads (2); "
        "the nearest legal shape is hidden_size 64 -> 32",
    ),
    Case(
        "prune: more layers than there are",
        stage("shape: {num_hidden_layers: 3}"),
        "stages.0.shape.num_hidden_layers: 3 is more than the model's 2; pruning only removes",
    ),
    Case(
        "prune: training without compensation",
        stage("target: {sparsity: 0.05}", "compensate: false", "reconstruct: submodule"),
        "recipe.yaml:10: stages.0.reconstruct: goes on from compensated weights; use compensate: true",
    ),
    Case(
        "prune: axes beside a pattern",
        stage("pattern: 2:4", "axes: [ffn]"),
        "recipe.yaml:7: stages.0: axes removes whole parts and pattern single weights; make them two stages",
    ),
    Case(
        "prune: sparsity beside 2:4",
        stage("pattern: 2:4", "sparsity: 0.5"),
        "recipe.yaml:9: stages.0.sparsity: follows from the pattern; remove it, or use pattern: unstructured",
    ),
    Case(
        "prune: a pattern that is none",
        stage("pattern: 1:4"),
        "recipe.yaml:8: stages.0.pattern: '1:4' is not allowed; use 2:4, 4:8 or unstructured (did you mean 2:4?)",
    ),
    Case(
        "prune: group that does not divide what is left",
        stage("shape: {intermediate_size: 80}", following="  - {kind: quantize, group_size: 32}\n"),
        "stages.1.group_size: 32 does not divide the width 80 of model.layers.*.mlp.down_proj (2 layers); use -1",
    ),
]
