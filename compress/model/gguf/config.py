"""What a GGUF header says about the computation, as a transformers config. Never imports torch.

Each key of the architecture is applied, known to change nothing, or refused by its name: one that is passed over gives
a wrong number without a word. What a file leaves open (the query scale of Gemma, defaults) is as llama.cpp has it.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.model.gguf.header import Gguf
from compress.model.gguf.keys import REMEDY, Keys
from compress.model.gguf.rope import rope_parameters


@dataclass(frozen=True)
class Family:
    """How llama.cpp's converter writes a family.

    Args:
        model_type: of transformers.
        interleaved: q and k have their rows in the order of interleaved rotary pairs.
        norms_plus_one: norms are stored with the 1 that transformers adds.
        large: number of layers of the model whose query scale is of the width of a head, not of head_dim.
    """

    model_type: str
    interleaved: bool = False
    norms_plus_one: bool = False
    large: int | None = None


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "phi3": Family("phi3"),
    "smollm3": Family("smollm3", interleaved=True),
    "gemma": Family("gemma", norms_plus_one=True),
    "gemma2": Family("gemma2", norms_plus_one=True, large=46),
    "gemma3": Family("gemma3_text", norms_plus_one=True, large=62),
}


def family_of(gguf: Gguf) -> Family:
    """The family's row.

    Raises:
        ModelError: no language model, or of another architecture.
    """
    kind = gguf.keys.get("general.type", "model")
    if kind != "model":
        raise gguf.error(f"general.type is {kind!r}; only whole language models (model) are read")
    family = FAMILIES.get(gguf.architecture)
    if family is None:
        raise gguf.error(
            f"architecture {gguf.architecture!r} is not supported as GGUF, only {', '.join(FAMILIES)} are; {REMEDY}"
        )
    return family


def model_config(gguf: Gguf, warn: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """The transformers config of a GGUF file, without the tokenizer's ids.

    Args:
        gguf: the file.
        warn: told what in the header changes nothing, though its author may have meant it to.

    Raises:
        ModelError: naming the key that is missing, or is not supported.
    """
    family, keys = family_of(gguf), Keys(gguf)
    if keys.number("expert_count", 0):
        raise gguf.error(f"is a mixture of {keys.number('expert_count'):g} experts; only dense models are supported")
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    rows = _check_size(gguf, keys, hidden)
    head_dim, context = keys.whole("attention.key_length", hidden // heads), keys.whole("context_length")
    keys.expect("attention.value_length", head_dim)
    keys.expect("embedding_length_out", hidden)
    keys.expect("attention.causal", True)
    if family.large is None:
        keys.expect("attention.scale", head_dim**-0.5)
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_hidden_layers": keys.whole("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.positive("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
    }
    config |= _gemma(family, keys, config) if family.large else _window(keys, config)
    config |= _biases(gguf, config)
    config |= rope_parameters(gguf, keys, config)
    keys.finish()
    for remark in keys.remarks:
        warn(f"{gguf.parts[0].name}: {remark}")
    return config


def _check_size(gguf: Gguf, keys: Keys, hidden: int) -> int:
    """Rows of the embeddings; refuses a header that says other sizes than the tensors have."""
    embeddings, layers = gguf.tensors.get("token_embd.weight"), keys.whole("block_count")
    if embeddings is None:
        raise gguf.error("has no tensor token_embd.weight; download it again")
    if len(embeddings.shape) != 2 or embeddings.shape[1] != hidden:
        raise gguf.error(
            f"token_embd.weight has shape {list(embeddings.shape)}, {gguf.architecture}.embedding_length is {hidden}; "
            "download it again"
        )
    found = {name.split(".")[1] for name in gguf.tensors if name.startswith("blk.")}
    if len(found) != layers:
        raise gguf.error(f"has {len(found)} layers, {gguf.architecture}.block_count is {layers}; download it again")
    return embeddings.shape[0]


def _gemma(family: Family, keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """Query scale, soft caps and sliding windows of Gemma 2 and 3."""
    wide = config["num_hidden_layers"] == family.large
    scalar = config["hidden_size"] // config["num_attention_heads"] if wide else config["head_dim"]
    keys.expect("attention.scale", scalar**-0.5)
    special: dict[str, Any] = {"query_pre_attn_scalar": scalar}
    if family.model_type == "gemma2":
        special["attn_logit_softcapping"] = keys.positive("attn_logit_softcapping", 50.0)
        special["final_logit_softcapping"] = keys.positive("final_logit_softcapping", 30.0)
        special["sliding_window"] = keys.whole("attention.sliding_window", 4096)
        keys.expect("attention.sliding_window_pattern", 2)
    else:
        special["sliding_window"] = keys.whole("attention.sliding_window")
        keys.expect("attention.sliding_window_pattern", 6)
    return special


def _window(keys: Keys, config: dict[str, Any]) -> dict[str, Any]:
    """One sliding window for all layers, where the family has such a thing."""
    window = keys.number("attention.sliding_window", 0)
    if not 0 < window < config["max_position_embeddings"]:
        return {}
    if config["model_type"] == "phi3":
        return {"sliding_window": window}
    if config["model_type"] == "llama":
        return {"model_type": "mistral", "sliding_window": window}
    raise keys.gguf.error(
        f"{keys.gguf.architecture}.attention.sliding_window is {window}, and which layers have it is not said; {REMEDY}"
    )


def _biases(gguf: Gguf, config: dict[str, Any]) -> dict[str, Any]:
    """Which linears have biases, by the first layer's tensors; that the others agree is seen when they are read."""
    in_attention = {part for part in ("q", "k", "v", "output") if f"blk.0.attn_{part}.bias" in gguf.tensors}
    in_mlp = any(f"blk.0.ffn_{part}.bias" in gguf.tensors for part in ("gate", "up", "down"))
    kind = config["model_type"]
    if kind == "qwen2" or not (in_attention or in_mlp):
        return {}
    if kind == "llama" and in_attention == {"q", "k", "v"} and not in_mlp:
        return {"model_type": "qwen2"}  # the same computation, with biases exactly there
    if kind == "llama":
        return {"attention_bias": bool(in_attention), "mlp_bias": in_mlp}
    return {"attention_bias": True} if kind in ("qwen3", "gemma", "gemma2", "gemma3_text") else {}
