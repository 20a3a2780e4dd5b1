"""GGUF files made of Hugging Face folders by the rules of llama.cpp's converter, written with the gguf package."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from numpy.typing import NDArray
from safetensors.torch import load_file

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama"}
CONTROL, USER_DEFINED = 3, 4


def write_gguf(
    folder: Path,
    file: Path,
    keys: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    without: Collection[str] = (),
    extra: Mapping[str, NDArray[np.float32]] | None = None,
    part: tuple[int, int] | None = None,
    kind: str = "F32",
    endian: GGUFEndian = GGUFEndian.LITTLE,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder's model as a GGUF file.

    Args:
        folder: the model, with the tests' own byte-level tokenizer.
        file: to write.
        keys: of the header, instead of or beside the usual ones; without a prefix they belong to the architecture, and
            None takes a key out.
        architecture: instead of the model type's own.
        without: names of tensors that are left out.
        extra: more tensors.
        part: (number from 0, parts): write that part of a split set.
        kind: storage type of matrices.
        endian: byte order.
        tokenizer: keys of a tokenizer instead of the folder's, without `tokenizer.ggml.`.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = architecture or ARCHITECTURES.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(str(file), architecture, endianess=endian)
    header = {f"{architecture}.{name}": value for name, value in usual_keys(config).items()}
    header |= {f"tokenizer.ggml.{name}": value for name, value in (tokenizer or byte_level(folder)).items()}
    header |= {name if name.startswith(("general.", "split.", "tokenizer.")) else f"{architecture}.{name}": value
               for name, value in (keys or {}).items()}  # fmt: skip
    tensors = {
        name: values for name, values in gguf_tensors(folder, config, architecture).items() if name not in without
    }
    tensors |= extra or {}
    if part is not None:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", len(tensors))
        names = list(tensors)
        tensors = {name: tensors[name] for name in names[part[0] :: part[1]]}
        header = header if part[0] == 0 else {}
    for name, value in header.items():
        _add(writer, name, value)
    for name, values in tensors.items():
        stored = GGMLQuantizationType[kind if values.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif value is not None:
        writer.add_array(name, value)


def usual_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What llama.cpp's converter writes for every dense model."""
    rope = config["rope_parameters"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "rope.dimension_count": int(head_dim * rope.get("partial_rotary_factor", 1)),
        "vocab_size": config["vocab_size"],
    }


def gguf_tensors(folder: Path, config: Mapping[str, Any], architecture: str) -> dict[str, NDArray[np.float32]]:
    """The folder's tensors, float32, with llama.cpp's names and its order of rows."""
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, kind = name.rpartition(".")
        values, renamed = tensor.float().numpy(), f"{names.get_name(module)}.{kind}"
        if architecture == "llama" and ".attn_q." in renamed:
            values = interleave(values, config["num_attention_heads"])
        if architecture == "llama" and ".attn_k." in renamed:
            values = interleave(values, config["num_key_value_heads"])
        if architecture.startswith("gemma") and renamed.endswith("norm.weight"):
            values = values + 1
        made[renamed] = np.ascontiguousarray(values)
    return made


def interleave(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of each head from halves to pairs."""
    rows, rest = values.shape[0], values.shape[1:]
    return values.reshape(heads, 2, rows // heads // 2, *rest).swapaxes(1, 2).reshape(values.shape)


def byte_level(folder: Path, pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """Keys of a folder's byte-level tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {row["id"]: row["content"] for row in content["added_tokens"]}
    tokens = {number: token for token, number in content["model"]["vocab"].items()} | added
    pad = [tokens.get(number, f"[PAD{number}]") for number in range(max(tokens) + 1)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    keys = {
        "model": "gpt2", "pre": pre, "tokens": pad, "merges": merges,
        "token_type": [CONTROL if number in added else 1 for number in range(len(pad))],
        "bos_token_id": 0, "eos_token_id": 0, "padding_token_id": 0,
    }  # fmt: skip
    return keys | changes
