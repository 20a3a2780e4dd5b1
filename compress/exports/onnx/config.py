"""The config.json that ONNX Runtime GenAI's builder reads: the families it makes rightly, in the words it knows.

What it passes over in silence or fails at inside is refused by name, as tried with 0.18: Llama's linear positions, the
bounds of yarn's ramp (transformers makes whole numbers of them), Mistral's sliding windows, layers without positions,
Gemma 3. tests/clients has each family and what is special to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ModelError

_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_ROPES: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": _LLAMA3}
_COMMON = {"rope_type", "type", "rope_theta"}
_HEAD_STEP = 16  # columns of a head, in GroupQueryAttention


@dataclass(frozen=True)
class Target:
    """How the builder knows a family.

    Args:
        architecture: its class in config.json.
        ropes: kinds of rotary positions that it computes.
        window: whether it computes sliding windows.
        exact: whether it needs weights in float32, because it adds 1 to those of norms.
        codes: whether it reads codes of the family's matrices.
    """

    architecture: str
    ropes: tuple[str, ...] = ("default", "linear")
    window: bool = True
    exact: bool = False
    codes: bool = True


TARGETS = {
    "llama": Target("LlamaForCausalLM", ("default", "llama3")),
    "mistral": Target("MistralForCausalLM", window=False),
    "qwen2": Target("Qwen2ForCausalLM"),
    "qwen3": Target("Qwen3ForCausalLM"),
    "gemma": Target("GemmaForCausalLM", ("default",), exact=True),
    "gemma2": Target("Gemma2ForCausalLM", ("default",), exact=True),
    "phi3": Target("Phi3ForCausalLM", ("default",), codes=False),
}


def target_of(config: Mapping[str, Any], folder: Path) -> Target:
    """How the builder knows a model.

    Raises:
        ModelError: it does not, or makes something else of it.
    """
    kind = str(config.get("model_type"))
    if kind not in TARGETS:
        raise ModelError(
            f"{folder}: ONNX Runtime GenAI's builder does not make {kind!r} models rightly; supported: "
            f"{', '.join(TARGETS)} (for others, use --to gguf)"
        )
    return TARGETS[kind]


def builder_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json as the builder should read it, without a quantization.

    Args:
        config: of the checkpoint.
        folder: where it lies.

    Raises:
        ModelError: what the builder would compute otherwise, by name.
    """
    from transformers import AutoConfig

    target = target_of(config, folder)
    known = AutoConfig.from_pretrained(folder)
    width = getattr(known, "head_dim", None) or known.hidden_size // known.num_attention_heads
    if width % _HEAD_STEP:
        raise ModelError(
            f"{folder}: head_dim {width}: ONNX Runtime's attention takes multiples of {_HEAD_STEP}; use --to gguf"
        )
    original = getattr(known, "original_max_position_embeddings", None)
    if original not in (None, known.max_position_embeddings) and known.model_type == "phi3":
        raise ModelError(
            f"{folder}: original_max_position_embeddings {original}: ONNX Runtime GenAI's builder makes phi3 models "
            "without longer positions only; use --to gguf"
        )
    window = getattr(known, "sliding_window", None)
    if not target.window and window is not None and window < known.max_position_embeddings:
        raise ModelError(
            f"{folder}: sliding_window {window}: ONNX Runtime GenAI's builder makes {known.model_type} models without "
            "one only; use --to gguf"
        )
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "rope_scaling")}
    kept |= {"architectures": [target.architecture], "rope_parameters": _rope(known.rope_parameters, target, folder)}
    if target.exact:
        kept["dtype"] = "float32"
    return kept


def _rope(given: Mapping[str, Any], target: Target, folder: Path) -> dict[str, Any]:
    """Rotary positions, by one name whatever the checkpoint calls them."""
    rope = dict(given)
    kind = str(rope.get("rope_type", "default"))
    if kind not in target.ropes:
        raise ModelError(
            f"{folder}: rope_type {kind}: ONNX Runtime GenAI's builder computes {', '.join(target.ropes)} of a "
            f"{target.architecture}; use --to gguf"
        )
    if rope.get("partial_rotary_factor") in (None, 1.0):
        rope.pop("partial_rotary_factor", None)
    if unknown := sorted(set(rope) - _COMMON - _ROPES[kind]):
        raise ModelError(
            f"{folder}: rope_parameters: ONNX Runtime GenAI's builder passes over {', '.join(unknown)}; use --to gguf"
        )
    return rope
