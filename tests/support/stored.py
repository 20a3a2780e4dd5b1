"""Checkpoints stored in other ways than save_pretrained does."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from random_models import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def tensors_of(folder: Path) -> Tensors:
    """All tensors of a folder with one file."""
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: Tensors, file: str = "model.safetensors") -> None:
    """Write tensors as one file of a folder."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    """Store a folder's tensors under other names."""
    store(folder, {name(old): tensor for old, tensor in tensors_of(folder).items()})


def set_config(folder: Path, **changes: object) -> None:
    """Change config.json; None takes a key out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def index(folder: Path, placed: dict[str, str]) -> None:
    """Write an index: the file of each tensor."""
    content = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def louder(tensors: Tensors) -> Tensors:
    return {name: 1.5 * tensor for name, tensor in tensors.items()}


def tied_without_prefix(folder: Path) -> None:
    make_model(folder, tie_word_embeddings=True)
    renamed(folder, lambda name: name.removeprefix("model."))


def untied_without_prefix(folder: Path) -> None:
    make_model(folder)
    renamed(folder, lambda name: name.removeprefix("model."))


def another_family_without_prefix(folder: Path) -> None:
    make_model(folder, "opt", ffn_dim=96, word_embed_proj_dim=64)
    renamed(folder, lambda name: name.removeprefix("model."))


def one_prefix_too_many(folder: Path) -> None:
    make_model(folder)
    renamed(folder, lambda name: name if name == HEAD else f"model.{name}")


def inside_a_multimodal_model(folder: Path) -> None:
    make_model(folder, "qwen3_5_text", layer_types=["full_attention"] * 2)
    renamed(folder, lambda name: name.replace("model.", "model.language_model."))


def tied_by_the_heads_name(folder: Path) -> None:
    make_model(folder, tie_word_embeddings=True)
    renamed(folder, lambda name: HEAD if name == EMBEDDINGS else name)


def tied_and_stored_twice(folder: Path) -> None:
    make_model(folder, tie_word_embeddings=True)
    tensors = tensors_of(folder)
    store(folder, tensors | {HEAD: tensors[EMBEDDINGS]})


def a_head_of_its_own(folder: Path) -> None:
    make_model(folder)
    set_config(folder, tie_word_embeddings=True)


def a_head_of_its_own_in_a_family_that_ties(folder: Path) -> None:
    make_model(folder, "gemma2", tie_word_embeddings=False)
    set_config(folder, tie_word_embeddings=None)


def an_index_beside_a_newer_file(folder: Path) -> None:
    make_model(folder)
    tensors = tensors_of(folder)
    store(folder, louder(tensors), "model-00001-of-00001.safetensors")
    index(folder, dict.fromkeys(tensors, "model-00001-of-00001.safetensors"))


def two_sets_of_weights(folder: Path) -> None:
    make_model(folder)
    for other in ("consolidated.safetensors", "model.fp16.safetensors"):
        store(folder, louder(tensors_of(folder)), other)


def shards_beside_another_set(folder: Path) -> None:
    make_model(folder, shard="200KB")
    store(folder, {HEAD: torch.ones(4096, 64)}, "consolidated.safetensors")


def a_tensor_in_two_shards(folder: Path) -> None:
    make_model(folder)
    tensors = tensors_of(folder)
    (folder / "model.safetensors").unlink()
    store(folder, louder(tensors), "b.safetensors")
    store(folder, tensors, "a.safetensors")
    index(folder, dict.fromkeys(tensors, "a.safetensors") | {HEAD: "b.safetensors"})


def a_file_that_the_config_names(folder: Path) -> None:
    make_model(folder)
    store(folder, louder(tensors_of(folder)), "other.safetensors")
    set_config(folder, transformers_weights="other.safetensors")


def a_layer_beyond_the_depth(folder: Path) -> None:
    make_model(folder)
    set_config(folder, num_hidden_layers=1)


def buffers_that_the_model_makes(folder: Path) -> None:
    make_model(folder)
    ours = {f"model.{place}rotary_emb.inv_freq": torch.ones(8) for place in ("", "layers.0.self_attn.")}
    store(folder, tensors_of(folder) | ours)


def biases_that_the_config_denies(folder: Path) -> None:
    make_model(folder, attention_bias=True)
    set_config(folder, attention_bias=False)


FORMS = [
    tied_without_prefix, untied_without_prefix, another_family_without_prefix, one_prefix_too_many,
    inside_a_multimodal_model, tied_by_the_heads_name, tied_and_stored_twice, a_head_of_its_own,
    a_head_of_its_own_in_a_family_that_ties, an_index_beside_a_newer_file, two_sets_of_weights,
    shards_beside_another_set, a_tensor_in_two_shards, a_file_that_the_config_names, a_layer_beyond_the_depth,
    buffers_that_the_model_makes, biases_that_the_config_denies,
]  # fmt: skip
