"""The config.json that optimum-intel reads to trace a model: the families that come out rightly.

It traces what transformers computes for a few tokens, so positions that depend on the length of a sequence are fixed
there without a word, and it leaves out the bounds of Gemma 2's attention scores; these are refused by name, as tried
with 2.2. tests/clients has each family and what is special to it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ModelError

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "smollm3", "olmo2", "gpt_neox", "opt",
)  # fmt: skip
ROPES = ("default", "linear", "llama3", "yarn")


def traced_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """config.json as optimum-intel should read it, without a quantization.

    Args:
        config: of the checkpoint.
        folder: where it lies.

    Raises:
        ModelError: what would be traced as something else, by name.
    """
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"{folder}: optimum-intel does not make {kind!r} models rightly, or was not tried; supported: "
            f"{', '.join(FAMILIES)} (for others, use --to gguf or onnx)"
        )
    known = AutoConfig.from_pretrained(folder)
    for rope in _ropes(getattr(known, "rope_parameters", None) or {}):
        if rope not in ROPES:
            raise ModelError(
                f"{folder}: rope_type {rope}: optimum-intel fixes such positions at one length; supported: "
                f"{', '.join(ROPES)}"
            )
    return {key: value for key, value in config.items() if key not in ("quantization_config", "torch_dtype")}


def _ropes(parameters: Mapping[str, Any]) -> list[str]:
    """Kinds of rotary positions; some families have one for each kind of layer."""
    each = [part for part in parameters.values() if isinstance(part, Mapping)] or [parameters]
    return [str(part.get("rope_type", "default")) for part in each]
