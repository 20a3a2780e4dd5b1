"""The attention that tokens receive, against the probabilities that stock models give with eager attention."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen3Config

from compress.loop import attention
from compress.loop.attention import received_attention
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,  # wide, so that attention is far from uniform
}
CONFIGS = [
    LlamaConfig(**SMALL),
    MistralConfig(**SMALL, sliding_window=8),
    Qwen3Config(**SMALL),
    Gemma2Config(**SMALL, sliding_window=8, query_pre_attn_scalar=8, attn_logit_softcapping=5.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
@torch.no_grad()
def test_received_attention_is_that_of_eager_attention(config: PreTrainedConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    stock.save_pretrained(tmp_path)
    tokens = torch.randint(0, 64, (5, 24))
    probabilities = stock(tokens, output_attentions=True).attentions
    stream = LayerStream(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    usual = stream.model.config._attn_implementation
    activations = stream.start(tokens, batch=2)  # the last batch is smaller
    for index in range(2):
        stream.fill_layer(index, stream.load_layer(index))
        received = received_attention(stream, index, activations)
        assert received is not None
        by_head = probabilities[index].square().sum(2).view(5, 2, 2, 24).sum(2)  # [B, K, S]
        expected = (by_head / by_head.mean((0, 2), keepdim=True)).mean(1)
        torch.testing.assert_close(torch.cat(received), expected, rtol=1e-4, atol=1e-5)
        assert torch.cat(received).mean() == pytest.approx(1, rel=1e-5)
        stream.run_layer(index, activations)
    assert stream.model.config._attn_implementation == usual
    stream.close()


@torch.no_grad()
def test_a_quarter_of_the_queries_gives_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[0]).save_pretrained(tmp_path)
    stream = LayerStream(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    activations = stream.start(torch.randint(0, 64, (8, 64)))
    stream.fill_layer(0, stream.load_layer(0))
    whole = received_attention(stream, 0, activations)
    monkeypatch.setattr(attention, "_QUERIES", 16)
    sampled = received_attention(stream, 0, activations)
    assert whole is not None and sampled is not None
    pair = torch.stack([torch.cat(whole).mean(0), torch.cat(sampled).mean(0)])
    assert torch.corrcoef(pair)[0, 1] > 0.9
    stream.close()


def test_float16_holds_what_the_models_own_attention_holds() -> None:
    """Products that only their scale brings within range."""
    generator = torch.Generator().manual_seed(0)
    query = (60 + 0.1 * torch.randn(1, 2, 64, 64, generator=generator)).half()
    key = (30 + 0.1 * torch.randn(1, 2, 64, 64, generator=generator)).half()
    assert query.float().matmul(key.float().mT).max() > torch.finfo(torch.float16).max
    with pytest.raises(attention._Seen) as seen:
        attention._attention(torch.nn.Identity(), query, key, key, None)
    assert seen.value.received.isfinite().all()


def test_one_mask_for_all_sequences_counts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(2, 3, 4, 16, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, 1, 16, 16).tril().log()
    monkeypatch.setattr(attention, "_BYTES_AT_ONCE", 1)  # a sequence at a time
    found = []
    for each in (mask, None):
        with pytest.raises(attention._Seen) as seen:
            attention._attention(torch.nn.Identity(), query, key, key, each)
        found.append(seen.value.received)
    torch.testing.assert_close(found[0], found[1])
