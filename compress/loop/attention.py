"""How much each token is attended to, which says what an error in its keys and values costs.

A value projection's error reaches the output through the attention probabilities: o_i = sum_j a_ij v_j, so the squared
error at token j counts with sum_i a_ij^2 and not with 1. Most tokens get little attention and a few (the first above
all) get most of it; the plain Hessian of v_proj treats them alike. RSQ (arXiv 2503.01820) weighs the tokens of every
Hessian by attention; here it is those of the linears that attention mixes, per key-value head.

The probabilities are seen through transformers' public attention interface, so no family's forward code is repeated.
Long sequences are sampled: a fixed number of queries, evenly spread, which bounds the cost at any length.

Dimensions: B batch, H heads, K key-value heads, S sequence, Q sampled queries.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from compress.loop.activations import Activations
from compress.loop.stream import LayerStream
from compress.system.distributed import all_reduce, total

_NAME = "dscompress_received_attention"
_QUERIES = 128  # sampled in a sequence
_BYTES_AT_ONCE = 1 << 28


class _Seen(Exception):
    """Carries the statistics out of a forward pass that need not go on."""

    def __init__(self, received: Tensor) -> None:
        super().__init__()
        self.received = received


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The interface's form; computes sum_i a_ij^2 of each key-value head, [K, B, S], and ends the forward pass."""
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    rows = torch.arange(0, length, max(1, length // _QUERIES), device=query.device)
    scale = width**-0.5 if scaling is None else scaling
    hidden = torch.arange(length, device=query.device)[None] > rows[:, None] if attention_mask is None else None
    received = torch.empty(kv_heads, batch, length, device=query.device)
    at_once = max(1, _BYTES_AT_ONCE // (heads * rows.numel() * length * 2))
    for start in range(0, batch, at_once):
        part = slice(start, start + at_once)
        queries = (query[part][:, :, rows] * scale).view(-1, kv_heads, heads // kv_heads * rows.numel(), width)
        scores = (queries @ key[part].transpose(2, 3)).view(-1, heads, rows.numel(), length)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        else:
            assert attention_mask is not None
            mask = attention_mask.expand(batch, -1, -1, -1)[part, :, rows, :length]
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        norms = torch.linalg.vector_norm(scores.softmax(-1), dim=2, dtype=torch.float32)  # [B, H, S]
        squares = norms.square()
        received[:, part] = squares.view(-1, kv_heads, heads // kv_heads, length).sum(2).transpose(0, 1)
    raise _Seen(received)


AttentionInterface.register(_NAME, _attention)


def received_attention(stream: LayerStream, index: int, activations: Activations) -> list[Tensor] | None:
    """Weights of the tokens in the Hessian of a filled layer's value and key projections.

    Returns:
        A tensor [B, S] for each batch, positive, with mean 1 over all tokens (of all processes); each key-value head
        counts the same. None for a layer whose attention does not go through transformers' attention interface.
    """
    config = stream.model.config
    usual = config._attn_implementation
    config._attn_implementation = _NAME
    seen: list[Tensor] = []
    try:
        for hidden in activations:
            try:
                stream.layers[index](hidden, **activations.of_layer(index, hidden))
            except _Seen as found:
                seen.append(found.received)
            else:
                return None
    finally:
        config._attn_implementation = usual
    tokens = total(sum(part[0].numel() for part in seen))
    means = all_reduce(torch.stack([part.sum((1, 2)) for part in seen]).sum(0)) / tokens  # of each key-value head
    return [(part / means[:, None, None]).mean(0) for part in seen]
