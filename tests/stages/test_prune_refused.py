"""What pruning tools are reported to get wrong: refused here before the work, or right in what is written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up import LLAMA_8B, NOWHERE, QWEN2_7B, Headers, headers
from pruned import context, planned, prune
from quantized import PROBE, opens, quantize
from random_models import load_stock, make_model
from small_model import TRAINED
from stored import a_head_of_its_own, tied_and_stored_twice
from torch import Tensor
from transformers import AutoConfig

from compress.errors import ModelError
from compress.loop.skeleton import check_builds
from compress.model.checkpoint import Checkpoint, read_part
from compress.prune.axes import Dims, anatomy, smaller_config
from compress.recipe.prune import PatternStage
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import Recipe
from compress.runs.plan import plan_run
from compress.stages.prune.plan import planned_shapes
from compress.stages.prune.run import run


def problem(parent: Any, **settings: Any) -> str:
    (found,) = planned(parent, **settings).problems
    return found


def loads(folder: Path) -> None:
    """Stock transformers opens what was pruned, and says what the model in memory said."""
    with torch.no_grad():
        logits = opens(folder / "checkpoint", torch.float32)(context().probe).logits[0]
    assert torch.equal(logits, read_part(folder / PROBE)[0]["logits"])


# shapes that no loader takes


def builds(model: Headers, **sizes: int) -> None:
    """Have transformers build the model with these sizes, of two layers."""
    dims = replace(anatomy(model).dims, layers=2, **sizes)
    shapes = planned_shapes(anatomy(model), dims)
    check_builds(shapes.config, {name: info.shape for name, info in shapes.tensors.items()})


def test_heads_that_do_not_divide_the_width_of_a_llama() -> None:
    """The shape that is proposed instead is one that transformers builds."""
    assert problem(LLAMA_8B, shape={"num_attention_heads": 24}) == (
        "stages.0.shape: transformers wants hidden_size (4096) to be a multiple of num_attention_heads (24); "
        "the nearest legal shape is hidden_size 4096 -> 3840, num_attention_heads 32 -> 24"
    )
    with pytest.raises(ModelError, match="not a multiple of the number of attention heads"):
        builds(LLAMA_8B, heads=24)
    builds(LLAMA_8B, heads=24, hidden=3840)


def test_a_width_that_the_heads_of_a_llama_do_not_divide() -> None:
    assert problem(LLAMA_8B, shape={"hidden_size": 4001}) == (
        "stages.0.shape: transformers wants hidden_size (4001) to be a multiple of num_attention_heads (32); "
        "the nearest legal shape is hidden_size 4096 -> 3968"
    )
    with pytest.raises(ModelError, match="not a multiple of the number of attention heads"):
        builds(LLAMA_8B, hidden=4001)
    builds(LLAMA_8B, hidden=3968)


def test_where_the_family_takes_any_heads_they_are_cut() -> None:
    """3584 channels are no multiple of 24 heads; qwen2 has a head_dim of its own."""
    plan = planned(QWEN2_7B, shape={"num_attention_heads": 24})
    assert not plan.problems and plan.shapes is not None
    assert (plan.shapes.config["num_attention_heads"], plan.shapes.config["head_dim"]) == (24, 128)
    builds(QWEN2_7B, heads=24)


def test_heads_that_tear_a_group_of_a_qwen2() -> None:
    assert problem(QWEN2_7B, shape={"num_attention_heads": 22}) == (
        "stages.0.shape: 22 query heads are no multiple of 4 key-value heads; "
        "the nearest legal shape is num_attention_heads 28 -> 24"
    )


def test_fewer_groups_with_more_heads_in_each() -> None:
    assert problem(LLAMA_8B, shape={"num_key_value_heads": 4, "num_attention_heads": 32}) == (
        "stages.0.shape: a key-value head has 4 query heads, not more; "
        "the nearest legal shape is num_attention_heads 32 -> 16, num_key_value_heads 8 -> 4"
    )


@pytest.mark.parametrize(("heads", "groups"), [(3, 2), (31, 8), (7, 4), (1, 2)])
def test_an_odd_number_of_heads_gets_a_proposal_that_changes_something(heads: int, groups: int) -> None:
    model = headers("llama", Dims(4096, 14336, 32, 8, 128, 2))
    found = problem(model, shape={"num_attention_heads": heads, "num_key_value_heads": groups})
    assert f"{heads} query heads are no multiple of {groups} key-value heads" in found
    assert " -> " in found.partition("; the nearest legal shape is ")[2]


def test_a_proposal_keeps_to_what_the_family_can_be_cut_along() -> None:
    """Where hidden can't be cut, a count of heads gets other heads proposed, not another width."""
    model = headers("granite", Dims(4096, 14336, 32, 8, 128, 2))
    assert "hidden can't be cut here" in problem(model, shape={"hidden_size": 3840})
    found = problem(model, shape={"num_attention_heads": 24})
    assert found.partition("; the nearest legal shape is ")[2].startswith("num_attention_heads 32 -> ")


@pytest.mark.parametrize(
    ("key", "size", "there"),
    [
        ("intermediate_size", 769, 768),
        ("num_attention_heads", 9, 8),
        ("num_key_value_heads", 8, 4),
        ("hidden_size", 512, 256),
        ("num_hidden_layers", 7, 6),
    ],
)
def test_more_than_there_is(key: str, size: int, there: int) -> None:
    assert problem(Checkpoint(TRAINED), shape={key: size}) == (
        f"stages.0.shape.{key}: {size} is more than the model's {there}; pruning only removes"
    )


@pytest.mark.parametrize(
    ("axes", "target", "line"),
    [
        (
            ["heads"],
            {"sparsity": 0.5},
            "sparsity: 0.5 is reached by no shape over heads; the nearest is sparsity 0.170 "
            "(num_attention_heads 8 -> 1, num_key_value_heads 4 -> 1); use that, or more axes",
        ),
        (
            ["ffn"],
            {"sparsity": 0.9, "of": "layers"},
            "sparsity: 0.9 is reached by no shape over ffn; the nearest is sparsity 0.687 "
            "(intermediate_size 768 -> 64); use that, or more axes",
        ),
        (
            ["ffn"],
            {"bytes": "1MB"},
            "bytes: 1.00 MB is reached by no shape over ffn; the nearest is 5.06 MB "
            "(intermediate_size 768 -> 64); use that, or more axes",
        ),
        (["ffn"], {"parameters": "6M"}, "parameters: 6,000,000 is more than the model's 5,770,496; use fewer"),
    ],
)
def test_a_target_that_no_shape_reaches_names_the_nearest(axes: list[str], target: Any, line: str) -> None:
    assert problem(Checkpoint(TRAINED), axes=axes, target=target) == f"stages.0.target.{line}"


# models that can't be cut


def refused(folder: Path, output: Path) -> str:
    stages = [{"kind": "prune", "target": {"sparsity": 0.2}}]
    recipe = Recipe.model_validate({"name": "r", "model": str(folder), "stages": stages, "output": str(output)})
    with pytest.raises(ModelError) as caught:
        plan_run(recipe, folder)
    return str(caught.value)


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "mixtral", num_local_experts=4, num_experts_per_tok=2)
    assert "is a mixture of experts" in refused(folder, tmp_path / "out")


def test_a_quantized_model(tmp_path: Path) -> None:
    parent = Checkpoint(make_model(tmp_path / "model"))
    quantize(WeightOnlyStage(kind="quantize", group_size=32), parent, tmp_path / "work", context())
    assert "already quantized (compressed-tensors)" in refused(tmp_path / "work" / "checkpoint", tmp_path / "out")


def test_a_model_with_code_of_its_own() -> None:
    model = replace(LLAMA_8B, config=LLAMA_8B.config | {"auto_map": {"AutoModelForCausalLM": "m.M"}})
    assert problem(model, shape={"intermediate_size": 8192}) == (
        "stages.0: the model comes with code of its own; pruning knows transformers' families only"
    )


def test_layers_of_different_sizes() -> None:
    odd = "model.layers.1.mlp.up_proj.weight"
    info = replace(LLAMA_8B.tensors[odd], shape=(12288, 4096))
    model = replace(LLAMA_8B, tensors=LLAMA_8B.tensors | {odd: info})
    assert problem(model, shape={"intermediate_size": 8192}) == (
        f"stages.0: {NOWHERE}: layer 1 has other sizes than layer 0; pruning keeps one shape for all layers"
    )


def test_whole_parts_of_a_model_that_is_sparse_already(tmp_path: Path) -> None:
    """Cutting channels would shift the groups of four, and compensation would fill the zeros."""
    parent = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32))
    run(PatternStage(kind="prune", pattern="2:4"), parent, tmp_path / "sparse", context())
    sparse = Checkpoint(tmp_path / "sparse" / "checkpoint")
    with pytest.raises(ModelError, match=r"is sparse already: 2 of every 4 weights are kept; start from a dense"):
        prune(sparse, tmp_path / "work", shape={"intermediate_size": 64})


# right in what is written


@pytest.mark.parametrize(
    ("family", "key", "sizes"),
    [
        (
            "gemma3_text",
            "layer_types",
            {
                "layer_types": [
                    f"{kind}_attention" for kind in ("sliding", "full", "full", "sliding", "full", "sliding")
                ]
            },
        ),
        ("qwen2", "layer_types", {"use_sliding_window": True, "max_window_layers": 3}),
        ("smollm3", "no_rope_layers", {"no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    ],
)
def test_each_layer_that_stays_keeps_its_type(family: str, key: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, torch.float32, num_hidden_layers=6, sliding_window=8, **sizes)
    record = prune(Checkpoint(folder), tmp_path / "work", shape={"num_hidden_layers": 4})
    assert record.pruned is not None and len(record.pruned.removed_layers) == 2
    before, after = (AutoConfig.from_pretrained(each) for each in (folder, tmp_path / "work" / "checkpoint"))
    kept = [index for index in range(6) if index not in record.pruned.removed_layers]
    assert len(set(getattr(before, key))) == 2
    assert getattr(after, key) == [getattr(before, key)[index] for index in kept]
    loads(tmp_path / "work")


def parts(folder: Path, name: str, head_dim: int, dimension: int = 0) -> list[Tensor]:
    """A matrix of the first layer, head by head."""
    weight = Checkpoint(folder).load([f"model.layers.0.self_attn.{name}_proj.weight"])
    return list(next(iter(weight.values())).split(head_dim, dimension))


@pytest.mark.parametrize("shape", [{"num_attention_heads": 4}, {"num_key_value_heads": 1}])
def test_heads_of_grouped_queries_stay_with_their_own_keys(shape: dict[str, int], tmp_path: Path) -> None:
    """Each query head that is left reads the key-value head that it read, and o_proj its own columns."""
    parent = make_model(tmp_path / "model", dtype=torch.float32, num_attention_heads=8, head_dim=8)
    prune(Checkpoint(parent), tmp_path / "work", shape=shape, compensate=False)
    written = tmp_path / "work" / "checkpoint"
    heads, groups = Checkpoint(written).config["num_attention_heads"], Checkpoint(written).config["num_key_value_heads"]
    assert (heads, groups) in ((4, 2), (4, 1))
    infos = Checkpoint(written).tensors
    assert infos["model.layers.0.self_attn.o_proj.weight"].shape == (64, heads * 8)
    kept = {}
    for name, dimension in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
        before = parts(parent, name, 8, dimension)
        after = parts(written, name, 8, dimension)
        kept[name] = [next(i for i, old in enumerate(before) if torch.equal(old, new)) for new in after]
    assert kept["q"] == kept["o"] and kept["k"] == kept["v"]
    owners = [kept["k"][index // (heads // groups)] for index in range(heads)]
    assert [head // 4 for head in kept["q"]] == owners
    loads(tmp_path / "work")


AROUND = [{"intermediate_size": 64}, {"hidden_size": 32}, {"num_hidden_layers": 1}]


@pytest.mark.parametrize("shape", AROUND, ids=lambda shape: next(iter(shape)))
def test_a_tied_head_that_was_stored_twice_is_stored_once(shape: dict[str, int], tmp_path: Path) -> None:
    tied_and_stored_twice(tmp_path / "model")
    prune(Checkpoint(tmp_path / "model"), tmp_path / "work", shape=shape)
    written = Checkpoint(tmp_path / "work" / "checkpoint")
    assert "lm_head.weight" not in written.tensors and written.config["tie_word_embeddings"]
    model = load_stock(written.folder, torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loads(tmp_path / "work")


@pytest.mark.parametrize("shape", AROUND, ids=lambda shape: next(iter(shape)))
def test_a_head_that_is_wrongly_called_tied_stays_and_is_no_longer_called_so(
    shape: dict[str, int], tmp_path: Path
) -> None:
    a_head_of_its_own(tmp_path / "model")
    prune(Checkpoint(tmp_path / "model"), tmp_path / "work", shape=shape)
    written = Checkpoint(tmp_path / "work" / "checkpoint")
    assert "lm_head.weight" in written.tensors and written.config["tie_word_embeddings"] is False
    loads(tmp_path / "work")


def test_what_was_pruned_can_be_pruned_again(tmp_path: Path) -> None:
    """Its head_dim is no longer hidden_size / num_attention_heads."""
    parent = Checkpoint(make_model(tmp_path / "model", dtype=torch.float32, num_hidden_layers=3))
    prune(parent, tmp_path / "one", shape={"num_attention_heads": 2, "num_hidden_layers": 2})
    once = Checkpoint(tmp_path / "one" / "checkpoint")
    assert anatomy(once).dims == Dims(64, 96, 2, 2, 16, 2)
    prune(once, tmp_path / "two", shape={"num_key_value_heads": 1, "intermediate_size": 64, "hidden_size": 48})
    assert anatomy(Checkpoint(tmp_path / "two" / "checkpoint")).dims == Dims(48, 64, 1, 1, 16, 2)
    loads(tmp_path / "two")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_the_checkpoint_is_what_was_planned(family: str, tmp_path: Path) -> None:
    """Tensors and their shapes, config.json, and no more bytes."""
    parent = Checkpoint(make_model(tmp_path / "model", family, num_hidden_layers=3, max_position_embeddings=64))
    shape = {"intermediate_size": 64, "num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 2}
    prune(parent, tmp_path / "work", shape=shape)
    planned_after, written = planned(parent, shape=shape).shapes, Checkpoint(tmp_path / "work" / "checkpoint")
    assert planned_after is not None
    assert {n: i.shape for n, i in planned_after.tensors.items()} == {n: i.shape for n, i in written.tensors.items()}
    assert written.bytes <= planned_after.bytes
    sizes = smaller_config(anatomy(parent), anatomy(written).dims, range(2))
    assert {key: written.config[key] for key in sizes if "layer" not in key} == {
        key: value for key, value in sizes.items() if "layer" not in key
    }
