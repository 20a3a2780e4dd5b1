"""Tensors by the names that they have in the model: what transformers calls them when it opens the folder.

A checkpoint may have been saved without the head's prefix, or from inside a larger model; transformers maps such names
as it loads. Here its own rules are asked, and only where the usual names are not found: that imports torch.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from compress.errors import ModelError
from compress.model.arch import FAMILIES, depth_of

_INDEXED = re.compile(r"(.+?)\.(\d+)\.")


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether config.json makes the output head the embeddings, by its words or by what its family means without."""
    family = FAMILIES.get(str(config.get("model_type")))
    return bool(config.get("tie_word_embeddings", family is not None and family.tied))


def canonical_names(stored: Collection[str], config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The name in the model of each stored name.

    Raises:
        ModelError: two tensors that would get the same name.
    """
    names = {name: name for name in stored}
    family = FAMILIES.get(str(config.get("model_type")))
    if not _usual(stored, config):
        heads = f"{family.head}." if family is not None else ()  # gpt_neox: found by its row's name for it
        names |= {s: n for s, n in _as_transformers_maps(stored, folder).items() if not s.startswith(heads)}
    if family is not None and says_tied(config) and f"{family.embeddings}.weight" not in names.values():
        # stored under the head's name alone: transformers ties to the one that is there
        names = {s: f"{family.embeddings}.weight" if n == f"{family.head}.weight" else n for s, n in names.items()}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        both = " and ".join(sorted(s for s, n in names.items() if n == twice[0]))
        raise ModelError(f"{folder}: {both} are both {twice[0]} to transformers; remove the one that is not meant")
    return names


def layers_beyond(names: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """Tensors of layers behind the last that config.json counts, which transformers leaves alone (often MTP).

    None where a layer of those that it counts is missing: then the two do not belong together.
    """
    depth, prefix = depth_of(config), layers_prefix(names, config)
    layers: dict[int, list[str]] = {}
    for name in names:
        match = _INDEXED.match(name)
        if match and match[1] == prefix:
            layers.setdefault(int(match[2]), []).append(name)
    if depth is None or not set(range(depth)) <= layers.keys():
        return []
    return [name for index in sorted(layers) if index >= depth for name in layers[index]]


def layers_prefix(names: Collection[str], config: Mapping[str, Any]) -> str:
    """Under what the decoder layers lie: "model.layers"; empty where nothing looks like one."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        return family.layers
    counts = Counter(match[1] for name in names if (match := _INDEXED.match(name)))
    return counts.most_common(1)[0][0] if counts else ""


def _usual(stored: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether these are a model's own names, as far as that can be told without transformers."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        return layers_prefix(stored, config) in ("model.layers", "")
    ends = f"{family.embeddings}.", f"{family.head}."
    return any(n.startswith(f"{family.layers}.") for n in stored) and any(n.startswith(ends) for n in stored)


def _as_transformers_maps(stored: Collection[str], folder: Path) -> dict[str, str]:
    """By transformers' rules for the model of this folder; as they are where it knows no such model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (ValueError, KeyError, ImportError, OSError, TypeError, AttributeError):
        return {name: name for name in stored}  # what it can't build is refused, with its reason, when it is run
    known, rules = model.state_dict(), get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    names = {}
    for name in stored:
        mapped, conversion = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if mapped not in known and name in known:
            mapped, conversion = rename_source_key(name, [], [], model.base_model_prefix, known)
        names[name] = mapped if mapped in known and conversion is None else name
    return names
