"""8-bit weights and inputs: what is computed while quantizing is what the files say and what stock loaders compute."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import PROBE, opens, quantize, stop_after
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.errors import CalibrationError, RecipeError
from compress.evaluation import verify
from compress.formats import w8a8 as eight_bit
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop import stream as stream_module
from compress.loop.context import Context
from compress.loop.interleave import Arrival, Passes, Step
from compress.model.checkpoint import Checkpoint, TensorInfo, read_part
from compress.quant.gptq import round_to_nearest
from compress.quant.grid import FakeQuantize, Grid
from compress.recipe.quantize import MethodOverride, WeightActivationStage
from compress.records import Stage
from compress.runs.tools import inspect
from compress.stages.quantize.activations import ActivationScales
from compress.stages.quantize.cache_plan import check_cache
from compress.system.progress import Reporter

CPU = torch.device("cpu")
SIZES = {"intermediate_size": 128}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models, one of a kind."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
        key = f"{family}-{dtype}-{len(config)}"
        if key not in made:
            made[key] = make_model(folder / key, family, dtype=dtype, **(SIZES | config))
        return made[key]

    return model


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(6, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def spec(method: str = "dynamic", **settings: Any) -> WeightActivationStage:
    return WeightActivationStage(kind="quantize", method=method, **settings)


def check_logits(work: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """The finished model in memory, our reader and the stock loader compute the same."""
    computed = read_part(work / PROBE)[0]["logits"]
    own = verify.own_logits(Checkpoint(work / "checkpoint"), context().probe[0], CPU, dtype, False)
    assert torch.equal(own, computed) and float(own.std()) > 0.1
    stock = opens(work / "checkpoint", dtype)(context().probe, use_cache=False).logits[0].float()
    assert torch.equal(stock, computed)


# ---- rounding


def arguments(float8: bool, **others: Any) -> QuantizationArgs:
    return QuantizationArgs(num_bits=8, type="float" if float8 else "int", symmetric=True, **others)


@given(
    float8=st.booleans(),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    how=st.sampled_from(["token", "tensor", "group"]),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_inputs_are_rounded_as_the_library_does(
    float8: bool, dtype: torch.dtype, how: str, size: float, seed: int
) -> None:
    x = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    x[0, 0] = 0
    if how == "tensor":
        scale = (x.abs().amax().float() / 100).to(dtype)
        wanted = fake_quantize(x, scale.view(1), torch.zeros(1), arguments(float8, strategy="tensor"))
        assert torch.equal(FakeQuantize(float8, scale.float())(x), wanted)
        return
    size_of_group = 32 if how == "group" else None
    args = arguments(float8, strategy=how, dynamic=True, group_size=size_of_group)
    scale, zero = compute_dynamic_scales_and_zp(x, args, nn.Module())
    wanted = fake_quantize(x, scale, zero, args)
    assert torch.equal(FakeQuantize(float8, group_size=size_of_group or -1)(x), wanted)


GRIDS = {
    "int8 channel": Grid(8, -1, True, signed_scale=False),
    "int8 tensor": Grid(8, -1, True, signed_scale=False, rows=-1),
    "fp8 channel": Grid(8, -1, True, signed_scale=False, float8=True),
    "fp8 tensor": Grid(8, -1, True, signed_scale=False, float8=True, rows=-1),
    "fp8 block": Grid(8, 128, True, signed_scale=False, float8=True, rows=128),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rows", [96, 200, 256])
def test_files_are_what_the_library_writes(name: str, rows: int) -> None:
    grid = GRIDS[name]
    weight = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)) * torch.rand(rows, 1)
    matrix = round_to_nearest(weight, torch.ones(256), grid)
    tensors = eight_bit.pack(matrix)
    again = eight_bit.unpack(tensors, grid)
    assert torch.equal(again.dequantize(), matrix.dequantize()) and torch.equal(again.scale, matrix.scale)
    config = eight_bit.quantization_config({"m": grid}, {"m": FakeQuantize(grid.float8)}, [], None)
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    library = compressor.compress({"weight": weight, "weight_scale": tensors["weight_scale"].float()}, scheme)
    assert torch.equal(library["weight"].view(torch.uint8), tensors["weight"].view(torch.uint8))
    dense = compressor.decompress(dict(tensors), scheme)["weight"]
    assert torch.equal(dense, matrix.dequantize(torch.bfloat16))
    names = {torch.int8: "I8", torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16"}
    headers = {n: TensorInfo(Path(), n, names[t.dtype], tuple(t.shape), t.nbytes, 0) for n, t in tensors.items()}
    assert eight_bit.describe(headers, (), config["config_groups"]["group_0"]) == grid
    assert float((matrix.dequantize() - weight).norm() / weight.norm()) < (0.04 if grid.float8 else 0.02)
    assert bool((matrix.scale > 0).all())


# ---- the stage


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt"])
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
@pytest.mark.parametrize("method", ["dynamic", "static"])
def test_stock_loaders_compute_what_was_simulated(
    models: Callable[..., Path], tmp_path: Path, family: str, dtype: str, method: str
) -> None:
    config = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    rounding = "rtn" if family == "qwen2" else "gptq"
    quantize(
        spec(method, dtype=dtype, weight_rounding=rounding), Checkpoint(models(family, **config)), tmp_path, context()
    )
    check_logits(tmp_path)
    tensors = {n: t for file in (tmp_path / "checkpoint").glob("*.safetensors") for n, t in load_file(file).items()}
    scales = [name for name in tensors if name.endswith(".input_scale")]
    weights = [name for name, t in tensors.items() if t.dtype in (torch.int8, torch.float8_e4m3fn)]
    assert len(weights) > 7 and len(scales) == (len(weights) if method == "static" else 0)


def test_inputs_really_are_rounded(models: Callable[..., Path], tmp_path: Path) -> None:
    """Without its rounding the finished model says something else: the comparison above compares something."""
    quantize(spec("static"), Checkpoint(models()), tmp_path, context())
    view = DequantizedCheckpoint(Checkpoint(tmp_path / "checkpoint"))
    assert set(view.inputs) == set(view.grids) and all(each.scale is not None for each in view.inputs.values())
    stock = opens(tmp_path / "checkpoint")
    stock(context().probe)  # decompresses
    for module in stock.modules():
        module.quantization_enabled = False
    computed: Tensor = read_part(tmp_path / PROBE)[0]["logits"]
    assert not torch.equal(stock(context().probe, use_cache=False).logits[0].float(), computed)


def test_hybrid(models: Callable[..., Path], tmp_path: Path) -> None:
    settings = spec("static", overrides={"*.down_proj": MethodOverride(method="dynamic")}, ignore=["*.1.*.o_proj"])
    record = quantize(settings, Checkpoint(models()), tmp_path, context())
    check_logits(tmp_path)
    methods = {module.name: module.inputs for layer in record.layers for module in layer.modules}
    assert {name: method for name, method in methods.items() if method == "dynamic"} == {
        f"model.layers.{layer}.mlp.down_proj": "dynamic" for layer in (0, 1)
    }
    assert len(methods) == 13
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "int-quantized" and len(config["config_groups"]) == 2
    assert config["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]


# ---- little memory


@pytest.mark.parametrize(
    ("passes", "method", "settings"),
    [
        # range twice, Hessian
        (3, "static", {"observer": "mse", "smooth": "auto", "kv_cache": "fp8", "dtype": "fp8"}),
        (1, "static", {"observer": "moving_average", "weight_rounding": "rtn"}),
        (2, "auto", {}),  # range, Hessian
        (1, "dynamic", {"smooth": 0.5, "weight_rounding": "rtn"}),
        (1, "dynamic", {}),
    ],
)
def test_batches_are_not_held_together_where_memory_is_small(
    models: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: int,
    method: str,
    settings: dict[str, Any],
) -> None:
    """Nor does it change a byte of what is written, or a figure."""
    monkeypatch.setitem(stream_module.TOKENS_PER_BATCH, "cpu", 24)  # six batches
    records = [quantize(spec(method, **settings), Checkpoint(models()), tmp_path / "large", context())]
    usual, inputs, most = stream_module.recompute, [], [0]

    def again(*arguments: Any) -> Iterator[Step]:
        for group, arrivals in usual(*arguments):
            yield group, Passes(partial(map, noted, arrivals))

    def noted(arrival: Arrival) -> Arrival:
        inputs.append(weakref.ref(arrival.input.untyped_storage()))
        most[0] = max(most[0], sum(storage() is not None for storage in inputs))
        return arrival

    monkeypatch.setattr(stream_module, "recompute", again)
    small = replace(context(), max_memory=1)
    records.append(quantize(spec(method, **settings), Checkpoint(models()), tmp_path / "small", small))
    assert len(inputs) == passes * 6 * 4 * 2  # batches, groups, layers
    assert most[0] <= 2
    assert errors(records[0]) == errors(records[1]) and all(errors(records[0]).values())
    written = [(tmp_path / name / "checkpoint" / "model.safetensors").read_bytes() for name in ("large", "small")]
    assert written[0] == written[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("smooth", [None, 0.5])
def test_the_weights_that_a_stage_holds_are_those_that_it_reckoned_with(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, smooth: Any
) -> None:
    reckoned, held = [], []
    room, decide = Context.room, ActivationScales.decide

    def reckoning(self: Context, layer_bytes: int, *widths: int) -> float:
        reckoned.append(layer_bytes)
        return room(self, layer_bytes, *widths)

    def deciding(self: ActivationScales, names: Any, inputs: Any, weights: dict[str, Tensor]) -> Any:
        filled, following = self.stream.layers[0].parameters(), self.stream.load_layer(1)
        if next(iter(weights)).startswith("model.layers.0."):
            held.append(sum(t.nbytes for t in (*weights.values(), *filled, *following.values())))
        return decide(self, names, inputs, weights)

    monkeypatch.setattr(Context, "room", reckoning)
    monkeypatch.setattr(ActivationScales, "decide", deciding)
    quantize(spec(smooth=smooth), Checkpoint(models(dtype=dtype)), tmp_path, context())
    assert max(held) <= reckoned[0] < 1.01 * max(held)


# ---- smoothing


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt"])
@pytest.mark.parametrize("smooth", [0.5, "auto"])
def test_smoothed_models_open_as_simulated(
    models: Callable[..., Path], tmp_path: Path, family: str, smooth: float | str
) -> None:
    config = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    record = quantize(spec("static", smooth=smooth), Checkpoint(models(family, **config)), tmp_path, context())
    check_logits(tmp_path)
    powers = {module.name: module.smooth for layer in record.layers for module in layer.modules}
    if smooth == 0.5:
        assert all(power == 0.5 for name, power in powers.items() if "dense" not in name and "4h" not in name)


def test_blocks_open_as_simulated(models: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    quantize(spec(dtype="fp8", granularity="block"), Checkpoint(models(**sizes)), tmp_path, context())
    check_logits(tmp_path)


def test_blocks_are_the_layout_of_deepseek(models: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    quantize(spec(dtype="fp8", granularity="block"), Checkpoint(models(**sizes)), tmp_path, context())
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    shapes = {part: tuple(tensors[f"model.layers.0.mlp.{part}_proj.weight_scale"].shape) for part in ("up", "down")}
    assert shapes == {"up": (2, 1), "down": (1, 2)}
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert group["weights"]["block_structure"] == [128, 128]
    assert (group["input_activations"]["strategy"], group["input_activations"]["group_size"]) == ("group", 128)


# ---- hybrid


def errors(record: Stage) -> dict[str, float]:
    return {module.name: float(module.error or 0) for layer in record.layers for module in layer.modules}


def test_auto_is_never_worse_than_both_of_its_choices(models: Callable[..., Path], tmp_path: Path) -> None:
    records = {
        name: quantize(spec(name, weight_rounding="rtn"), Checkpoint(models()), tmp_path / name, context())
        for name in ("static", "dynamic")
    }
    chosen: dict[float, set[str]] = {}
    for budget in (0.0, 0.5, 1000.0):
        work = tmp_path / str(budget)
        record = quantize(spec("auto", weight_rounding="rtn", budget=budget), Checkpoint(models()), work, context())
        check_logits(work)
        for layer in record.layers:
            for module in layer.modules:
                assert set(module.errors) == {"static", "dynamic"} and module.inputs is not None
                assert module.error == pytest.approx(module.errors[module.inputs], rel=1e-5)
                assert module.error <= max(module.errors.values()) * 1.00001
            methods = {module.name.rpartition(".")[2][0]: module.inputs for module in layer.modules}
            assert methods["q"] == methods["k"] == methods["v"] and methods["g"] == methods["u"]  # runtimes fuse them
        chosen[budget] = {m.name for layer in record.layers for m in layer.modules if m.inputs == "static"}
        total = sum(errors(record).values())
        assert total <= 1.05 * max(sum(errors(each).values()) for each in records.values())
    assert chosen[0.0] <= chosen[0.5] <= chosen[1000.0] and len(chosen[1000.0]) == 14 and len(chosen[0.0]) < 14


# ---- the cache of keys and values


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize(("kv_cache", "strategy"), [("fp8", "tensor"), ("fp8_per_head", "attn_head")])
def test_keys_and_values_are_rounded_as_stock_loaders_do(
    models: Callable[..., Path], tmp_path: Path, family: str, kv_cache: str, strategy: str
) -> None:
    """All four have half as many key-value heads as heads."""
    config = {"query_pre_attn_scalar": 16} if family == "gemma2" else {}
    parent = Checkpoint(models(family, **config))
    quantize(spec("static", dtype="fp8", kv_cache=kv_cache), parent, tmp_path, context())
    check_logits(tmp_path)
    quantize(spec("static", dtype="fp8"), parent, tmp_path / "without", context())
    logits = [read_part(work / PROBE)[0]["logits"] for work in (tmp_path, tmp_path / "without")]
    assert not torch.equal(logits[0], logits[1])  # so the comparison above compares something
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    shape = (1,) if kv_cache == "fp8" else (2, 1, 1)
    scales = {n: t for n, t in tensors.items() if n.endswith((".k_scale", ".v_scale"))}
    assert len(scales) == 4 and all(scale.shape == shape for scale in scales.values())
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] == {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False
    }  # fmt: skip


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_per_head"])
def test_cache_scales_are_the_largest_keys_and_values(
    models: Callable[..., Path], tmp_path: Path, kv_cache: str
) -> None:
    """Of the first layer, whose inputs are the embeddings: against stock transformers."""
    quantize(spec("static", dtype="fp8", kv_cache=kv_cache), Checkpoint(models()), tmp_path, context())
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    stock = load_stock(models(), torch.bfloat16)
    tokens = context().tokens
    assert tokens is not None
    cache = stock(tokens.tokens, use_cache=True).past_key_values
    for part, states in (("k", cache.layers[0].keys), ("v", cache.layers[0].values)):
        scale = tensors[f"model.layers.0.self_attn.{part}_scale"]
        heads = torch.stack([states[:, head].abs().amax() for head in range(2)]).float()
        wanted = (heads / 448).to(torch.bfloat16)
        assert wanted[0] != wanted[1]
        assert torch.equal(scale, wanted.amax().view(1) if kv_cache == "fp8" else wanted.view(2, 1, 1))


def change(models: Callable[..., Path], folder: Path, weight: str, heads: slice) -> Path:
    """The usual model with some heads of layer 1 silent."""
    shutil.copytree(models(), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.self_attn.{weight}"].view(2, 16, 64)[heads] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_silent_head_does_not_stop_the_others(models: Callable[..., Path], tmp_path: Path) -> None:
    parent = change(models, tmp_path / "model", "v_proj.weight", slice(1, 2))
    quantize(spec("static", dtype="fp8", kv_cache="fp8_per_head"), Checkpoint(parent), tmp_path, context())
    check_logits(tmp_path)
    silent = change(models, tmp_path / "silent", "v_proj.weight", slice(0, 2))
    with pytest.raises(
        CalibrationError, match=r"layers.1.self_attn: keys or values are all zero .* use kv_cache: null$"
    ):
        quantize(spec("static", dtype="fp8", kv_cache="fp8_per_head"), Checkpoint(silent), tmp_path / "no", context())


def test_a_family_whose_cache_is_not_known_is_refused(models: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^kv_cache: GPTNeoXForCausalLM has no attention modules"):
        quantize(spec(kv_cache="fp8"), Checkpoint(models("gpt_neox")), tmp_path, context())
    opt = models("opt", ffn_dim=128, word_embed_proj_dim=64, num_key_value_heads=None)
    with pytest.raises(RecipeError, match=r"^kv_cache: OPTForCausalLM has no num_key_value_heads in its config"):
        quantize(spec(kv_cache="fp8"), Checkpoint(opt), tmp_path, context())
    wrong = models("opt", ffn_dim=128, word_embed_proj_dim=64)  # its config says 2, and it has 4
    with pytest.raises(
        RecipeError, match=r"self_attn has 4 key-value heads and config.json says 2.*; use kv_cache: fp8$"
    ):
        quantize(spec(kv_cache="fp8_per_head"), Checkpoint(wrong), tmp_path, context())


GEMMA4 = {
    "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32, "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 4096, "use_double_wide_mlp": False,
}  # fmt: skip


def test_layers_with_heads_of_their_own_are_refused_before_anything_is_computed(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    """No stock loader opens such a cache: transformers refuses to say one width of heads for the model."""
    pytest.importorskip("transformers.models.gemma4")
    pytest.importorskip("transformers.integrations.heterogeneity")
    stage = spec("static", dtype="fp8", kv_cache="fp8")
    wide = Checkpoint(models("gemma4_text", global_head_dim=32, **GEMMA4))
    what = (
        "model.layers.0.self_attn.k_proj.weight has 32 rows and model.layers.1.self_attn.k_proj.weight 64), and "
        "loaders know one for all layers; use kv_cache: null"
    )
    with pytest.raises(RecipeError) as caught:
        check_cache(stage, wide, "stages.0")
    assert str(caught.value) == f"stages.0.kv_cache: the layers' keys and values differ in width ({what}"
    same_rows = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    even = Checkpoint(models("gemma4_text", global_head_dim=32, **GEMMA4, **same_rows))
    with pytest.raises(RecipeError) as caught:
        check_cache(stage, even, "stages.0")
    ends = "for each layer, and loaders know one for all layers; use kv_cache: null"
    assert str(caught.value) == f"stages.0.kv_cache: config.json has num_key_value_heads {ends}"
    with pytest.raises(RecipeError) as caught:
        quantize(stage, even, tmp_path, context())
    assert str(caught.value) == f"kv_cache: Gemma4ForCausalLM has num_key_value_heads {ends}"
    assert not list(tmp_path.rglob("*.safetensors"))
    check_cache(spec("static", dtype="fp8"), wide, "stages.0")  # without the cache nothing is wrong


# ---- resume


@pytest.mark.parametrize(("method", "kv_cache"), [("static", "fp8"), ("auto", "fp8_per_head")])
def test_a_stopped_run_continues_to_the_same_bytes(
    models: Callable[..., Path], tmp_path: Path, method: str, kv_cache: str
) -> None:
    settings = spec(method, dtype="fp8", smooth=0.5, kv_cache=kv_cache, weight_rounding="gptq")
    parent = Checkpoint(models(num_hidden_layers=3))
    quantize(settings, parent, tmp_path / "whole", context())
    stop_after(2, settings, parent, tmp_path / "stopped", context())
    record = quantize(settings, parent, tmp_path / "stopped", context())
    assert record.resumed_layers == 2
    for name in ("checkpoint/model.safetensors", "checkpoint/config.json", PROBE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_size_of_a_model_with_small_embeddings(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "tie_word_embeddings": True}
    parent = Checkpoint(make_model(tmp_path / "model", **sizes))
    quantize(spec(weight_rounding="rtn"), parent, tmp_path / "work", context())
    assert Checkpoint(tmp_path / "work" / "checkpoint").bytes <= 0.27 * 2 * parent.bytes  # float32 is twice bfloat16


def test_inspect_says_how_inputs_are_rounded(models: Callable[..., Path], tmp_path: Path) -> None:
    settings = spec("static", dtype="fp8", overrides={"*.down_proj": MethodOverride(method="dynamic")})
    quantize(settings, Checkpoint(models()), tmp_path, context())
    lines = "\n".join(inspect(tmp_path / "checkpoint"))
    assert "q_proj     " in lines and "fp8, a scale per row, static inputs" in lines
    assert "fp8, a scale per row, dynamic inputs" in lines
