"""Rotary positions of a GGUF file as transformers' rope_parameters. Never imports torch.

llama.cpp keeps the scaling of Llama 3.1 as one factor for each frequency, in a tensor; transformers wants the four
numbers these were made of. They are looked for, and taken only if they give the same factors again.
"""

import math
from typing import Any

from compress.model.gguf.header import Gguf, read_floats
from compress.model.gguf.keys import REMEDY, Keys

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}  # all models of that kind so far


def rope_parameters(gguf: Gguf, keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of the config, and what goes with it.

    Args:
        gguf: the file.
        keys: of its header.
        config: what was read before.

    Raises:
        ModelError: a scaling that is not supported.
    """
    kind, head_dim, base = config["model_type"], config["head_dim"], keys.positive("rope.freq_base", 10000.0)
    rotary = keys.whole("rope.dimension_count", head_dim)
    if rotary != head_dim and (kind != "phi3" or int(head_dim * (rotary / head_dim)) != rotary):
        raise gguf.error(
            f"{gguf.architecture}.rope.dimension_count is {rotary} of {head_dim}: rotary positions on a part of each "
            f"head are not supported for {gguf.architecture}; {REMEDY}"
        )
    scaling, extra = _scaling(gguf, keys, config, base, rotary)
    if kind == "phi3":
        if scaling["rope_type"] not in ("default", "longrope"):
            raise gguf.error(f"phi3.rope.scaling.type {scaling['rope_type']!r} is not supported; {REMEDY}")
        scaling["partial_rotary_factor"] = rotary / head_dim
    scaling["rope_theta"] = base
    if kind == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": keys.positive("rope.freq_base_swa", 10000.0)}
        return {"rope_parameters": {"full_attention": scaling, "sliding_attention": local}}
    if kind == "gemma2":
        keys.expect("rope.freq_base_swa", base)
    return {"rope_parameters": scaling, **extra}


def _scaling(
    gguf: Gguf, keys: Keys, config: dict[str, Any], base: float, rotary: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scaling, and keys of the config beside it."""
    kind = keys.get("rope.scaling.type", "linear")
    old, new = keys.number("rope.scale_linear", 0), keys.number("rope.scaling.factor", 0)
    factor = 1.0 if old == new == 0 else keys.positive("rope.scaling.factor" if new else "rope.scale_linear")
    original = keys.whole("rope.scaling.original_context_length", config["max_position_embeddings"])
    tensors = [name for name in (FREQS, LONG, SHORT) if name in gguf.tensors]
    if kind == "none":
        factor = 1.0
    if tensors and (factor != 1 or kind == "yarn"):
        raise gguf.error(
            f"{tensors[0]} beside {gguf.architecture}.rope.scaling.type {kind!r} is not supported; {REMEDY}"
        )
    if tensors == [LONG, SHORT]:
        return _longrope(gguf, keys, config, original, rotary)
    if kind == "yarn" and factor != 1:
        return {**_yarn(keys, factor), "original_max_position_embeddings": original}, {}
    keys.expect("rope.scaling.attn_factor", 1.0)
    if tensors == [FREQS] and gguf.architecture == "llama":
        return _from_factors(gguf, _factors(gguf, FREQS, rotary), base, rotary), {}
    if tensors:
        raise gguf.error(f"{', '.join(tensors)}: not supported for {gguf.architecture}; {REMEDY}")
    if factor == 1 and kind in ("none", "linear", "yarn"):
        return {"rope_type": "default"}, {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}, {}
    raise gguf.error(f"{gguf.architecture}.rope.scaling.type {kind!r} is not supported; {REMEDY}")


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    keys.expect("rope.scaling.yarn_ext_factor", 1.0)
    keys.expect("rope.scaling.yarn_log_multiplier", 0.0)
    for name, usual in (("yarn_beta_fast", 32.0), ("yarn_beta_slow", 1.0), ("yarn_attn_factor", 1.0)):
        keys.unused(f"rope.scaling.{name}", usual)
    scaling = {"rope_type": "yarn", "factor": factor, "beta_fast": 32.0, "beta_slow": 1.0}
    # llama.cpp multiplies by this and by the usual factor; transformers' attention_factor takes the place of both
    more = keys.positive("rope.scaling.attn_factor", 1.0)
    return scaling if more == 1 else {**scaling, "attention_factor": more * (0.1 * math.log(factor) + 1)}


def _longrope(
    gguf: Gguf, keys: Keys, config: dict[str, Any], original: int, rotary: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    scaling = {
        "rope_type": "longrope",
        "long_factor": _factors(gguf, LONG, rotary),
        "short_factor": _factors(gguf, SHORT, rotary),
        "original_max_position_embeddings": original,
    }
    stretch = config["max_position_embeddings"] / max(original, 2)
    usual = math.sqrt(1 + math.log(stretch) / math.log(max(original, 2))) if stretch > 1 else 1.0
    attention_factor = keys.positive("rope.scaling.attn_factor")
    if abs(attention_factor - usual) > 1e-5:
        scaling["attention_factor"] = attention_factor
    return scaling, {"original_max_position_embeddings": original} if config["model_type"] == "phi3" else {}


def _factors(gguf: Gguf, name: str, rotary: int) -> list[float]:
    values = read_floats(gguf.tensors[name])
    if values is None or len(values) != rotary // 2:
        raise gguf.error(f"{name} does not hold {rotary // 2} float32 numbers, one for each frequency; {REMEDY}")
    return values


def _from_factors(gguf: Gguf, factors: list[float], base: float, rotary: int) -> dict[str, Any]:
    """The scaling that divides the frequencies by these factors."""
    if all(factor == 1 for factor in factors):
        return {"rope_type": "default"}
    for factor in (max(factors), 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
        for original in (8192, *(1 << power for power in range(5, 22))):
            candidate = {**_LLAMA3, "factor": factor, "original_max_position_embeddings": original}
            made = [llama3_factor(candidate, base ** (2 * i / rotary)) for i in range(rotary // 2)]
            if all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(made, factors, strict=True)):
                return candidate
    raise gguf.error(
        f"{FREQS} holds frequency factors ({min(factors):g} to {max(factors):g}) that no scaling of Llama 3's kind "
        f"gives; {REMEDY}"
    )


def llama3_factor(scaling: dict[str, Any], period: float) -> float:
    """What the frequency is divided by whose wave is 2 pi `period` tokens long."""
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    waves = scaling["original_max_position_embeddings"] / (2 * math.pi * period)
    share = min(max((waves - low) / (high - low), 0.0), 1.0)
    return float(1 / ((1 - share) / factor + share))
