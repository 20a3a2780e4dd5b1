"""transformers' configs of the families that it knows itself, and the tensors that a model of one has."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.recipe.messages import did_you_mean

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXAMPLES = "llama, mistral, qwen2, qwen3, qwen3_moe, gemma2, gemma3, deepseek_v2, deepseek_v3"


def known_config(config: dict[str, Any], where: Path) -> "PretrainedConfig":
    """A config.json as transformers understands it, with the defaults of the family; no code but its own runs.

    Raises:
        ModelError: no family, one that transformers does not know, or values that it refuses.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as MODELS

    kind = config.get("model_type")
    if not kind:
        raise ModelError(f"{where}: its config has no model_type, so its architecture is not known; give a model's own")
    if kind not in MODELS or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{where}: model_type {kind!r} is no causal language model that transformers knows by itself"
            f"{did_you_mean(str(kind), MODELS)}; known are {_EXAMPLES} and {len(MODELS) - 9} more"
        )
    try:
        return CONFIG_MAPPING[str(kind)].from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{where}: transformers refuses this config ({_brief(error)}); download it again") from error


def text_config(whole: "PretrainedConfig") -> "PretrainedConfig":
    """That of the language model inside a multimodal one; of any other, itself."""
    return whole.get_text_config(decoder=True)


def built(config: dict[str, Any], where: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of such a model stores: parameters and saved buffers.

    Raises:
        ModelError: transformers can't build it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    known = known_config(config, where)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, ZeroDivisionError) as error:
        raise ModelError(
            f"{where}: transformers can't build this model ({_brief(error)}); download it again"
        ) from error
    saved = model.state_dict()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones once
    return shapes | {name: tuple(each.shape) for name, each in model.named_buffers() if name in saved}


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
