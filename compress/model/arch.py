"""Model families as rows of data: where a decoder-only language model keeps its parts.

A new dense family is one row. A family without a row works when it has the usual shape, which is looked up from the
module tree; otherwise the error says which part was not found. Which linears share an input is not in the rows: the
layer loop sees it when it runs a layer once on the meta device, and what it sees can't be out of date.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Arch:
    """Module paths of a causal language model, from its top module.

    Args:
        layers: the list of decoder layers.
        embeddings: the token embedding.
        norm: the norm behind the last layer.
        head: the projection to the vocabulary.
        tied: what a config.json means that says nothing of tie_word_embeddings.
    """

    layers: str
    embeddings: str
    norm: str
    head: str = "lm_head"
    tied: bool = False


_USUAL = Arch("model.layers", "model.embed_tokens", "model.norm")

FAMILIES: dict[str, Arch] = {
    "llama": _USUAL,
    "mistral": _USUAL,
    "qwen2": _USUAL,
    "qwen3": _USUAL,
    "gemma2": replace(_USUAL, tied=True),
    "gemma3_text": replace(_USUAL, tied=True),
    "phi3": _USUAL,
    "gpt_neox": Arch("gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
    "opt": Arch("model.decoder.layers", "model.decoder.embed_tokens", "model.decoder.final_layer_norm", tied=True),
}

# Projections whose outputs are mixed by attention: an error in them counts by the attention that its token gets.
ATTENDED = ("k_proj", "v_proj")

# Under which names configs keep the same number; transformers knows the first ones for all families.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")

# A part of a tensor's name that only the layers of a mixture of experts have. Configs of dense models may keep the keys
# of their family's mixtures, so these count only where the weights of a layer are joined to one tensor [E, O, I].
_EXPERTS = re.compile(r"(^|[._])(experts?|moe)([._]|$)")
_MOE_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def depth_of(config: Mapping[str, Any]) -> int | None:
    """Number of decoder layers, as config.json says it."""
    return _first(config, DEPTHS)


def width_of(config: Mapping[str, Any]) -> int | None:
    """Width of the hidden states, as config.json says it."""
    return _first(config, _WIDTHS)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """Tokens that a sequence may have, as config.json says it."""
    return _first(config, _POSITIONS)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((value for name in names if isinstance(value := config.get(name), int)), None)


def check_supported(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Refuse what can't be compressed, from config.json and the tensors' shapes.

    Args:
        config: config.json.
        shapes: of every tensor, by name.
        where: what errors start with.

    Raises:
        ModelError: quantized already, a mixture of experts, or no decoder-only language model.
    """
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ModelError(f"{where}: already quantized ({method}); give the original bf16, fp16 or fp32 model")
    if experts := _experts(config, shapes):
        kind = config.get("model_type")
        raise ModelError(f"{where}: {kind} is a mixture of experts ({experts}); only dense models are supported")
    if "text_config" in config:
        raise ModelError(
            f"{where}: {config.get('model_type')} is a multimodal model; give its text model alone as a folder"
        )
    if config.get("is_encoder_decoder") or not depth_of(config):
        raise ModelError(
            f"{where}: model_type {config.get('model_type')!r} is no decoder-only language model "
            f"with num_hidden_layers; supported: {', '.join(FAMILIES)} and dense models of the same shape"
        )


def _experts(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The name of a tensor of experts, if there is one."""
    counts = [count for key in _MOE_KEYS if isinstance(count := config.get(key), int)]
    joined = [(count,) for count in counts if count > 1]
    return next(
        (n for n, shape in shapes.items() if _EXPERTS.search(n) or (len(shape) == 3 and shape[:1] in joined)), None
    )


OWN_CODE = (
    "comes with code of its own, which runs only with trust_remote_code: true in the recipe "
    "(eval and verify: --trust-remote-code); read that code first: it runs as you, with all your files"
)


def check_code(config: Mapping[str, Any], where: str, trust_remote_code: bool) -> None:
    """Refuse a model that transformers knows by the model's own code alone, unless that may run.

    Imports transformers, and so torch, only for a model that brings code and has no row here.

    Raises:
        ModelError: naming the remedy.
    """
    kind = config.get("model_type")
    if trust_remote_code or not config.get("auto_map") or kind in FAMILIES:
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(f"{where}: model_type {kind!r} {OWN_CODE}")


def find_arch(model: "nn.Module", config: Mapping[str, Any]) -> Arch:
    """The family's row, or one made from the module tree.

    Raises:
        ModelError: naming the part that was not found.
    """
    row = FAMILIES.get(str(config.get("model_type")))
    return row if row is not None else _discover(model, config)


def _discover(model: "nn.Module", config: Mapping[str, Any]) -> Arch:
    from torch import nn

    kind, depth = config.get("model_type"), depth_of(config)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(layers) != 1:
        raise ModelError(f"model_type {kind!r}: found {len(layers)} lists of {depth} decoder layers, need exactly one")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    if embeddings is None or head is None:
        part = "token embedding" if embeddings is None else "output head"
        raise ModelError(f"model_type {kind!r}: no {part} found; add a row to compress/model/arch.py")
    parent = model.get_submodule(layers[0].rpartition(".")[0])
    norms = [n for n, m in parent.named_children() if "norm" in n.lower() or "norm" in type(m).__name__.lower()]
    if not norms:
        raise ModelError(f"model_type {kind!r}: no final norm beside {layers[0]}; add a row to compress/model/arch.py")
    prefix = layers[0].rpartition(".")[0]
    norm = f"{prefix}.{norms[-1]}" if prefix else norms[-1]
    return Arch(layers[0], names[id(embeddings)], norm, names[id(head)])
