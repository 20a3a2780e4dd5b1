"""A Llama of random weights, small enough to be made in a moment, for tests that damage one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

TRAINED = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 64, 96, 2, 4096

Tensors = dict[str, NDArray[Any]]


def random_weights() -> Tensors:
    """The tensors of the model, float16."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{prefix}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {f"{prefix}.mlp.{part}_proj.weight": (INTERMEDIATE, HIDDEN) for part in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
    return {
        name: np.ones(shape, np.float16) if len(shape) == 1 else rng.normal(0, 0.1, shape).astype(np.float16)
        for name, shape in shapes.items()
    }


def write_model(folder: Path, weights: Tensors | None = None, **config: Any) -> Path:
    """Write the model to a new folder.

    Args:
        folder: the folder.
        weights: instead of the random ones.
        config: what is different in config.json; None takes a key out.
    """
    folder.mkdir()
    written = json.loads((TRAINED / "config.json").read_text())
    written |= {
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS, "dtype": "float16",
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    written |= config
    kept = {key: value for key, value in written.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TRAINED / name, folder / name)
    save_file(random_weights() if weights is None else weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def split_weights(folder: Path) -> Path:
    """Write the model to a new folder in two shards with an index; returns the index."""
    write_model(folder)
    (folder / "model.safetensors").unlink()
    weights, placed = random_weights(), {}
    for number in (1, 2):
        shard = f"model-{number:05d}-of-00002.safetensors"
        part = {name: tensor for name, tensor in weights.items() if (".layers.1." in name) == (number == 2)}
        save_file(part, folder / shard, {"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return index
