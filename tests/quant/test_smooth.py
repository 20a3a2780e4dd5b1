"""SmoothQuant: folds that hold are found and exact, others are refused; observers against plain definitions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import quantize, stop_after
from random_models import make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.errors import CalibrationError, RecipeError
from compress.loop.context import Context
from compress.loop.folds import Fold, apply_fold, find_folds, gain_offset
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.quant.activations import static_fake_quantize
from compress.quant.grid import FakeQuantize
from compress.quant.observers import reach
from compress.quant.smooth import refine, smoothing_scale
from compress.recipe.quantize import WeightActivationStage
from compress.system.progress import Reporter

CPU = torch.device("cpu")
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "starcoder2": {},
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = {
    QKV: "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
FOLDS = {
    "gemma2": LLAMA | {("mlp.gate_proj", "mlp.up_proj"): "pre_feedforward_layernorm"},
    "gpt_neox": {("attention.query_key_value",): "input_layernorm", ("mlp.dense_h_to_4h",): "post_attention_layernorm"},
    "opt": {
        QKV: "self_attn_layer_norm",
        ("self_attn.out_proj",): "self_attn.v_proj",
        ("fc1",): "final_layer_norm",
        ("fc2",): "fc1",  # through a ReLU, which scales along
    },
    "phi3": {("self_attn.qkv_proj",): "input_layernorm", ("mlp.gate_up_proj",): "post_attention_layernorm"},
    "starcoder2": {
        QKV: "input_layernorm",
        ("self_attn.o_proj",): "self_attn.v_proj",
        ("mlp.c_fc",): "post_attention_layernorm",  # and none through the GELU
    },
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


Opened = tuple[LayerStream, Callable[[], Tensor], dict[str, Tensor], list[tuple[str, ...]]]


def first_layer(folder: Path, dtype: torch.dtype) -> Opened:
    """The stream, what runs its first layer, now filled, its tensors by local name, linears that share an input."""
    stream = LayerStream(Checkpoint(folder), CPU, dtype)
    activations = stream.start(random_tokens(2, 12), 2)
    tensors = stream.load_layer(0)
    layer = stream.fill_layer(0, tensors)
    hidden = activations.hidden[0]

    def run() -> Tensor:
        out = layer(hidden, **activations.of_layer(0, hidden))
        return out[0] if isinstance(out, tuple) else out

    local = {name.removeprefix(stream.prefix(0)): tensor for name, tensor in tensors.items()}
    return stream, run, local, stream.groups(0, activations)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_folds_are_found_and_exact_in_float64(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family, dtype=stored, **CONFIGS[family])
    stream, run, tensors, groups = first_layer(folder, torch.float32)
    folds = {k: fold for k, fold in find_folds(stream.layers[0], groups, run, 16).items() if fold}
    assert {fold.group: fold.producer for fold in folds.values()} == FOLDS.get(family, LLAMA)
    stream, run, _, _ = first_layer(folder, torch.float64)
    before, folded = run(), dict(tensors)
    for index, fold in enumerate(folds.values()):
        channels = tensors[f"{fold.producer}.weight"].shape[0]
        scale = torch.exp2(torch.randn(channels, generator=torch.Generator().manual_seed(index)) * 2)
        apply_fold(folded, fold, scale, lambda name: True)
    changed = [name for name in tensors if not torch.equal(tensors[name].float(), folded[name].float())]
    assert len(changed) >= 2 * len(folds)
    stream.fill_layer(0, {stream.prefix(0) + name: tensor for name, tensor in folded.items()})
    after = run()
    assert float((after - before).norm() / before.norm()) < 1e-6  # float32 products are rounded


def test_norms_of_both_forms_and_of_neither() -> None:
    class Cubed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight**3

    class Shifted(nn.RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.normalized_shape, 1 + self.weight)

    assert [gain_offset(norm) for norm in (nn.RMSNorm(8), nn.LayerNorm(8), Shifted(8), Cubed())] == [0, 0, 1, None]


@pytest.mark.parametrize("bias", [True, False])
def test_what_stays_in_16_bits_is_not_rounded(bias: bool) -> None:
    """A fold into weights that are not quantized takes powers of two: the values are those of before, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    norm, weight = torch.rand(8, generator=generator) + 0.5, torch.randn(4, 8, generator=generator)
    tensors = {"norm.weight": norm.bfloat16(), "fc.weight": weight.bfloat16()}
    tensors |= {"norm.bias": torch.randn(8, generator=generator).bfloat16()} if bias else {}
    before = dict(tensors)
    scale = torch.rand(8, generator=generator) * 5 + 0.1
    apply_fold(tensors, Fold(("fc",), "norm", 0.0), scale, lambda name: False)
    used = before["norm.weight"].float() / tensors["norm.weight"].float()
    assert torch.equal(used.log2(), used.log2().round()) and bool(((used / scale).log2().abs() <= 0.51).all())
    for name in tensors:
        factor = used if name == "fc.weight" else 1 / used
        assert torch.equal(tensors[name].float(), before[name].float() * factor)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from([0.0, 1.0, None]),
    st.booleans(),
    st.sampled_from([(), ("a",), ("a", "b"), ("before", "a", "b")]),
    st.floats(0, 12),
)
@settings(deadline=None, max_examples=150)
def test_products_through_a_fold_stay_what_they_were(
    seed: int, dtype: torch.dtype, offset: float | None, bias: bool, quantized: tuple[str, ...], spread: float
) -> None:
    """gain * column and bias * column, in float64; exactly where numbers are stored in 16 bits."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).mul(2).exp()
        return values.masked_fill_(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype)

    tensors = {"a.weight": random(3, 16), "b.weight": random(5, 16)}
    tensors["before.weight"] = random(16, 4) if offset is None else random(16)
    if bias:
        tensors["before.bias"] = random(16)
    before = dict(tensors)
    scale = (torch.randn(16, generator=generator) * spread).exp2()
    apply_fold(tensors, Fold(("a", "b"), "before", offset), scale, lambda name: name in quantized)
    assert all(tensor.isfinite().all() for tensor in tensors.values())

    def products(values: dict[str, Tensor]) -> list[Tensor]:
        gain = values["before.weight"].double() + (offset or 0.0)
        vectors = [
            *(gain.unbind(1) if gain.dim() == 2 else [gain]),
            *([values["before.bias"].double()] if bias else []),
        ]
        return [vector * values[f"{name}.weight"].double() for vector in vectors for name in "ab"]

    in_16_bits = bias or not {"a", "b", *(["before"] if offset is None else [])} <= set(quantized)
    for was, now in zip(products(before), products(tensors), strict=True):
        torch.testing.assert_close(now, was, rtol=0 if in_16_bits else 1e-6, atol=0)


def test_folds_are_found_in_float16(tmp_path: Path) -> None:
    """Whose smallest numbers lose digits when they are halved."""
    folder = make_model(tmp_path / "model", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        tensors[f"model.layers.{index}.mlp.up_proj.weight"] *= 2e-5
        tensors[f"model.layers.{index}.mlp.down_proj.weight"] *= 1e4
        tensors[f"model.layers.{index}.input_layernorm.weight"] *= 1e-6
        for part in "qkv":
            tensors[f"model.layers.{index}.self_attn.{part}_proj.weight"] *= 1e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    record = quantize(stage("dynamic"), Checkpoint(folder), tmp_path / "work", context(torch.float16))
    assert [[module.smooth for module in layer.modules] for layer in record.layers] == [[0.5] * 7] * 2


def test_inputs_that_don_t_matter_have_no_fold(tmp_path: Path) -> None:
    """Any producer would seem to hold for them."""
    stream, run, tensors, groups = first_layer(make_model(tmp_path / "model"), torch.bfloat16)
    stream.fill_layer(0, {"model.layers.0.mlp.up_proj.weight": torch.zeros_like(tensors["mlp.up_proj.weight"])})
    found = find_folds(stream.layers[0], groups, run, 16)
    assert {first for first, fold in found.items() if fold is None} == {"mlp.gate_proj", "mlp.down_proj"}


HYBRIDS: dict[str, tuple[dict[str, Any], list[str], list[list[str]]]] = {
    "recurrent_gemma": (
        {"lru_width": 64, "attention_window_size": 16, "num_hidden_layers": 3}, [],
        [*[["linear_y", "linear_x", "gate", "up", "down"]] * 2, ["q", "k", "v", "o", "gate", "up", "down"]],
    ),
    "lfm2": (
        {"layer_types": ["full_attention", "conv"], "block_multiple_of": 32}, [],
        [["q", "k", "v", "out", "w1", "w3", "w2"], ["in", "w1", "w3", "w2"]],
    ),
    "falcon_h1": (
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}, ["*.mamba.*"],
        [["o", "up", "gate", "down"]] * 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_of_several_kinds(family: str, tmp_path: Path) -> None:
    """Each has folds of its own, also where a stopped run goes on from another kind."""
    config, ignore, smoothed = HYBRIDS[family]
    source = Checkpoint(make_model(tmp_path / "model", family, **config))
    spec = stage("dynamic", ignore=ignore)
    record = quantize(spec, source, tmp_path / "whole", context())
    found = [[m.name for m in layer.modules if m.smooth is not None] for layer in record.layers]
    assert [[n.rpartition(".")[2].removesuffix("_proj") for n in names] for names in found] == smoothed
    stop_after(len(smoothed) - 1, spec, source, tmp_path / "stopped", context())
    assert quantize(spec, source, tmp_path / "stopped", context()).resumed_layers == len(smoothed) - 1
    file = "checkpoint/model.safetensors"
    assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_family_without_attention_heads_is_refused_by_its_inputs(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "rwkv", attention_hidden_size=64, context_length=128)
    with pytest.raises(RecipeError, match=r"^smooth: rwkv\.blocks\.0\.attention\.key can't be smoothed"):
        quantize(stage("dynamic"), Checkpoint(folder), tmp_path / "work", context())


def test_a_residual_branch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer whose residual takes the norm's output, as BLOOM's may."""
    from transformers.models.llama import modeling_llama

    usual = modeling_llama.LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return usual(self, hidden_states, **arguments) + 0.01 * self.input_layernorm(hidden_states)

    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    with pytest.raises(RecipeError) as caught:
        quantize(stage(), Checkpoint(folder), tmp_path / "work", context())
    assert str(caught.value) == (
        "smooth: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, model.layers.0.self_attn.v_proj "
        "can't be smoothed: what model.layers.0.input_layernorm puts out goes elsewhere too (a residual branch); "
        "use smooth: null"
    )


def test_inputs_that_come_from_no_norm_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "olmo2")  # whose norms come behind attention and MLP
    with pytest.raises(RecipeError, match=r"^smooth: model\.layers\.0\.self_attn\.q_proj.* from no norm or linear"):
        quantize(stage(), Checkpoint(folder), tmp_path / "work", context())


def stage(method: Any = "static", **settings: Any) -> WeightActivationStage:
    return WeightActivationStage(kind="quantize", method=method, smooth=0.5, **settings)


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(4, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def test_smoothing_scale_is_the_papers() -> None:
    x, w = torch.tensor([8.0, 2.0, 0.5]), torch.tensor([2.0, 2.0, 2.0])
    scale = smoothing_scale(x, w, 0.5)
    plain = (x / w).sqrt()
    assert torch.allclose(scale / scale[0], plain / plain[0]) and float(scale.log().mean().abs()) < 1e-6
    assert torch.allclose(smoothing_scale(x, w, 0.0), torch.ones(3))  # equal weights: nothing to move


def test_channels_that_are_silent_in_calibration_are_not_blown_up() -> None:
    """What they may say later has to fit beside the others."""
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(1, 512, 96, generator=generator), torch.randn(64, 96, generator=generator)
    for silent in (0.0, 1e-6):
        x[..., :8] *= silent
        start = smoothing_scale(x.abs().amax((0, 1)), w.abs().amax(0), 0.5)
        refined = refine(start, x, w, lambda scale: scale, lambda slope: slope)
        for scale in (start, refined):
            assert float(scale[:8].min() / scale[8:].median()) > 0.05
    assert bool((smoothing_scale(torch.zeros(4), torch.ones(4), 0.5) == 1).all())


def rounded_rows(matrix: Tensor) -> Tensor:
    """Each row on a grid of -127 to 127 of its own."""
    step = matrix.abs().amax(1, keepdim=True) / 127
    return (matrix / step).round() * step


def test_refined_scales_lose_less_on_other_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    channels = torch.randn(96, generator=generator).mul(1.5).exp()  # a few are far larger than the rest
    x, other = (torch.randn(1, 512, 96, generator=generator) * channels for _ in range(2))
    w = torch.randn(64, 96, generator=generator) * torch.randn(96, generator=generator).exp()

    def lost(scale: Tensor) -> float:
        return float((other[0] @ w.t() - rounded_rows(other[0] / scale) @ rounded_rows(w * scale).t()).square().sum())

    start = smoothing_scale(x.abs().amax((0, 1)), w.abs().amax(0), 0.7)
    found = refine(start, x, w, lambda scale: scale, lambda slope: slope)
    assert lost(found) < 0.9 * lost(start) and float(found.log().mean().abs()) < 1e-5


def test_slope_of_the_refinement_is_the_formulas() -> None:
    """The first step of Adam goes against the sign of the slope, here by automatic differentiation in float64."""
    generator = torch.Generator().manual_seed(2)
    fold = Fold(("o_proj",), "v_proj", None, head=3)  # 6 channels feed 12 inputs
    x, w = torch.randn(1, 64, 12, generator=generator), torch.randn(5, 12, generator=generator)
    logarithm = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        s = fold.spread(logarithm.exp(), 12)
        of_inputs = (x[0].double().abs() / s).amax(1).square().mean() * (s * w.double()).square().sum()
        of_weights = (w.double().abs() * s).amax(1).square().sum() * (x[0].double() / s).square().mean(0).sum()
        (of_inputs + of_weights).log().backward()
    slopes: list[Tensor] = []

    def total(slope: Tensor) -> Tensor:
        slopes.append(fold.total(slope, 6))
        return slopes[-1]

    refine(torch.ones(6), x, w, lambda scale: fold.spread(scale, 12), total)
    assert logarithm.grad is not None and torch.allclose(2 * slopes[0].double(), logarithm.grad, atol=1e-5)


# ---- observers


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 128, 512, generator=generator) * (1 + index) for index in range(3)]


def test_observers_are_what_they_say() -> None:
    data = batches()
    values = torch.cat([batch.abs().flatten() for batch in data])
    extremes = [float(batch.abs().max()) for batch in data]
    assert float(reach(data, "minmax")) == max(extremes)
    mean = extremes[0] + 0.1 * (extremes[1] - extremes[0])
    assert float(reach(data, "moving_average")) == pytest.approx(mean + 0.1 * (extremes[2] - mean))
    exact = float(values.sort().values[int(0.9999 * values.numel())])
    assert float(reach(data, "percentile")) == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("float8", [False, True])
def test_the_mse_range_loses_least(float8: bool) -> None:
    """Against the true error of many ranges, each measured on all values."""
    data = batches()
    values = torch.cat([batch.flatten() for batch in data])[None, None]
    found = static_fake_quantize(data, "mse", float8, torch.float32)
    assert found is not None and found.scale is not None

    def loss(rounding: FakeQuantize) -> float:
        return float((rounding(values) - values).square().mean())

    top = values.abs().max()
    others = [loss(FakeQuantize(float8, top * share / found.span)) for share in torch.linspace(0.1, 1.2, 45)]
    assert loss(found) <= 1.02 * min(others)


@given(st.sampled_from(["minmax", "moving_average", "percentile", "mse"]))
@settings(deadline=None)
def test_zeros_give_no_scale(observer: Any) -> None:
    assert static_fake_quantize([torch.zeros(1, 4, 8)], observer, False, torch.bfloat16) is None


def test_too_few_values_for_a_percentile() -> None:
    with pytest.raises(CalibrationError, match="needs 100,000"):
        reach([torch.ones(1, 8, 8)], "percentile")
