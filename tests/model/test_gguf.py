"""Models from GGUF files: the same model as the folder the file was made of, or one line that says why not."""

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_files import byte_level, write_gguf
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file

from compress.errors import ModelError
from compress.evaluation.llama_cpp import ask_llama_cpp
from compress.model.gguf.config import model_config
from compress.model.gguf.convert import convert
from compress.model.gguf.header import Gguf, GgufTensor, open_gguf
from compress.model.source import resolve_model

ROPE = {"rope_theta": 10000.0}
TOKENS = random_tokens(2, 96)


def converted(folder: Path, file: Path, **options: Any) -> Path:
    made = folder / "made"
    made.mkdir()
    convert(file, made, **options)
    return made


def same_model(original: Path, made: Path) -> None:
    """The same weights to the bit, the same logits by the stock loader."""
    before, after = load_file(original / "model.safetensors"), load_file(made / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    same_logits(original, made)


def same_logits(original: Path, made: Path) -> None:
    a, b = (load_stock(folder, torch.float32)(TOKENS).logits for folder in (original, made))
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def llama3(**changes: Any) -> dict[str, Any]:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_type": "llama3", **ROPE, **scaling, **changes}


def frequency_factors(rope: dict[str, Any], head_dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """As llama.cpp's converter computes them for Llama 3.1, written down from the paper's formula."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        wave = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        if wave < rope["original_max_position_embeddings"] / high:
            factors.append(1.0)
        elif wave > rope["original_max_position_embeddings"] / low:
            factors.append(rope["factor"])
        else:
            smooth = (rope["original_max_position_embeddings"] / wave - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


GEMMA = {"final_logit_softcapping": 20.0, "attn_logit_softcapping": 40.0}
LONG = {"long_factor": [1.0 + 0.3 * i for i in range(8)], "short_factor": [1.0 + 0.1 * i for i in range(8)]}
UNREAD = {"beta_fast": 16.0, "beta_slow": 2.0, "attn_factor": 0.75}
SCALED = {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # model type, its config, the header's keys
    "llama": ("llama", {"tie_word_embeddings": True}, {}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}, {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("mistral", {"sliding_window": 16}, {"attention.sliding_window": 16}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}, {}),
    "gemma": ("gemma", {}, {}),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 16, "sliding_window": 16, **GEMMA},
        {"attention.sliding_window": 16, **GEMMA},
    ),
    "gemma2 of 27B": (
        "gemma2",
        {"query_pre_attn_scalar": 64 // 4, "head_dim": 32, "num_hidden_layers": 46, "sliding_window": 4096},
        {},
    ),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 7,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}},
        {"attention.sliding_window": 16, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0,
         "rope.freq_base_swa": 5000.0},
    ),
    "phi3": ("phi3", {"sliding_window": 24}, {"attention.sliding_window": 24}),
    "phi3 with partial rotary positions": (
        "phi3", {"rope_parameters": {"rope_type": "default", **ROPE, "partial_rotary_factor": 0.5}}, {},
    ),
    "linear": (
        "llama", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}},
        {**SCALED, "rope.scaling.type": "linear"},
    ),
    "linear, by the old key": (
        "llama", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}}, {"rope.scale_linear": 4.0},
    ),
    "yarn": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 32}},
        {**SCALED, "rope.scaling.type": "yarn"},
    ),
    "yarn with a factor that undoes its own": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 32,
                             "attention_factor": 1.0}},
        {**SCALED, "rope.scaling.type": "yarn", "rope.scaling.attn_factor": 1 / (0.1 * math.log(4) + 1)},
    ),
    "none": ("llama", {}, {**SCALED, "rope.scaling.type": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_the_one_the_file_was_made_of(name: str, tmp_path: Path) -> None:
    family, config, keys = FAMILIES[name]
    original = make_model(tmp_path / "model", family, **config)
    same_model(original, converted(tmp_path, write_gguf(original, tmp_path / "model.gguf", keys)))


def test_keys_of_yarn_that_llama_cpp_does_not_read_are_not_used_here_either(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    rope = {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 32}
    original = make_model(tmp_path / "model", "llama", rope_parameters=rope)
    plain = {**SCALED, "rope.scaling.type": "yarn"}
    more = {f"rope.scaling.yarn_{name}": value for name, value in UNREAD.items()}  # as its converter writes them
    files = [write_gguf(original, tmp_path / f"{len(keys)}.gguf", keys) for keys in (plain, plain | more)]
    first, second = (ask_llama_cpp(file, list(range(1, 60)), new_tokens=0) for file in files)
    assert not isinstance(first, str) and not isinstance(second, str)
    assert torch.equal(first.logits, second.logits)
    same_model(original, converted(tmp_path, files[1]))
    said: list[str] = []
    model_config(open_gguf(files[1]), said.append)
    assert [line.partition(" is not used")[0] for line in said] == [
        f"{files[1].name}: llama.rope.scaling.yarn_{name} = {value:g}" for name, value in UNREAD.items()
    ]


def test_a_llama_with_biases_on_q_k_and_v_alone(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", "qwen2")
    file = write_gguf(original, tmp_path / "model.gguf", architecture="llama")
    same_model(original, converted(tmp_path, file))


@pytest.mark.parametrize("changes", [{}, {"factor": 32.0, "original_max_position_embeddings": 8192}], ids=str)
def test_frequency_factors_become_llama3_scaling(changes: dict[str, Any], tmp_path: Path) -> None:
    rope = llama3(**changes)
    original = make_model(tmp_path / "model", rope_parameters=rope, max_position_embeddings=131072)
    factors = frequency_factors(rope, 16)
    assert factors.max() == rope["factor"] and factors.min() == 1
    file = write_gguf(original, tmp_path / "model.gguf", extra={"rope_freqs.weight": factors})
    made = converted(tmp_path, file)
    assert load_stock(made, torch.float32).config.rope_parameters == rope
    same_model(original, made)


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "scalar"), [("gemma2", 46, 4608, 144), ("gemma3", 62, 5376, 168)]
)
def test_the_query_scale_of_the_large_gemmas(architecture: str, layers: int, hidden: int, scalar: int) -> None:
    """As in their config.json; llama.cpp tells them by their number of layers too."""
    values = {
        "block_count": layers, "embedding_length": hidden, "attention.head_count": 32, "attention.key_length": 128,
        "context_length": 8192, "feed_forward_length": 8, "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 1024,
    }  # fmt: skip
    keys = {f"{architecture}.{name}": value for name, value in values.items()} | {"general.architecture": architecture}
    shapes = {"token_embd.weight": (9, hidden)} | {f"blk.{layer}.attn_q.weight": (1, 1) for layer in range(layers)}
    tensors = {name: GgufTensor(Path("x"), 0, shape, 0, 0) for name, shape in shapes.items()}
    assert model_config(Gguf((Path("x"),), keys, tensors))["query_pre_attn_scalar"] == scalar


def test_the_factors_of_longrope(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", **ROPE, **LONG, "original_max_position_embeddings": 64}
    original = make_model(
        tmp_path / "model", "phi3", rope_parameters=rope, original_max_position_embeddings=64, head_dim=None
    )
    extra = {f"rope_factors_{name}.weight": np.array(LONG[f"{name}_factor"], np.float32) for name in ("long", "short")}
    keys = {
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(2) / math.log(64)),
        "rope.scaling.original_context_length": 64,
    }
    made = converted(tmp_path, write_gguf(original, tmp_path / "model.gguf", keys, extra=extra))
    same_model(original, made)  # of 96 tokens: the long factors
    short = TOKENS[:, :48]
    a, b = (load_stock(folder, torch.float32)(short).logits for folder in (original, made))
    assert (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_all_parts_of_a_split_file_are_read_whichever_is_given(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    parts = [write_gguf(original, tmp_path / f"tiny-{part + 1:05d}-of-00003.gguf", part=(part, 3)) for part in range(3)]
    for number, part in enumerate((parts[0], parts[2])):
        folder = tmp_path / str(number)
        folder.mkdir()
        same_model(original, converted(folder, part))


def test_a_large_model_is_written_in_shards(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", tie_word_embeddings=False)
    made = converted(tmp_path, write_gguf(original, tmp_path / "model.gguf"), shard_bytes=600_000)
    assert len(list(made.glob("model-*-of-*.safetensors"))) > 1
    same_logits(original, made)


def test_quantized_blocks_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", "qwen2")
    made = load_file(
        converted(tmp_path, write_gguf(original, tmp_path / "model.gguf", kind="Q8_0")) / "model.safetensors"
    )
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(original / "model.safetensors")[name].float().numpy()
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(before, kind), kind)).bfloat16()
    assert torch.equal(made[name], expected)


def test_a_file_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its name and place; another file of the same size and time is another model."""
    original, said = make_model(tmp_path / "model"), list[str]()
    file = write_gguf(original, tmp_path / "model.GGUF")
    blob = shutil.copy(file, tmp_path / "sha256-0f1e2d")
    made = resolve_model(str(file), None, tmp_path / "work", said.append)
    assert resolve_model(str(blob), None, tmp_path / "work", said.append) == made
    assert said == ["dequantizing model.GGUF to bf16"]
    same_model(original, made)
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-4:] = np.float32(0.5).tobytes()
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    read_anew = subprocess.CompletedProcess([], 2, "", "read anew\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: read_anew)
    assert resolve_model(str(blob), None, tmp_path / "work", said.append) == made
    with pytest.raises(ModelError, match="^read anew$"):
        resolve_model(str(file), None, tmp_path / "work", said.append)


def test_the_parameters_of_the_fixture_are_all_there(tiny_model: Path, tmp_path: Path) -> None:
    """The trained model, through a file and back, predicts as it did."""
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", tokenizer=byte_level(tiny_model))
    same_model(tiny_model, converted(tmp_path, file))
