"""What a config.json says about the computation, as keys of a GGUF header.

Each field that a family's config has is written, known to change nothing, or refused by its name where llama.cpp would
compute something else: what is dropped without a word gives a wrong model. What llama.cpp takes for granted of a family
(windows of Gemma, layers of SmolLM3 without positions) must be as it takes it.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what is made of them: llama.cpp, src/models/*.cpp
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.exports.gguf.rope import rope_keys
from compress.model.gguf.config import FAMILIES, Family

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Target:
    """How llama.cpp knows a family.

    Args:
        architecture: in llama.cpp's spelling.
        activation: of the MLP, which it takes for granted.
        biases: linears to which it adds one.
        own_head: whether it reads a head that is not the embeddings.
        square: whether heads together must be as wide as the hidden states.
        window: how many layers apart those are that attend to all, where the others have a sliding window.
    """

    architecture: str
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    own_head: bool = True
    square: bool = False
    window: int | None = None

    @property
    def family(self) -> Family:
        """How its tensors are written."""
        return FAMILIES[self.architecture]


_LLAMA = Target("llama", biases=(*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj"))
_GEMMA = Target("gemma", "gelu_pytorch_tanh", own_head=False)
TARGETS = {
    "llama": _LLAMA,
    "mistral": Target("llama"),
    "qwen2": Target("qwen2", biases=_QKV, square=True),
    "qwen3": Target("qwen3"),
    "gemma": _GEMMA,
    "gemma2": Target("gemma2", "gelu_pytorch_tanh", own_head=False, window=2),
    "gemma3_text": Target("gemma3", "gelu_pytorch_tanh", own_head=False, window=6),
    "phi3": Target("phi3", square=True),
    "smollm3": Target("smollm3"),
}
_ROPELESS = 4  # every so many layers, SmolLM3 has no positions

_WRITTEN = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
    *("original_max_position_embeddings", "sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *("final_logit_softcapping", "bos_token_id", "eos_token_id", "pad_token_id"),
    # the tensors say it
    *("attention_bias", "mlp_bias"),
    # checked against what llama.cpp takes for granted
    *("hidden_act", "hidden_activation", "layer_types", "no_rope_layers", "use_bidirectional_attention"),
}
_HARMLESS = {
    *("initializer_range", "use_cache", "pretraining_tp", "max_window_layers", "use_sliding_window"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "no_rope_layer_interval"),
}


@dataclass(frozen=True)
class Header:
    """What of a header follows from the config.

    Args:
        target: the family.
        config: of transformers, with its defaults.
        keys: without the architecture in front.
        factors: of the rotary frequencies, as tensors of the file: float32 [D/2].
        remarks: what its user should hear, a line each.
    """

    target: Target
    config: Any
    keys: dict[str, Any]
    factors: dict[str, list[float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return int(self.keys["attention.key_length"])


def header_of(folder: Path, kind: str) -> Header:
    """The header of a checkpoint.

    Args:
        folder: with config.json.
        kind: its model type.

    Raises:
        ModelError: what llama.cpp has no way to compute, by name.
    """
    from transformers import AutoConfig

    if kind not in TARGETS:
        raise ModelError(
            f"{folder}: model_type {kind!r} can't be written as GGUF here; supported: {', '.join(TARGETS)}"
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, TypeError, OSError, ArithmeticError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"{folder / 'config.json'}: {reason}; download the model again") from error
    refusals = _Refusals(folder, config)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    target = TARGETS[kind]
    if target.square and heads * head_dim != hidden:
        target = _as_llama(kind, target, refusals, heads * head_dim)
    refusals.check_fields()
    refusals.check_computation(target)
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": hidden,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    window, remarks = _window(refusals, target)
    found, factors = rope_keys(config, target.architecture, head_dim, refusals.refuse)
    return Header(target, config, keys | window | _gemma(refusals, target, head_dim) | found, factors, remarks)


def _as_llama(kind: str, target: Target, refusals: "_Refusals", width: int) -> Target:
    """Qwen2 whose heads were cut: llama.cpp's Llama computes the same, and asks for no width."""
    if kind == "qwen2":
        return _LLAMA
    raise refusals.refuse(
        "num_attention_heads", f"llama.cpp's {target.architecture} has heads as wide as the hidden states, not {width}"
    )


def _window(refusals: "_Refusals", target: Target) -> tuple[dict[str, Any], list[str]]:
    """The sliding window, and where llama.cpp has none, from where on it computes something else."""
    config = refusals.config
    window = getattr(config, "sliding_window", None)
    if target.window is not None:
        if window is None:
            raise refusals.refuse("sliding_window", "llama.cpp has a window in this family; set it")
        return {"attention.sliding_window": window}, []
    if window is None or "layer_types" in config.to_dict() or window >= config.max_position_embeddings:
        return {}, []  # where layers have types, none slides: that was checked
    return {"attention.sliding_window": window}, [
        f"sliding_window {window}: llama.cpp's {target.architecture} attends to all tokens before; "
        f"up to {window} tokens it computes what the model does, use it with at most so many"
    ]


def _gemma(refusals: "_Refusals", target: Target, head_dim: int) -> dict[str, Any]:
    """Soft caps of Gemma 2; what is not written is checked."""
    config = refusals.config
    if target.family.large is None:
        return {}
    wide = config.num_hidden_layers == target.family.large
    scalar = config.hidden_size // config.num_attention_heads if wide else head_dim
    refusals.expect("query_pre_attn_scalar", scalar)
    if target.architecture == "gemma3":
        refusals.expect("attn_logit_softcapping", None)
        refusals.expect("final_logit_softcapping", None)
        return {}
    names = ("attn_logit_softcapping", "final_logit_softcapping")
    for name in names:
        if not getattr(config, name):
            raise refusals.refuse(name, "llama.cpp always has a cap in this family; set it")
    return {name: float(getattr(config, name)) for name in names}


class _Refusals:
    """A config whose fields are gone through."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.file, self.config = folder / "config.json", config

    def refuse(self, name: str, why: str) -> ModelError:
        """An error about a field."""
        value = getattr(self.config, name, None)
        return ModelError(f"{self.file}: {name} {str(value)[:60]} can't be written as GGUF: {why}")

    def expect(self, name: str, allowed: Any) -> None:
        """Refuse a field with another value."""
        if getattr(self.config, name) != allowed:
            raise self.refuse(name, f"llama.cpp takes {allowed} for granted in {self.config.model_type}")

    def check_fields(self) -> None:
        """Refuse fields of the family that are not known here and have another value than usual."""
        from transformers import PreTrainedConfig

        usual = type(self.config)().to_dict()
        for name in usual.keys() - PreTrainedConfig().to_dict().keys() - _WRITTEN - _HARMLESS:
            if getattr(self.config, name, None) != usual[name]:
                raise self.refuse(name, "it may change the computation, and is not understood here")

    def check_computation(self, target: Target) -> None:
        """Refuse what llama.cpp takes otherwise for granted."""
        config, layers = self.config, range(self.config.num_hidden_layers)
        self.expect("hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act", target.activation)
        if getattr(config, "use_bidirectional_attention", None):
            raise self.refuse("use_bidirectional_attention", "llama.cpp attends to tokens before alone")
        if types := getattr(config, "layer_types", None):
            step = target.window
            sliding = [step is not None and (layer + 1) % step != 0 for layer in layers]
            if list(types) != ["sliding_attention" if each else "full_attention" for each in sliding]:
                rule = f"every layer but each {step}th" if step else "no layer"
                raise self.refuse("layer_types", f"in llama.cpp's {target.architecture} {rule} has a sliding window")
        rotated = getattr(config, "no_rope_layers", None)
        if rotated and [bool(each) for each in rotated] != [(layer + 1) % _ROPELESS != 0 for layer in layers]:
            raise self.refuse("no_rope_layers", f"in llama.cpp each {_ROPELESS}th layer has no rotary positions")
