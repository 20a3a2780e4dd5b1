"""Bytes of the KV cache, against the tensors of transformers' own caches after a forward pass."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from compress.errors import ModelError
from compress.footprint.cache import Cache, Layer, cache_of

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
LATENT: dict[str, Any] = {
    "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "q_lora_rank": 32,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "all heads": ("llama", {"num_key_value_heads": 4}),
    "grouped heads": ("llama", {}),
    "one key-value head": ("llama", {"num_key_value_heads": 1}),
    "a head_dim of its own": ("qwen3", {"head_dim": 24}),
    "windows in all layers": ("mistral", {"sliding_window": 16}),
    "no window": ("mistral", {"sliding_window": None}),
    "windows from a layer on": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "every second layer": ("gemma2", {"sliding_window": 16}),
    "five of six layers": ("gemma3_text", {"sliding_window": 16, "num_hidden_layers": 7}),
    "windows beside experts": ("gpt_oss", {"sliding_window": 16, "num_local_experts": 4}),
    "experts": ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}),
    "latent, V2": ("deepseek_v2", LATENT),
    "latent, V3": ("deepseek_v3", LATENT),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("tokens", "batch"), [(40, 1), (9, 3)])
def test_it_is_what_transformers_allocates(kind: str, tokens: int, batch: int) -> None:
    family, more = KINDS[kind]
    config = AutoConfig.for_model(family, **(SIZES | more))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        kept = model(torch.ones(batch, tokens, dtype=torch.long), use_cache=True).past_key_values
    tensors = [tensor for layer in kept.layers for tensor in (layer.keys, layer.values)]
    assert cache_of(config, kind).bytes(tokens, batch) == sum(each.numel() * each.element_size() for each in tensors)


def test_a_latent_is_small_and_every_card_holds_it() -> None:
    config = AutoConfig.for_model("deepseek_v3")
    cache = cache_of(config, "V3")
    assert cache.latent and {layer.numbers for layer in cache.layers} == {512 + 64}
    assert cache.expanded == 128 * (192 + 128)
    assert cache.share(8) == 1.0


def test_a_model_of_16_bits_keeps_half_in_fp8() -> None:
    cache = cache_of(AutoConfig.for_model("llama", **SIZES), "llama")
    assert 2 * cache.bytes(100, 1, width=1) == cache.bytes(100)


@given(st.integers(1, 64), st.sampled_from([1, 2, 4, 8]))
def test_cards_share_heads_and_repeat_them_where_there_are_fewer(heads: int, cards: int) -> None:
    share = Cache([Layer(2 * heads)], heads).share(cards)
    assert share == max(1 / cards, 1 / heads)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 300))
def test_a_window_never_keeps_more(tokens: int, more: int, window: int) -> None:
    layer, whole = Layer(7, window), Layer(7)
    assert layer.kept(tokens) <= whole.kept(tokens)
    assert layer.kept(tokens) <= layer.kept(tokens + more) <= 7 * window


def test_layers_that_keep_something_else_are_refused() -> None:
    config = AutoConfig.for_model("llama", **SIZES)
    config.layer_types = ["full_attention", "linear_attention"] * 2
    with pytest.raises(ModelError, match=r"keep more than keys and values \(linear_attention\)"):
        cache_of(config, "hybrid")
