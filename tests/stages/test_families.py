"""Model families, with a row in arch.py and without: streamed, quantized, opened again by stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PROBE, quantize
from random_models import load_stock, make_model, random_tokens
from torch import nn
from transformers import AutoModelForCausalLM
from visits import visit_layer

from compress.data.calibration import TokenSet
from compress.errors import ModelError
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.arch import FAMILIES, find_arch
from compress.model.checkpoint import Checkpoint, read_part
from compress.model.shapes import find_modules
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.system.progress import Reporter

CPU = torch.device("cpu")
LENGTH = 24  # longer than every window below
WINDOW = {"sliding_window": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
OTHER_NAMES: dict[str, Any] = {"num_hidden_layers": None, "num_attention_heads": None}  # transformers' older families
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": WINDOW | MIXED | {"query_pre_attn_scalar": 16},
    "phi3": WINDOW,
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    # without a row
    "bloom": OTHER_NAMES | {"n_head": 4, "n_layer": 2},
    "codegen": OTHER_NAMES | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "rotary_dim": 8},
    "cohere": {},
    "cohere2": WINDOW | MIXED,
    "exaone4": WINDOW | MIXED,
    "falcon": {"head_dim": None, "alibi": False, "new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16},
    "glm4": {},
    "gptj": OTHER_NAMES | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "rotary_dim": 8},
    "gpt_neo": {
        "num_hidden_layers": None,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "mpt": OTHER_NAMES
    | {"hidden_size": None, "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "granite": {},
    "olmo2": {},
    "phi": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
}
WITH_BIAS = {"llama", "qwen2", "gpt_neox", "opt", "phi", "starcoder2", "bloom", "codegen", "glm4", "gptj", "gpt_neo"}
TIED = {"bloom", "cohere", "cohere2", "falcon", "gpt_neo", "mpt", "smollm3"}  # of those without a row
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
GROUPS = {
    "bloom": [
        ("self_attention.query_key_value",), ("self_attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)
    ],
    "codegen": [("attn.qkv_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)],
    "cohere2": [(*ATTENTION, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)],
    "falcon_h1": [
        ("mamba.in_proj",), ("mamba.out_proj",), ATTENTION, ("self_attn.o_proj",),
        ("feed_forward.up_proj", "feed_forward.gate_proj"), ("feed_forward.down_proj",),
    ],
    "glm4": [ATTENTION, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gptj": [("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)],
    "gpt_neo": [
        ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"), ("attn.attention.out_proj",),
        ("mlp.c_fc",), ("mlp.c_proj",),
    ],
    "mpt": [("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt_neox": [
        ("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)
    ],
    "opt": [ATTENTION, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    "cohere": [(*ATTENTION, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)],
    "falcon": [
        ("self_attention.query_key_value", "mlp.dense_h_to_4h"), ("self_attention.dense",), ("mlp.dense_4h_to_h",)
    ],
    "phi": [(*ATTENTION, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)],
    "starcoder2": [ATTENTION, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
}  # fmt: skip


def make(folder: Path, family: str, tie: bool) -> Path:
    return make_model(folder, family, shard="50KB", tie_word_embeddings=tie, **CONFIGS[family])


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(6, LENGTH, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, LENGTH, 2), Reporter(quiet=True), False)


def test_every_row_is_tested() -> None:
    assert set(FAMILIES) <= set(CONFIGS)


@pytest.mark.parametrize(
    ("family", "tie"),
    [(family, tie) for family in CONFIGS for tie in (True, False) if family in FAMILIES or tie == (family in TIED)],
)
def test_family(family: str, tie: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", family, tie)
    assert len(list(folder.glob("*.safetensors"))) > 2
    with torch.no_grad():
        check_stream(folder, GROUPS.get(family, LLAMA))
        if family != "falcon":  # whose linears read their weight themselves; see below
            check_quantized(folder, tmp_path / "work", family, tie)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "cpmant": ({"dim_head": 16, "dim_ff": 96}, "for tokens of shape [1, 24]"),
    "falcon": (CONFIGS["falcon"], "its FalconLinear modules read their weights themselves"),
    "gpt2": (
        OTHER_NAMES | {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96}, "its layers have Conv1D modules"
    ),
    "mamba": ({"time_step_rank": 32}, 'add to ignore: ["*.mixer.dt_proj"]'),
    "mamba2": (
        {"num_heads": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}, 'add to ignore: ["*.mixer.out_proj"]'
    ),
    "recurrent_gemma": (
        {"intermediate_size": 128, "lru_width": 64, "attention_window_size": 8, "num_hidden_layers": 3},
        "reads the weights of its linear layers itself",
    ),
    "rwkv": ({"attention_hidden_size": 64}, "reads the weights of its linear layers itself"),
    "xlstm": ({"num_heads": 4}, "it can't be run layer by layer ("),
}  # fmt: skip


@pytest.mark.parametrize("family", REFUSED)
def test_what_stock_loaders_would_not_open_is_refused_in_one_line(family: str, tmp_path: Path) -> None:
    settings, reason = REFUSED[family]
    parent = Checkpoint(make_model(tmp_path / "model", family, **settings))
    with pytest.raises(ModelError) as caught:
        quantize(WeightOnlyStage(kind="quantize", group_size=32), parent, tmp_path / "work", context())
    line = str(caught.value)
    assert line.startswith(f"model_type {family!r}") and reason in line and "\n" not in line


def test_families_that_loaders_open_in_another_format_only(tmp_path: Path) -> None:
    """gptq puts modules in place of the linears that read their own weights; 8-bit weights stay in their place."""
    falcon = Checkpoint(make(tmp_path / "falcon", "falcon", tie=True))
    quantize(WeightOnlyStage(kind="quantize", group_size=32, format="gptq"), falcon, tmp_path / "gptq", context())
    settings, _ = REFUSED["rwkv"]
    rwkv = Checkpoint(make_model(tmp_path / "rwkv", "rwkv", **settings))
    quantize(WeightActivationStage(kind="quantize", method="dynamic"), rwkv, tmp_path / "work", context())
    check_opened(tmp_path / "work")


def check_opened(work: Path) -> nn.Module:
    """A written checkpoint opens in stock transformers, which computes what the layer loop computed."""
    stock, info = AutoModelForCausalLM.from_pretrained(
        work / "checkpoint", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = stock.eval()(context().probe, use_cache=False).logits[0].float()
    computed = read_part(work / PROBE)[0]["logits"]
    assert float((logits - computed).abs().max()) <= 2e-2 * float(computed.abs().max())
    assert float(computed.std()) > 0.1
    return stock


def check_stream(folder: Path, groups: list[tuple[str, ...]]) -> None:
    """Streamed logits are the stock model's, bit for bit, in a full batch and in a smaller one."""
    stock, tokens = load_stock(folder, torch.bfloat16), random_tokens(3, LENGTH)
    stream = LayerStream(Checkpoint(folder), CPU, torch.bfloat16)
    activations = stream.start(tokens, 2)
    for index in range(stream.depth):
        assert stream.groups(index, activations) == groups
        stream.fill_layer(index, stream.load_layer(index))
        visit_layer(stream, index, activations, lambda group, inputs: None)
        stream.empty_layer(index)
    stream.close()
    fresh = LayerStream(Checkpoint(folder), CPU, torch.bfloat16)  # as where an evaluation kept the hidden states
    with stream.outer(), fresh.outer():
        for part, hidden in zip(tokens.split(2), activations.hidden, strict=True):
            expected = stock(part, use_cache=False).logits
            assert torch.equal(stream.logits(hidden), expected) and torch.equal(fresh.logits(hidden), expected)


def check_quantized(folder: Path, work: Path, family: str, tie: bool) -> None:
    """The quantized checkpoint opens, and holds all linears quantized and the rest as it was."""
    parent = Checkpoint(folder)
    spec = WeightOnlyStage(kind="quantize", group_size=32)
    record = quantize(spec, parent, work, context())
    stock = check_opened(work)
    modules, arch = find_modules(parent), find_arch(stock, parent.config)
    assert (modules.layers, modules.embeddings) == (arch.layers, arch.embeddings)
    matrices = {module.name for layer in record.layers for module in layer.modules}
    assert matrices == set(modules.linears) and len(matrices) == count_linears(stock, parent)
    errors = [module.error for layer in record.layers for module in layer.modules]
    assert all(error is not None and 0 < error < 0.05 for error in errors)
    written = Checkpoint(work / "checkpoint")
    biases = [name for name in matrices if f"{name}.bias" in parent.tensors]
    assert bool(biases) == (family in WITH_BIAS)
    for name, tensor in parent.load(n for n in parent.tensors if n.removesuffix(".weight") not in matrices).items():
        assert torch.equal(written.load([name])[name], tensor)
    heads = [name for name in written.tensors if parent.tensors.get(name, written.tensors[name]).shape == (4096, 64)]
    assert len(heads) == (1 if tie else 2)


def count_linears(stock: nn.Module, parent: Checkpoint) -> int:
    """Linear modules in the layers of the stock model."""
    layers = stock.get_submodule(find_arch(stock, parent.config).layers)
    return sum(isinstance(module, nn.Linear) for module in layers.modules())


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
@pytest.mark.parametrize("tie", [True, False])
def test_quantized_heads_of_families(family: str, tie: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", family, tie)
    spec = WeightOnlyStage(kind="quantize", group_size=32, lm_head=True)
    quantize(spec, Checkpoint(folder), tmp_path / "work", context())
    check_opened(tmp_path / "work")
