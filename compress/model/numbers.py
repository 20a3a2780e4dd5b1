"""The sizes in a config.json, looked at before anything is built of them. Never imports torch.

With a size that no model has, transformers allocates without end or fails somewhere deep inside.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.errors import ModelError

# The largest that is believed of each, far above any model.
_LARGEST = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "intermediate_size", "head_dim"), 2**22),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads"), 2**16),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2**14),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 2**40),
    "vocab_size": 2**28,
    "num_labels": 2**20,  # transformers makes a dictionary of them
}


def check_numbers(config: Mapping[str, Any], file: Path) -> None:
    """Refuse sizes that no model has. A list has one for each layer, of which 0 and null are layers without that part.

    Args:
        config: what `file`, a config.json, holds.
        file: for messages.

    Raises:
        ModelError: naming file, key and value.
    """
    for key, largest in _LARGEST.items():
        value = config.get(key)
        least, sizes = (0, value) if isinstance(value, list) else (1, [value])
        if not all(size is None or (type(size) is int and least <= size <= largest) for size in sizes):
            raise ModelError(
                f"{file}: {key}: {_shown(value)} is not a whole number from 1 to {largest:,}; download the model again"
            )
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        raise ModelError(
            f"{file}: num_key_value_heads: {shared} does not divide num_attention_heads: {heads}; "
            "download the model again"
        )


def check_padding(config: Mapping[str, Any], file: Path) -> None:
    """Refuse a padding token that the embeddings have no row for; for models that give it to their embeddings.

    Raises:
        ModelError: naming file, key and value.
    """
    token, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    if isinstance(token, int) and isinstance(vocabulary, int) and not -vocabulary <= token < vocabulary:
        raise ModelError(
            f"{file}: pad_token_id: {token} is not one of the {vocabulary} tokens; write null or one of them"
        )


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
