"""What a forward pass needs beside weights and cache. Never imports torch.

Prompts go in by chunks of `CHUNK` tokens, as in vLLM with --max-num-batched-tokens 2048. Of a chunk are alive at once:
the residual stream and its normed copy, and the widest part of a layer: query, key, value and what attention puts out,
or the two projections of an MLP and their product. No attention scores: fused kernels keep none. The logits come last,
of one token of each sequence, in 16 bits and again in float32 for sampling.
"""

from typing import Any

from compress.footprint.cache import head_width

CHUNK = 2048
SERVED, FORWARD = 2 + 4, 2  # bytes of a logit: where tokens are sampled, and as a forward pass leaves it


def activation_bytes(config: Any, tokens: int, rows: int, logit: int = SERVED) -> int:
    """Bytes that a forward pass in 16 bits takes at most.

    Args:
        config: of the text model, with its family's defaults.
        tokens: that go through it at once.
        rows: of them whose logits are asked for.
        logit: bytes of each logit.
    """
    hidden = int(config.hidden_size)
    streams = 2 * hidden
    layer = 2 * tokens * (streams + max(_attention(config), 3 * _mlp(config)))
    head = 2 * tokens * streams + rows * int(config.vocab_size) * logit
    return max(layer, head)


def _attention(config: Any) -> int:
    """Numbers of a token in an attention: queries, keys, values, output."""
    heads = int(config.num_attention_heads)
    if getattr(config, "kv_lora_rank", None) is not None:
        key = int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
        return 2 * heads * (key + int(config.v_head_dim))
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * (heads + keys) * head_width(config)


def _mlp(config: Any) -> int:
    """Width of the widest MLP: of a mixture, all experts that a token is sent through."""
    dense = int(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    each = int(getattr(config, "moe_intermediate_size", None) or dense)
    used = int(getattr(config, "num_experts_per_tok", None) or 0)
    shared = int(getattr(config, "n_shared_experts", None) or 0)
    return max(dense, (used + shared) * each)
