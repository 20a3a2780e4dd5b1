"""Model families, with a row in arch.py and without: streamed, quantized, opened again by stock transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from compress.data.calibration import TokenSet
from compress.model.arch import FAMILIES, find_arch
from compress.model.checkpoint import Checkpoint, read_part
from compress.model.stream import LayerStream
from compress.plan import find_modules
from compress.progress import Reporter
from compress.recipe import QuantizeStage
from compress.stages.context import Context
from compress.stages.quantize import PROBE, quantize

CPU = torch.device("cpu")
LENGTH = 24  # longer than every window below
WINDOW = {"sliding_window": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": WINDOW | {"query_pre_attn_scalar": 16},
    "gemma3_text": WINDOW | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": WINDOW,
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    # without a row
    "cohere": {},
    "falcon": {"head_dim": None, "alibi": False, "new_decoder_architecture": False},
    "granite": {},
    "olmo2": {},
    "phi": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": WINDOW,
}
WITH_BIAS = {"llama", "qwen2", "gpt_neox", "opt", "phi", "starcoder2"}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = [ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
GROUPS = {
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


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tie", [True, False])
def test_family(family: str, tie: bool, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", family, tie)
    assert len(list(folder.glob("*.safetensors"))) > 2
    with torch.no_grad():
        check_stream(folder, GROUPS.get(family, LLAMA))
        if family != "falcon":  # whose linears read their weight themselves: compressed-tensors can't take its place
            check_quantized(folder, tmp_path / "work", family, tie)


def check_stream(folder: Path, groups: list[tuple[str, ...]]) -> None:
    """Streamed logits are the stock model's, bit for bit, in a full batch and in a smaller one."""
    stock, tokens = load_stock(folder, torch.bfloat16), random_tokens(3, LENGTH)
    stream = LayerStream(Checkpoint(folder), CPU, torch.bfloat16)
    activations = stream.start(tokens, 2)
    for index in range(stream.depth):
        assert stream.groups(index, activations) == groups
        stream.fill_layer(index, stream.load_layer(index))
        stream.run_layer(index, activations, lambda group, inputs: None)
        stream.empty_layer(index)
    stream.close()
    fresh = LayerStream(Checkpoint(folder), CPU, torch.bfloat16)  # as where an evaluation kept the hidden states
    with stream.outer(), fresh.outer():
        for part, hidden in zip(tokens.split(2), activations.hidden, strict=True):
            expected = stock(part, use_cache=False).logits
            assert torch.equal(stream.logits(hidden), expected) and torch.equal(fresh.logits(hidden), expected)


def check_quantized(folder: Path, work: Path, family: str, tie: bool) -> None:
    """The quantized checkpoint opens in stock transformers, which computes what the layer loop computed."""
    parent = Checkpoint(folder)
    spec = QuantizeStage(kind="quantize", group_size=32)
    record = quantize(spec, parent, work, context())
    stock, info = AutoModelForCausalLM.from_pretrained(
        work / "checkpoint", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    logits = stock.eval()(context().probe, use_cache=False).logits[0].float()
    computed = read_part(work / PROBE)[0]["logits"]
    assert float((logits - computed).abs().max()) <= 2e-2 * float(computed.abs().max())
    assert float(computed.std()) > 0.1
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
    spec = QuantizeStage(kind="quantize", group_size=32, lm_head=True)
    quantize(spec, Checkpoint(folder), tmp_path / "work", context())
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "work" / "checkpoint", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        logits = stock.eval()(context().probe, use_cache=False).logits[0].float()
    computed = load_file(tmp_path / "work" / PROBE)["logits"]
    assert float((logits - computed).abs().max()) <= 2e-2 * float(computed.abs().max())
