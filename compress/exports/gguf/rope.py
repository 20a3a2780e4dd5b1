"""Rotary positions of a transformers config as GGUF keys, and as tensors where llama.cpp wants factors."""

import math
from collections.abc import Callable
from typing import Any

from compress.model.gguf.rope import FREQS, LONG, SHORT, llama3_factor

Refuse = Callable[[str, str], Exception]
Found = tuple[dict[str, Any], dict[str, list[float]]]

_KNOWN: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "long_factor", "short_factor"),
}
_EVERYWHERE = (
    *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
    "attn_factor",  # DeepSeek-R1-0528-Qwen3-8B has it, and transformers does not read it
)
_ONLY = {"llama3": "llama", "longrope": "phi3"}  # architectures that read the tensor


def rope_keys(config: Any, architecture: str, head_dim: int, refuse: Refuse) -> Found:
    """Keys without the architecture in front, and factors of the frequencies by the name of their tensor.

    Args:
        config: of transformers.
        architecture: llama.cpp's.
        head_dim: width of a head.
        refuse: makes the error about a field of the config, from its name and the reason.
    """
    rope = dict(config.rope_parameters)
    extra: dict[str, Any] = {}
    if architecture == "gemma3":
        local = rope["sliding_attention"]
        rope = dict(rope["full_attention"])
        if local.get("rope_type", "default") != "default":
            raise refuse("rope_parameters", "llama.cpp's gemma3 has no scaling in layers with a sliding window")
        extra["rope.freq_base_swa"] = float(local["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in _KNOWN or _ONLY.get(kind, architecture) != architecture:
        known = [each for each in _KNOWN if _ONLY.get(each, architecture) == architecture]
        raise refuse("rope_parameters", f"llama.cpp's {architecture} has no rope_type {kind}, only {', '.join(known)}")
    unknown = sorted(name for name in rope.keys() - {*_EVERYWHERE, *_KNOWN[kind]} if rope[name] is not None)
    if unknown:
        raise refuse("rope_parameters", f"{', '.join(unknown)} may change the computation, and is not understood here")
    share = rope.get("partial_rotary_factor") or 1.0
    if share != 1 and architecture != "phi3":
        raise refuse("rope_parameters", f"llama.cpp's {architecture} rotates whole heads, not a part of {share:g}")
    rotary = int(head_dim * share)
    keys = {"rope.freq_base": float(rope["rope_theta"]), "rope.dimension_count": rotary, **extra}
    if kind == "default":
        return keys, {}
    original = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", config.max_position_embeddings
    )
    if kind == "linear":
        return {**keys, "rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}, {}
    if kind == "yarn":
        return keys | _yarn(rope, original, config.max_position_embeddings, refuse), {}
    if kind == "llama3":
        scaling = rope | {"original_max_position_embeddings": original}
        base = keys["rope.freq_base"]
        return keys, {FREQS: [llama3_factor(scaling, base ** (2 * i / rotary)) for i in range(rotary // 2)]}
    return _longrope(config, rope, original, keys)


def _yarn(rope: dict[str, Any], original: int, positions: int, refuse: Refuse) -> dict[str, Any]:
    """llama.cpp multiplies `attn_factor` by the usual factor, whose place transformers' takes."""
    factor = float(rope.get("factor") or positions / original)
    if rope.get("truncate") is False:
        raise refuse("rope_parameters", "llama.cpp rounds the bounds of yarn's ramp (truncate)")
    for name, usual in (("beta_fast", 32), ("beta_slow", 1)):
        if rope.get(name) not in (None, usual):
            raise refuse("rope_parameters", f"llama.cpp takes {name} {usual} for granted, whatever a file says")
    keys: dict[str, Any] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
    }
    if (attention := rope.get("attention_factor")) is not None:
        keys["rope.scaling.attn_factor"] = attention / (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
    return keys


def _longrope(config: Any, rope: dict[str, Any], original: int, keys: dict[str, Any]) -> Found:
    stretch = rope.get("factor") or config.max_position_embeddings / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    attention = rope.get("attention_factor")
    keys |= {
        "rope.scaling.attn_factor": float(usual if attention is None else attention),
        "rope.scaling.original_context_length": original,
    }
    return keys, {LONG: list(map(float, rope["long_factor"])), SHORT: list(map(float, rope["short_factor"]))}
