"""Models that are written as GGUF files: one of random weights for each thing that a family does in its own way."""

import json
from pathlib import Path
from typing import Any

from gguf_files import CONTROL, USER_DEFINED
from random_models import TOKENIZER, make_model

from compress.exports.gguf.write import Written, export_gguf
from compress.model.gguf.header import Gguf, GgufTensor
from compress.model.gguf.tokenizer import make_tokenizer
from compress.system.progress import Reporter

ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", **ROPE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", **ROPE, "original_max_position_embeddings": 64,
    "long_factor": [1.0 + 0.3 * i for i in range(8)], "short_factor": [1.0 + 0.1 * i for i in range(8)],
}  # fmt: skip
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with fewer heads than wide": ("llama", {"head_dim": 8}),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "yarn with a factor of its own": ("qwen3", {"rope_parameters": {**YARN, "attention_factor": 1.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 with fewer heads than wide": ("qwen2", {"head_dim": 8}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "sliding_window": 16, "final_logit_softcapping": 20.0,
         "attn_logit_softcapping": 40.0},
    ),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 7, "rope_parameters": GEMMA3_ROPE},
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3 with partial rotary positions": (
        "phi3", {"rope_parameters": {"rope_type": "default", **ROPE, "partial_rotary_factor": 0.5}},
    ),
    "phi3 with factors": (
        "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64, "head_dim": None},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
}  # fmt: skip


def written(folder: Path, file: Path, kind: str = "f32", **options: Any) -> Written:
    """Export without a word."""
    return export_gguf(folder, file, kind, reporter=Reporter(quiet=True), **options)


def model(name: str, folder: Path) -> Path:
    """A model of `MODELS`."""
    family, config = MODELS[name]
    return make_model(folder, family, **config)


def set_tokenizer(folder: Path, keys: dict[str, Any], architecture: str = "llama") -> None:
    """Give a folder the tokenizer that keys of a GGUF header mean."""
    named = {f"tokenizer.ggml.{name}": value for name, value in keys.items()} | {"general.architecture": architecture}
    rows = GgufTensor(Path("x"), 0, (len(keys["tokens"]), 8), 0, 0)
    make_tokenizer(Gguf((Path("x"),), named, {"token_embd.weight": rows})).save_pretrained(folder)


def sentencepiece(prefix: bool) -> dict[str, Any]:
    """A vocabulary like that of Llama 2, of 4096 tokens: special ones, bytes, then pieces, the earlier the better."""
    rows = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = [p.replace("Ġ", "▁") for p in sorted(rows, key=rows.__getitem__) if p.isascii() or "Ġ" in p]
    pieces = [piece for piece in dict.fromkeys(pieces) if not piece.startswith("<|")][: 4096 - 260]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<user>"]
    kinds = [2, CONTROL, CONTROL, *[6] * 256, *[1] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(place) for place in range(len(pieces))] + [0.0]
    return {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": kinds, "add_space_prefix": prefix,
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True,
    }  # fmt: skip
