"""Attention inside the documents of packed sequences, without a mask.

transformers masks packed documents by a boolean [B, 1, S, S], which is read in full and lets no kernel skip anything.
Here documents are what is attended in: FlashAttention over sequences of different lengths on CUDA (Dao 2023, arXiv
2307.08691, as torch carries it), one document after the other elsewhere. A family for which that gives other states
than its usual attention keeps the usual one.

Shapes: B sequences, S tokens of each, T = B S, H heads, K key-value heads, W their width, N documents.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

_NAME = "dscompress_packed"
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}  # of the largest state


def boundaries(positions: Tensor) -> Tensor:
    """Where documents start in the flattened tokens, and where the last one ends: int32 [N + 1].

    Args:
        positions: int64 [B, S], places inside documents; no document reaches over the end of a sequence.
    """
    first = positions == 0
    first[:, 0] = True
    starts = first.flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)


def takes_documents(model: Any) -> bool:
    """Whether a model's attention is the one of this module, which is told of documents."""
    return bool(model.config._attn_implementation == _NAME)


def of_documents(documents: Tensor, length: int) -> dict[str, Any]:
    """What such a model's forward pass is given beside its tokens, by transformers' names."""
    torch._dynamo.maybe_mark_dynamic(documents, 0)  # compiled once for any number of them
    return {
        "cu_seq_lens_q": documents, "cu_seq_lens_k": documents, "max_length_q": length, "max_length_k": length,
    }  # fmt: skip


def attend_in_documents(model: Any, states: Callable[[], Tensor], usual: Tensor) -> None:
    """Give a model the attention of this module, if its states stay what they are.

    Args:
        model: with its weights, on its device.
        states: computes those of a trial.
        usual: the same by its usual attention.
    """
    if not _can(model.config, usual):
        return
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        apart = float((states().float() - usual.float()).abs().max())
        same = apart <= _TOLERANCE[usual.dtype] * float(usual.float().abs().max())
    except (TypeError, RuntimeError, NotImplementedError):  # it takes no such arguments, or has no such kernel
        same = False
    if not same:
        model.config._attn_implementation = before


def _can(config: Any, states: Tensor) -> bool:
    """Whether a trial is worth making: a short one would not show a window or a cap on large scores."""
    layers = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None) if not layers else None
    if window is not None or any(kind != "full_attention" for kind in layers):
        return False
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    return states.dtype in _TOLERANCE and (states.device.type == "cpu" or states.dtype != torch.float32)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor, longest: int, scale: float
) -> Tensor:
    """Causal attention inside documents.

    Args:
        query: [T, H, W].
        key: [T, K, W]; K divides H.
        value: likewise.
        documents: int32, from `boundaries`.
        longest: no document has more tokens.
        scale: of the scores.

    Returns:
        [T, H, W].
    """
    if query.device.type == "cuda":
        found = torch.ops.aten._flash_attention_forward(
            query, key, value, documents, documents, longest, longest, 0.0, True, False, scale=scale
        )
        out: Tensor = found[0]
        return out
    made: Tensor = _by_document(query, key, value, documents, scale)[0]
    return made


# Below, two operations to the compiler, whatever the number of documents.


@torch.library.custom_op("dscompress::attention_by_document", mutates_args=())
def _by_document(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, sums = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
    for part in _parts(documents):
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *_heads_first(query[part], key[part], value[part]), is_causal=True, scale=scale
        )
        out[part], sums[part] = made[0][0].transpose(0, 1), made[1][0].T
    return out, sums


@torch.library.custom_op("dscompress::attention_by_document_backward", mutates_args=())
def _by_document_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, documents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found = [torch.empty_like(each) for each in (query, key, value)]
    for part in _parts(documents):
        inputs = _heads_first(query[part], key[part], value[part])
        by_out, made = (each[part].transpose(0, 1)[None].contiguous() for each in (gradient, out))
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            by_out, *inputs, made, sums[part].T[None].contiguous(), 0.0, True, scale=scale
        )
        for whole, one in zip(found, gradients, strict=True):
            heads = one[0].unflatten(0, (whole.shape[1], -1)).float().sum(1)  # of queries that share a key
            whole[part] = heads.to(whole.dtype).transpose(0, 1)
    return found[0], found[1], found[2]


def _parts(documents: Tensor) -> list[slice]:
    starts: list[int] = documents.tolist()
    return list(map(slice, starts, starts[1:]))


def _heads_first(query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """[n, H, W] and [n, K, W] as three [1, H, n, W]."""
    shared = query.shape[1] // key.shape[1]
    both = (each.repeat_interleave(shared, 1) for each in (key, value))
    return [each.transpose(0, 1)[None] for each in (query, *both)]


@_by_document.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)


@_by_document_backward.register_fake
def _(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor, documents: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, documents, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, documents)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Any, ...]:
    return (*_by_document_backward(gradient, *ctx.saved_tensors, ctx.scale), None, None)


_by_document.register_autograd(_backward, setup_context=_keep)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The interface's form: query [B, H, S, W], key and value [B, K, S, W]; returns [B, S, H, W]."""
    batch, _heads, length, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    if cu_seq_lens_q is None or max_length_q is None:  # nothing is packed
        out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.transpose(1, 2), None
    rows = [each.transpose(1, 2).flatten(0, 1).contiguous() for each in (query, key, value)]
    out = packed_attention(rows[0], rows[1], rows[2], cu_seq_lens_q, max_length_q, scale)
    return out.unflatten(0, (batch, length)), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, lambda **_: None)
