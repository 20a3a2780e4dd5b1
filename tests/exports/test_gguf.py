"""GGUF files that are written: read back they are the model, and what llama.cpp can't have is refused by name."""

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exported import GEMMA3_ROPE, LONG, MODELS, ROPE, YARN, model, written
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from stored import set_config
from transformers import AutoConfig

from compress.errors import ModelError, OutputError
from compress.exports.gguf import write
from compress.exports.gguf.tensors import Tensors
from compress.model.gguf.convert import convert
from compress.model.gguf.header import open_gguf

TOKENS = random_tokens(1, 96)
# What says nothing of the computation, or is the same in other words.
_NOT_COMPARED = {
    "architectures",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "model_type",
    "use_cache",
    "head_dim",
}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_back(folder: Path, files: list[Path]) -> Path:
    made = folder / "made"
    made.mkdir()
    convert(files[0], made)
    return made


def same_tensors(before: Path, after: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name].bfloat16(), other[name]) for name in one)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_back_is_the_model(name: str, tmp_path: Path) -> None:
    """To the bit: the reader was written before, and by the other side's files."""
    original = model(name, tmp_path / "model")
    made = read_back(tmp_path, written(original, tmp_path / "model.gguf").files)
    same_tensors(original, made)
    a, b = (load_stock(folder, torch.float32)(TOKENS).logits for folder in (original, made))
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()
    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (original, made))
    if name != "mistral":  # which without a window is a Llama
        assert before["model_type"] == after["model_type"]
    shared = (before.keys() & after.keys()) - _NOT_COMPARED
    rope = {"factor", "partial_rotary_factor", "original_max_position_embeddings", "attention_factor"}
    for key in shared - {"rope_parameters", "original_max_position_embeddings"}:
        assert in_float32(before[key]) == in_float32(after[key]), key
    for key in before["rope_parameters"].keys() - rope:
        assert in_float32(before["rope_parameters"][key]) == in_float32(after["rope_parameters"][key]), key


def in_float32(value: Any) -> Any:
    """As a file keeps it."""
    if isinstance(value, list):
        return [in_float32(each) for each in value]
    return float(np.float32(value)) if isinstance(value, float) else value


@pytest.mark.parametrize(("kind", "type"), [("bf16", "BF16"), ("f16", "F16"), ("q8_0", "Q8_0"), ("auto", "BF16")])
def test_types_of_matrices(kind: str, type: str, tmp_path: Path) -> None:
    """As the gguf package itself encodes them; norms stay float32."""
    original = make_model(tmp_path / "model", "qwen2")
    done = written(original, tmp_path / "model.gguf", kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) > 1} == {type} == set(done.matrices)
    assert {t.tensor_type.name for t in tensors.values() if len(t.shape) == 1} == {"F32"}
    values = load_file(original / "model.safetensors")["model.layers.1.mlp.down_proj.weight"].float().numpy()
    stored = tensors["blk.1.ffn_down.weight"]
    assert np.array_equal(stored.data.view(np.uint8), gguf.quantize(values, stored.tensor_type).view(np.uint8))
    assert done.bytes == (tmp_path / "model.gguf").stat().st_size
    assert sum(done.types.values()) == len(tensors)


def test_columns_that_make_no_blocks_are_float16(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", intermediate_size=80)
    done = written(original, tmp_path / "model.gguf", "q8_0")
    assert done.types["F16"] == 2 and done.types["Q8_0"] == 2 * 6 + 2  # down_proj of two layers
    made = read_back(tmp_path, done.files)
    before, after = (load_file(folder / "model.safetensors") for folder in (original, made))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(before[name], after[name])


def test_numbers_that_float16_cannot_hold(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    tensors = load_file(original / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(tensors, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="up_proj.weight reaches 99840, more than float16 can hold; .* --type bf16"):
        written(original, tmp_path / "model.gguf", "f16")
    assert names(tmp_path) == ["model"]


def test_parts_past_a_size(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    done = written(original, tmp_path / "model.gguf", split_bytes=600_000)
    assert [file.name for file in done.files] == [f"model-{n:05d}-of-00003.gguf" for n in (1, 2, 3)]
    assert names(tmp_path) == ["model", *(file.name for file in done.files)]
    same_tensors(original, read_back(tmp_path, done.files))


def test_a_head_that_is_stored_twice_is_written_once(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(original / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
              original / "model.safetensors", {"format": "pt"})  # fmt: skip
    written(original, tmp_path / "model.gguf")
    assert "output.weight" not in open_gguf(tmp_path / "model.gguf").tensors


def test_a_head_of_its_own_that_the_config_calls_tied(tmp_path: Path) -> None:
    """transformers keeps it, and so does the file."""
    original = make_model(tmp_path / "model", tie_word_embeddings=False)
    set_config(original, tie_word_embeddings=True)
    written(original, tmp_path / "model.gguf")
    assert "output.weight" in open_gguf(tmp_path / "model.gguf").tensors
    gemma = make_model(tmp_path / "gemma", "gemma", tie_word_embeddings=False)
    with pytest.raises(ModelError, match="a head of its own, which llama.cpp's gemma has not"):
        written(gemma, tmp_path / "gemma.gguf")


def test_names_and_licence(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    (original / "README.md").write_text("---\ntags: [a]\nlicense: 'apache-2.0'\n---\n# Model\nlicense: none\n")
    written(original, tmp_path / "model.gguf", "bf16")
    keys = open_gguf(tmp_path / "model.gguf").keys
    assert keys["general.license"] == "apache-2.0"
    assert keys["general.name"] == "model"
    assert (keys["general.file_type"], keys["general.quantization_version"]) == (32, 2)


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    done = written(make_model(tmp_path / "model", "mistral", sliding_window=16), tmp_path / "model.gguf")
    assert len(done.remarks) == 1 and "up to 16 tokens it computes what the model does" in done.remarks[0]
    assert open_gguf(tmp_path / "model.gguf").keys["llama.attention.sliding_window"] == 16


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "model_type 'opt' can't be written .* llama"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act gelu .* takes silu for granted"),
    "biases": ("qwen3", {"attention_bias": True}, "has .*q_proj.bias, for which llama.cpp's qwen3 has no place"),
    "windows in some layers": (
        "qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 16},
        "layer_types .* no layer has a sliding window",
    ),
    "windows in other layers": (
        "gemma2", {"layer_types": ["full_attention", "sliding_attention"], "query_pre_attn_scalar": 16},
        "layer_types .* every layer but each 2th",
    ),
    "layers without positions": ("smollm3", {"no_rope_layers": [0, 1]}, "no_rope_layers .* each 4th layer"),
    "query scale": ("gemma2", {"query_pre_attn_scalar": 24}, "query_pre_attn_scalar 24 .* takes 16 for granted"),
    "dynamic": (
        "llama", {"rope_parameters": {"rope_type": "dynamic", **ROPE, "factor": 2.0}},
        "no rope_type dynamic, only default, linear, yarn, llama3",
    ),
    "factors elsewhere": ("llama", {"rope_parameters": LONG}, "llama.cpp's llama has no rope_type longrope"),
    "ramp": ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "takes beta_fast 32 for granted"),
    "ramp without rounding": ("llama", {"rope_parameters": {**YARN, "truncate": False}}, "rounds the bounds"),
    "scaled local positions": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "rope_parameters": {
            **GEMMA3_ROPE, "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
        "no scaling in layers with a sliding window",
    ),
    "heads of another width together": ("phi3", {"head_dim": 32}, "heads as wide as the hidden states, not 128"),
    "all tokens see all": ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_by_name(name: str, tmp_path: Path) -> None:
    family, config, message = REFUSED[name]
    with pytest.raises(ModelError, match=message):
        written(make_model(tmp_path / "model", family, **config), tmp_path / "model.gguf")
    assert names(tmp_path) == ["model"]


def test_no_soft_cap(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", "gemma2", query_pre_attn_scalar=16)
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"final_logit_softcapping": None}))
    with pytest.raises(ModelError, match="final_logit_softcapping None can't be written"):
        written(original, tmp_path / "model.gguf")


def test_a_field_that_is_not_known_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a later transformers gives a family one more."""
    from compress.exports.gguf import config

    monkeypatch.setattr(config, "_HARMLESS", config._HARMLESS - {"attention_dropout"})
    written(make_model(tmp_path / "usual"), tmp_path / "usual.gguf")
    with pytest.raises(ModelError, match="attention_dropout 0.5 can't be written as GGUF: it may change"):
        written(make_model(tmp_path / "model", attention_dropout=0.5), tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.layers.0.mlp.up_proj.weight": None}, "lacks model.layers.0.mlp.up_proj.weight"),
        ({"model.layers.0.mlp.extra.weight": torch.ones(2, 2)}, "holds model.layers.0.mlp.extra.weight, for which"),
        (
            {"model.layers.1.mlp.up_proj.weight": torch.ones(80, 64)},
            r"has shape \[80, 64\], config.json says \[96, 64\]",
        ),
    ],
)
def test_tensors_that_are_not_what_the_config_says(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    tensors = load_file(original / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message):
        written(original, tmp_path / "model.gguf")


def test_a_file_of_another_program_is_not_overwritten(tmp_path: Path) -> None:
    original, file = make_model(tmp_path / "model"), tmp_path / "model.gguf"
    file.write_text("precious")
    with pytest.raises(OutputError, match="exists, and was not written by dscompress"):
        written(original, file)
    assert file.read_text() == "precious"


def test_a_file_that_is_mapped_is_replaced_whole(tmp_path: Path) -> None:
    original, file = make_model(tmp_path / "model"), tmp_path / "model.gguf"
    written(original, file)
    before, mapped = file.read_bytes(), np.memmap(file, np.uint8, "r")
    written(original, file, "q8_0")
    assert file.stat().st_size < len(before)
    assert mapped.tobytes() == before


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In numpy's words, which have no number."""
    original, file = make_model(tmp_path / "model"), tmp_path / "model.gguf"
    written(original, file)
    before, load = file.read_bytes(), Tensors.load

    def full(self: Tensors, entry: Any) -> Any:
        if entry.name.startswith("blk.1."):
            raise OSError("4096 requested and 0 written")
        return load(self, entry)

    monkeypatch.setattr(Tensors, "load", full)
    with pytest.raises(OutputError, match="no space left on the disk"):
        written(original, file)
    assert file.read_bytes() == before
    assert names(tmp_path) == ["model", "model.gguf"]


def test_what_a_killed_export_left_is_cleared_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make_model(tmp_path / "model")
    left, other = tmp_path / ".model.gguf.99999999.part", tmp_path / f".model.gguf.{os.getppid()}.part"
    for folder in (left, other):
        folder.mkdir()
        (folder / "model.gguf").write_text("half")
    written(original, tmp_path / "model.gguf")
    assert not left.exists() and other.exists()


def test_memory_holds_a_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded before the header is on the disk, and each tensor goes there before the next is loaded."""
    events: list[str] = []
    load, put = Tensors.load, write.GGUFWriter.write_tensor_data
    monkeypatch.setattr(Tensors, "load", lambda self, entry: (events.append("load"), load(self, entry))[1])
    monkeypatch.setattr(
        write.GGUFWriter, "write_tensor_data", lambda self, data: (events.append("write"), put(self, data))[1]
    )
    done = written(make_model(tmp_path / "model"), tmp_path / "model.gguf")
    assert events == ["load", "write"] * sum(done.types.values())


def test_a_config_that_transformers_does_not_take(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    file = original / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 7}))
    with pytest.raises(ModelError, match="config.json"):
        written(original, tmp_path / "model.gguf")
