"""GGUF files that are refused, and the one line that each gets."""

import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import write_gguf
from random_models import make_model

from compress.errors import ModelError
from compress.model.gguf import convert as converter
from compress.model.gguf.convert import convert
from compress.model.source import resolve_model

SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
REMEDY = "give the model's safetensors folder instead"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "tensor that is missing": (
        {"without": ("blk.1.ffn_up.weight", "output_norm.weight")},
        "lacks blk.1.ffn_up.weight, output_norm.weight, which a llama model has; download it again",
    ),
    "embeddings that are missing": (
        {"without": ("token_embd.weight",)},
        "has no tensor token_embd.weight; download it again",
    ),
    "tensor without a place": (
        {"extra": {"blk.0.attn_rot_embd.weight": np.ones(8, np.float32)}},
        f"holds blk.0.attn_rot_embd.weight, for which a llama model has no place; {REMEDY}",
    ),
    "half of the biases": (
        {"extra": {"blk.1.attn_q.bias": np.ones(64, np.float32)}},
        f"holds blk.1.attn_q.bias, for which a llama model has no place; {REMEDY}",
    ),
    "unknown keys": (
        {"keys": {"logit_scale": 0.5, "rope.scaling.alpha": 2.0}},
        f"not understood, and may change the computation: llama.logit_scale = 0.5, llama.rope.scaling.alpha = 2; "
        f"{REMEDY}",
    ),
    "key that is missing": (
        {"keys": {"block_count": None}},
        "lacks the key llama.block_count; convert the model again with a current llama.cpp",
    ),
    "frequency factors of another kind": (
        {"extra": {"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}},
        f"rope_freqs.weight holds frequency factors (1 to 8) that no scaling of Llama 3's kind gives; {REMEDY}",
    ),
    "rotary positions on half of a head": (
        {"keys": {"rope.dimension_count": 8}},
        "llama.rope.dimension_count is 8 of 16: rotary positions on a part of each head are not supported for llama; "
        f"{REMEDY}",
    ),
    "longrope without factors": (
        {"keys": {"rope.scaling.type": "longrope"}},
        f"llama.rope.scaling.type 'longrope' is not supported; {REMEDY}",
    ),
    "yarn of DeepSeek-V2": (
        {"keys": {**SCALED, "rope.scaling.type": "yarn", "rope.scaling.yarn_log_multiplier": 0.1}},
        f"llama.rope.scaling.yarn_log_multiplier is 0.1, only 0 is supported here; {REMEDY}",
    ),
    "values narrower than keys": (
        {"keys": {"attention.value_length": 8}},
        f"llama.attention.value_length is 8, only 16 is supported here; {REMEDY}",
    ),
    "layers of several widths": (
        {"keys": {"feed_forward_length": [96, 64]}},
        f"llama.feed_forward_length differs from layer to layer, which is not supported; {REMEDY}",
    ),
    "mixture of experts": (
        {"keys": {"expert_count": 8}}, "is a mixture of 8 experts; only dense models are supported",
    ),
    "embedding model": (
        {"keys": {"attention.causal": False}},
        f"llama.attention.causal is False, only True is supported here; {REMEDY}",
    ),
    "shape that the header does not say": (
        {"keys": {"feed_forward_length": 64}},
        "blk.0.ffn_gate.weight has shape [96, 64], its header says [64, 64]; download it again",
    ),
    "layers that are missing": (
        {"keys": {"block_count": 3}}, "has 2 layers, llama.block_count is 3; download it again",
    ),
    "embeddings of another width": (
        {"keys": {"embedding_length": 128}},
        "token_embd.weight has shape [4096, 64], llama.embedding_length is 128; download it again",
    ),
    "negative scaling": (
        {"keys": {"rope.scaling.factor": -2.0}},
        "llama.rope.scaling.factor is -2.0; only numbers above 0 make sense",
    ),
    "adapter": (
        {"keys": {"general.type": "adapter"}},
        "general.type is 'adapter'; only whole language models (model) are read",
    ),
    "unsupported architecture": (
        {"architecture": "granite"},
        "architecture 'granite' is not supported as GGUF, only llama, qwen2, qwen3, phi3, smollm3, gemma, gemma2, "
        "gemma3 are; "
        f"{REMEDY}",
    ),
    "big-endian file": (
        {"endian": gguf.GGUFEndian.BIG},
        "is big-endian; turn a copy of it with: gguf-convert-endian COPY.gguf little",
    ),
    "no tokenizer": ({"tokenizer": {"model": "no_vocab"}}, f"has no tokenizer; {REMEDY}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str, small: Path, tmp_path: Path) -> None:
    options, line = REFUSED[name]
    file = write_gguf(small, tmp_path / "model.gguf", **options)
    with pytest.raises(ModelError) as caught:
        convert(file, tmp_path)
    assert str(caught.value) in (f"model: {file}: {line}", f"model: {file} {line}")


def test_the_line_comes_from_the_reader_process(small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "model.gguf", without=("blk.0.attn_q.weight",))
    with pytest.raises(
        ModelError, match=r"^model: \S+/model.gguf: lacks blk.0.attn_q.weight, which a llama model has; "
    ):
        resolve_model(str(file), None, tmp_path / "work", print)
    assert not [path for path in (tmp_path / "work" / "base").iterdir() if path.is_dir()]


def test_a_package_that_is_missing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(small, tmp_path / "model.gguf")
    with monkeypatch.context() as patch, pytest.raises(ModelError) as caught:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        resolve_model(str(file), None, tmp_path / "work", print)
    assert str(caught.value) == f"model: {file} needs the gguf package; run: pip install 'dscompress[gguf]'"

    def without_sentencepiece(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'sentencepiece'", name="sentencepiece")

    monkeypatch.setattr(converter, "convert", without_sentencepiece)
    assert converter.main("folder", "model.gguf") == 2
    line = "model: model.gguf: needs the package sentencepiece; run: pip install sentencepiece\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("share", [0.999, 0.1, 0.0001])
def test_a_file_that_is_cut_short(share: float, small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "model.gguf")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"^model: \S+/model.gguf is cut short.*; download it again$"):
        convert(file, tmp_path)


def test_parts_that_are_missing_are_named(small: Path, tmp_path: Path) -> None:
    for part in (0, 2):
        write_gguf(small, tmp_path / f"tiny-{part + 1:05d}-of-00004.gguf", part=(part, 4))
    file = tmp_path / "tiny-00003-of-00004.gguf"
    with pytest.raises(ModelError) as caught:
        convert(file, tmp_path)
    assert str(caught.value) == (
        f"model: {file}: is one of the 4 parts of a split model; tiny-00002-of-00004.gguf, tiny-00004-of-00004.gguf "
        "missing, put all parts in one folder"
    )


def test_a_part_under_another_name(small: Path, tmp_path: Path) -> None:
    file = write_gguf(small, tmp_path / "blob", part=(0, 2))
    with pytest.raises(ModelError) as caught:
        convert(file, tmp_path)
    assert str(caught.value) == (
        f"model: {file}: is one of the 2 parts of a split model, but its name does not say where the others are; name "
        "them NAME-00001-of-00002.gguf and so on, or join them with llama-gguf-split --merge"
    )


def test_parts_of_two_models(small: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        write_gguf(small, tmp_path / f"tiny-0000{name}-of-00002.gguf", part=(0, 2))
    with pytest.raises(ModelError, match=r"00002-of-00002.gguf: says that it is part 0 .from 0. of 2, its name says 1"):
        convert(tmp_path / "tiny-00001-of-00002.gguf", tmp_path)
