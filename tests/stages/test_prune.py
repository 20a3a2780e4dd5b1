"""The prune stage: what comes out opens in stock transformers, is what was computed, and has the right values."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import context, planned, prune
from quantized import PROBE, opens, quantize
from random_models import load_stock, make_model, random_tokens
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.model.checkpoint import Checkpoint, read_part
from compress.recipe.quantize import WeightOnlyStage
from compress.records import PrunedModule
from compress.stages.prune import blocks, pruning, scores

LAYERS = 4
WINDOW = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {},
    "gemma2": WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": WINDOW | MIXED | {"query_pre_attn_scalar": 16},
    "phi3": WINDOW,
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    # without a row
    "granite": {},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": WINDOW,
}
AXES: dict[str, dict[str, int]] = {
    "ffn": {"intermediate_size": 64},
    "heads": {"num_attention_heads": 2},
    "groups": {"num_key_value_heads": 1},
    "hidden": {"hidden_size": 32},
    "layers": {"num_hidden_layers": 3},
}
ALL = {"intermediate_size": 64, "num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 3}
WHOLE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")  # every axis
WITHOUT = {"gpt_neox": ("heads", "groups", "hidden"), "opt": ("heads", "groups", "hidden")}
CASES = [
    *((family, axis) for family in ("llama", "gemma3_text", "phi3") for axis in (*AXES, "all")),
    *((family, axis) for family in ("mistral", "qwen2", "qwen3", "gemma2") for axis in ("groups", "all")),
    *((family, axis) for family in CONFIGS if family not in WHOLE for axis in AXES),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(folder: Path, family: str, **config: Any) -> Checkpoint:
    settings: dict[str, Any] = {"num_hidden_layers": LAYERS, "tie_word_embeddings": family not in ("qwen3", "mistral")}
    return Checkpoint(make_model(folder, family, torch.float32, **settings | CONFIGS[family] | config))


def shape_of(axis: str) -> dict[str, int]:
    return ALL if axis == "all" else AXES[axis]


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize(("family", "axis"), CASES)
def test_what_is_written_is_an_ordinary_model(family: str, axis: str, tmp_path: Path) -> None:
    parent = make(tmp_path / "model", family)
    refused = axis in WITHOUT.get(family, ()) or (axis == "hidden" and family not in WHOLE)
    if refused:
        (problem,) = planned(parent, shape=shape_of(axis)).problems
        assert "can't be cut here" in problem and "use ffn" in problem
        return
    record = prune(parent, tmp_path / "work", shape=shape_of(axis))
    folder = tmp_path / "work" / "checkpoint"
    stock = opens(folder, torch.float32)
    assert sum(p.numel() for p in stock.parameters()) == record.pruned.parameters  # type: ignore[union-attr]
    probe = context().probe
    with torch.no_grad():
        assert torch.equal(logits_of(stock, probe)[0], read_part(tmp_path / "work" / PROBE)[0]["logits"])
        assert float(logits_of(stock, probe).std()) > 0.05
    cached = stock.generate(probe, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=True)
    plain = stock.generate(probe, max_new_tokens=12, min_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    check_config(parent, folder, shape_of(axis))
    if axis == "all":
        fine_tune_and_save(stock, tmp_path / "tuned")
        quantize_it(Checkpoint(folder), tmp_path / "quantized")


def check_config(parent: Checkpoint, folder: Path, shape: dict[str, int]) -> None:
    """Sizes are those wanted; every list with an item a layer has one a layer still; a tied head is not stored."""
    config = json.loads((folder / "config.json").read_text())
    key = "ffn_dim" if "ffn_dim" in config else "intermediate_size"
    renamed = {key if name == "intermediate_size" else name: size for name, size in shape.items()}
    assert {name: config[name] for name in renamed} == renamed
    for name, value in config.items():
        if "layer" in name and isinstance(value, list):
            assert len(value) == config["num_hidden_layers"], name
    if parent.config["tie_word_embeddings"]:
        assert not [name for name in Checkpoint(folder).tensors if name in ("lm_head.weight", "embed_out.weight")]


def fine_tune_and_save(model: nn.Module, folder: Path) -> None:
    """One step of training lowers the loss, and what is saved then opens again as it is."""
    tokens = random_tokens(2, 24, 5)
    model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = model(tokens, labels=tokens).loss
    before.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        assert float(model(tokens, labels=tokens).loss) < float(before)
        model.save_pretrained(folder)  # type: ignore[operator]
        again = opens(folder, torch.float32)
        assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))


def quantize_it(parent: Checkpoint, output: Path) -> None:
    quantize(WeightOnlyStage(kind="quantize", group_size=32), parent, output, context(torch.bfloat16))
    opens(output / "checkpoint")


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_nothing_removed_changes_no_bit(family: str, tmp_path: Path) -> None:
    parent = make(tmp_path / "model", family)
    prune(parent, tmp_path / "work", shape={"intermediate_size": 96, "num_hidden_layers": LAYERS})
    after = Checkpoint(tmp_path / "work" / "checkpoint")
    before, left = parent.load(parent.tensors), after.load(after.tensors)
    assert before.keys() == left.keys()
    assert all(torch.equal(before[name], left[name]) for name in before)


def test_scores_are_taken_up_again_by_another_target(tmp_path: Path) -> None:
    parent, there = make(tmp_path / "model", "llama"), replace(context(), shared=tmp_path / "shared")
    prune(parent, tmp_path / "one", there, shape={"intermediate_size": 64})
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.safetensors")}
    assert len(files) == LAYERS + 1
    prune(parent, tmp_path / "two", there, shape={"intermediate_size": 32, "num_attention_heads": 2})
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "shared").rglob("*.safetensors")} == files


# what loses nothing


def spoiled(folder: Path, change: Any) -> Checkpoint:
    """A llama whose layers are changed by `change`, saved again."""
    parent = make(folder / "whole", "llama")
    model = load_stock(parent.folder, torch.float32)
    for layer in model.model.layers:
        change(layer)
    model.save_pretrained(folder / "spoiled")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "spoiled" / name).write_bytes((parent.folder / name).read_bytes())
    return Checkpoint(folder / "spoiled")


def zero_channels(layer: nn.Module) -> None:
    layer.mlp.down_proj.weight[:, 7::3] = 0  # type: ignore[union-attr, operator, index]


def zero_heads(layer: nn.Module) -> None:
    layer.self_attn.o_proj.weight[:, :16] = 0  # type: ignore[union-attr, operator, index]
    layer.self_attn.o_proj.weight[:, 48:] = 0  # type: ignore[union-attr, operator, index]


def double_channels(layer: nn.Module) -> None:
    """Channels 64 to 95 say what channels 0 to 31 say, and write something else."""
    for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):  # type: ignore[union-attr]
        linear.weight[64:] = linear.weight[:32]  # type: ignore[union-attr, operator, index]
        linear.bias[64:] = linear.bias[:32]  # type: ignore[union-attr, operator, index]


@pytest.fixture
def undamped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens damp no more than the recipe says."""
    for module in (scores, pruning):
        monkeypatch.setattr(module, "damping", lambda tokens, inputs, damp: damp)


@pytest.mark.usefixtures("undamped")
@pytest.mark.parametrize(
    ("change", "shape", "compensate"),
    [
        (zero_channels, {"intermediate_size": 66}, True),
        (zero_channels, {"intermediate_size": 66}, False),
        (zero_heads, {"num_attention_heads": 2}, True),
        (double_channels, {"intermediate_size": 64}, True),
    ],
)
def test_what_says_nothing_new_is_removed_without_loss(
    change: Any, shape: dict[str, int], compensate: bool, tmp_path: Path
) -> None:
    parent = spoiled(tmp_path, change)
    importance = {"importance": "greedy" if compensate else "fluctuation"}
    there = context(torch.float64, sequences=24)
    prune(parent, tmp_path / "work", there, shape=shape, compensate=compensate, damp=1e-12, **importance)
    probe = context().probe
    models = [load_stock(folder, torch.float64) for folder in (parent.folder, tmp_path / "work" / "checkpoint")]
    first, second = (logits_of(model, probe) for model in models)
    assert torch.allclose(first, second, rtol=0, atol=1e-5 * float(first.abs().max()))


@pytest.mark.parametrize("family", WHOLE)
def test_residual_channels_that_are_always_zero_are_removed_without_loss(family: str, tmp_path: Path) -> None:
    """Norms, scaled embeddings and the tied head give what they gave, though their vectors are half as long."""
    parent = make(tmp_path / "whole", family)
    model, odd = load_stock(parent.folder, torch.float32), torch.arange(1, 64, 2)
    model.get_submodule("model.embed_tokens").weight[:, odd] = 0  # type: ignore[union-attr, index, operator]
    for layer in model.model.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            linear = layer.get_submodule(name)
            linear.weight[odd] = 0
            if linear.bias is not None:
                linear.bias[odd] = 0
    model.save_pretrained(tmp_path / "spoiled")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "spoiled" / name).write_bytes((parent.folder / name).read_bytes())
    spoiled_model = Checkpoint(tmp_path / "spoiled")
    prune(spoiled_model, tmp_path / "work", context(torch.float64), shape={"hidden_size": 32}, compensate=False)
    folders = spoiled_model.folder, tmp_path / "work" / "checkpoint"
    first, second = (logits_of(load_stock(folder, torch.float64), context().probe) for folder in folders)
    assert torch.allclose(first, second, rtol=0, atol=1e-3 * float(first.abs().max()))  # the norms' eps stays


# right values


def inputs_of(model: nn.Module, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What these modules get for all tokens, [N, I]."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        return lambda _, inputs: seen.__setitem__(name, inputs[0].flatten(0, -2))

    handles = [model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    model(tokens)
    for handle in handles:
        handle.remove()
    return seen


def solved(kept: Tensor, wanted: Tensor, inputs: Tensor, damp: float, share: float = 1.0) -> Tensor:
    """W + share (T - W X) X^T (X X^T + d diag)^-1 by a stacked least-squares problem; tokens are rows here."""
    missing = wanted - inputs @ kept.t()
    weights = (damp * inputs.square().sum(0)).sqrt()
    stacked = torch.cat([inputs, torch.diag(weights)])
    targets = torch.cat([missing, torch.zeros(inputs.shape[1], missing.shape[1], dtype=missing.dtype)])
    return kept + share * torch.linalg.lstsq(stacked, targets).solution.t()


SHAPES = {
    "ffn and heads": {"intermediate_size": 64, "num_attention_heads": 2},
    "hidden": {"hidden_size": 32, "intermediate_size": 64},
    "layers": {"num_hidden_layers": 3, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kept_weights_are_the_least_squares_solution(shape: dict[str, int], tmp_path: Path) -> None:
    """Every linear of the result, from what the finished models' own forward passes bring to it."""
    parent = make(tmp_path / "model", "llama", attention_bias=False, tie_word_embeddings=False)
    there = context(torch.float64, sequences=40)
    record = prune(parent, tmp_path / "work", there, shape=shape, importance="greedy", damp=0.05)
    assert isinstance(there.tokens, TokenSet) and record.pruned is not None
    tokens, removed = there.tokens.tokens, record.pruned.removed_layers
    base = load_stock(parent.folder, torch.float64)
    small = load_stock(tmp_path / "work" / "checkpoint", torch.float64)
    cut = load_stock(cut_like(parent, tmp_path, shape, removed), torch.float64)
    hidden = hidden_kept(base, cut)
    owners = [index for index in range(LAYERS) if index not in removed]
    for index, own in enumerate(owners):
        check_layer(base, small, cut, tokens, index, own, hidden, removed)


def cut_like(parent: Checkpoint, tmp_path: Path, shape: dict[str, int], removed: list[int]) -> Path:
    """The same entries without compensation, from the scores of the same run, whichever block that would choose."""
    shared = tmp_path / "work" / "scores"
    if removed:
        figures = {str(start): float(start != removed[0]) for start in range(LAYERS - len(removed) + 1)}
        (shared / f"block-kl-{len(removed)}-from-0-v{blocks.CODE_VERSION}.json").write_text(json.dumps(figures))
    there = replace(context(torch.float64, sequences=40), shared=shared)
    prune(parent, tmp_path / "cut", there, shape=shape, compensate=False, importance="greedy", damp=0.05)
    return tmp_path / "cut" / "checkpoint"


def hidden_kept(base: nn.Module, cut: nn.Module) -> Tensor:
    """Residual channels that were kept: by the columns of the embeddings."""
    whole, part = (model.get_submodule("model.embed_tokens").weight for model in (base, cut))
    return torch.stack([(whole == column[:, None]).all(0).nonzero()[0, 0] for column in part.t()])  # type: ignore[union-attr, operator]


def check_layer(
    base: nn.Module, small: nn.Module, cut: nn.Module, tokens: Tensor, index: int, own: int, hidden: Tensor,
    removed: list[int],
) -> None:  # fmt: skip
    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm"]
    after = own + 1 + sum(each > own for each in removed if each - own <= len(removed) and own + 1 in removed)
    behind = f"model.layers.{after}.input_layernorm" if after < LAYERS else "model.norm"
    now = inputs_of(small, tokens, [f"model.layers.{index}.{name}" for name in linears + norms])
    then = inputs_of(base, tokens, [*(f"model.layers.{own}.{name}" for name in linears + norms), behind])
    narrow = hidden.numel() < then[behind].shape[1]
    for name in linears:
        at, was = f"model.layers.{index}.{name}", f"model.layers.{own}.{name}"
        kept, whole = cut.get_submodule(at).weight, base.get_submodule(was).weight
        rows = rows_kept(cut.get_submodule(at), base.get_submodule(was), hidden, name)
        wanted = then[was] @ whole[rows].t()  # type: ignore[index, operator]
        share = 1.0
        if name in ("self_attn.o_proj", "mlp.down_proj"):
            norm = norms[name == "mlp.down_proj"]
            wanted += then[f"model.layers.{own}.{norm}"][:, hidden] - now[f"model.layers.{index}.{norm}"]
            if name == "mlp.down_proj" and after > own + 1:
                bias = cut.get_submodule(at).bias
                wanted = then[behind][:, hidden] - bias - now[f"model.layers.{index}.{norm}"]  # type: ignore[operator]
        elif not narrow:
            share = 0.5
        damp = max(0.05, 2 * kept.shape[1] / tokens.numel())  # type: ignore[union-attr, index, operator]
        expected = solved(kept, wanted, now[at], damp, share)  # type: ignore[arg-type]
        found = small.get_submodule(at).weight
        assert torch.allclose(found, expected, atol=2e-5), (at, float((found - expected).abs().max()))  # type: ignore[operator, arg-type]


def rows_kept(cut: nn.Module, whole: nn.Module, hidden: Tensor, name: str) -> Tensor:
    """Which rows of a matrix were kept: those of the residual stream, or by what each row holds."""
    if name in ("self_attn.o_proj", "mlp.down_proj"):
        return hidden
    rows, all_rows = cut.weight, whole.weight[:, hidden]  # type: ignore[index]
    return torch.stack([(all_rows == row).all(1).nonzero()[0, 0] for row in rows])  # type: ignore[union-attr, operator]


def test_errors_in_the_record_are_those_of_the_weights(tmp_path: Path) -> None:
    parent = make(tmp_path / "model", "llama", attention_bias=False, mlp_bias=False)
    there = context(torch.float64, sequences=24)
    record = prune(parent, tmp_path / "work", there, shape={"intermediate_size": 64})
    base = load_stock(parent.folder, torch.float64)
    small = load_stock(tmp_path / "work" / "checkpoint", torch.float64)
    name = "model.layers.0.mlp.down_proj"
    (row,) = [m for m in record.layers[0].modules if isinstance(m, PrunedModule) and m.name == name]
    assert there.tokens is not None
    then, now = (inputs_of(model, there.tokens.tokens, [name])[name] for model in (base, small))
    wanted = then @ base.get_submodule(name).weight.t()
    missed = wanted - now @ small.get_submodule(name).weight.t()
    assert row.error == pytest.approx(float(missed.square().sum() / wanted.square().sum()), rel=1e-4)
    assert row.error_cut is not None and row.error < row.error_cut
    assert (row.shape, row.before) == ((64, 64), (64, 96))


def test_compensation_and_training_help(tmp_path: Path) -> None:
    parent, shape = make(tmp_path / "model", "llama"), {"intermediate_size": 64, "num_attention_heads": 2}
    there = context(sequences=512)  # eight batches, one of which is not trained on
    plain = prune(parent, tmp_path / "plain", there, shape=shape)
    trained = prune(parent, tmp_path / "trained", there, shape=shape, reconstruct="submodule", reconstruct_steps=60)
    assert plain.pruned is not None and trained.pruned is not None
    assert plain.pruned.calibration_kl is not None and trained.pruned.calibration_kl is not None
    assert trained.pruned.calibration_kl < plain.pruned.calibration_kl
    last = trained.layers[0].modules[-1]
    assert isinstance(last, PrunedModule) and last.layer_error is not None and last.layer_error_trained is not None
    assert last.layer_error_trained < last.layer_error
    assert torch.equal(
        logits_of(opens(tmp_path / "trained" / "checkpoint", torch.float32), there.probe)[0].detach(),
        read_part(tmp_path / "trained" / PROBE)[0]["logits"],
    )


def test_of_several_shapes_the_best_is_kept(tmp_path: Path) -> None:
    parent = make(tmp_path / "model", "llama")
    shapes = [{"intermediate_size": 16}, {"intermediate_size": 80}, {"num_attention_heads": 2}]
    record = prune(parent, tmp_path / "work", shape=shapes)
    assert record.pruned is not None and len(record.pruned.tried) == 3
    best = min(record.pruned.tried.values())
    assert record.pruned.calibration_kl == best and record.pruned.after["intermediate_size"] != 16
    opens(tmp_path / "work" / "checkpoint", torch.float32)


@pytest.mark.parametrize("shape", [{"intermediate_size": 48}, {"num_hidden_layers": 3}, {"num_attention_heads": 2}])
def test_quantizing_can_aim_at_the_model_before_pruning(shape: dict[str, int], tmp_path: Path) -> None:
    """Its correction then makes good some of what an uncompensated cut has lost; 8 bits lose hardly anything."""
    parent = make(tmp_path / "model", "llama")
    there = context(sequences=128)
    record = prune(parent, tmp_path / "pruned", there, shape=shape, compensate=False)
    assert record.pruned is not None and there.tokens is not None
    kept = [index for index in range(LAYERS) if index not in record.pruned.removed_layers]
    aimed = replace(there, base=parent, layers=kept)
    tokens, lost = there.tokens.tokens[:16], {}
    wanted = logits_of(load_stock(parent.folder, torch.float32), tokens).log_softmax(-1)
    for reference in ("parent", "base"):
        spec = WeightOnlyStage(kind="quantize", bits=8, group_size=-1, reference=reference)
        quantize(spec, Checkpoint(tmp_path / "pruned" / "checkpoint"), tmp_path / reference, aimed)
        with torch.no_grad():
            found = logits_of(opens(tmp_path / reference / "checkpoint", torch.float32), tokens).log_softmax(-1)
        lost[reference] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert lost["base"] < 0.9 * lost["parent"]
