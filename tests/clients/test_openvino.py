"""Every family and layout of codes that is exported to OpenVINO, traced and opened by the real programs.

`make clients` installs them. What is made is exact: log-probabilities within 1e-3 nats of our reader, whose tokens
LLMPipeline goes on with.
"""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import onnx_files
import pytest
from random_models import make_model

from compress.errors import DscompressError
from compress.evaluation.openvino_runtime import PROGRAM, ask_openvino, check_in_openvino
from compress.evaluation.other_program import Timing
from compress.evaluation.verify import probe_tokens
from compress.exports.openvino.build import Written, export_openvino
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint
from compress.quant.grid import Quantized
from compress.system.programs import Engine, find_program
from compress.system.progress import Reporter

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", **ROPE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", **ROPE, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "llama with linear positions": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}}),
    "llama with narrow heads": ("llama", {"head_dim": 8}),
    "mistral with a window": ("mistral", {"sliding_window": 16}),
    "qwen2 with a window": ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen2 with yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
    "phi3 with a window": ("phi3", {"sliding_window": 16, "original_max_position_embeddings": 128}),
    "smollm3 with a layer without positions": ("smollm3", {"no_rope_layers": [1, 0]}),
    "olmo2": ("olmo2", {}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "head_dim": None}),
    "opt": ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128, "num_key_value_heads": None, "head_dim": None}),
}
W4 = {"method": "rtn", "bits": 4, "group_size": 32}
LAYOUTS: dict[str, dict[str, Any]] = {
    "gptq": W4 | {"format": "gptq"},
    "gptq, asymmetric": W4 | {"format": "gptq", "symmetric": False, "group_size": 128},
    "asymmetric": W4 | {"symmetric": False},
    "whole rows": W4 | {"group_size": -1},
    "8 bits, whole rows": W4 | {"bits": 8, "group_size": -1},
    "8 bits, asymmetric": W4 | {"bits": 8, "symmetric": False},
    "3 bits": W4 | {"bits": 3},
    "2 bits": W4 | {"bits": 2, "group_size": 64},
    "mixed, q apart from k and v": W4 | {"overrides": {"*.q_proj": {"bits": 8}, "*.down_proj": {"group_size": 64}}},
    "ignored": W4 | {"ignore": ["*.down_proj"]},
    "head": W4 | {"lm_head": True},
    "embeddings": W4 | {"embeddings": True},
    "rounded inputs": {"method": "dynamic"},
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = find_program(PROGRAM, os.environ.get("DSCOMPRESS_OPENVINO"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


def exported(folder: Path, output: Path, engine: Engine, **options: Any) -> Written:
    return export_openvino(folder, output, engine, reporter=Reporter(quiet=True), **options)


def check(
    folder: Path, written: Written, engine: Engine, timing: Timing | None = None, other_tokens: bool = False
) -> None:
    codes = written.codes
    checks, pace = check_in_openvino(folder, written.folder, engine, len(codes), codes.other, timing)
    found = {each.name: each for each in checks}
    wanted = {"tokens", "openvino"} | ({"codes"} if len(codes) else set()) | ({"as it runs here"} if timing else set())
    assert found.keys() == wanted, checks
    assert {name for name, each in found.items() if not each.passed} == ({"tokens"} if other_tokens else set()), checks
    assert found["openvino"].detail.endswith("of 16 tokens it goes on with, the first 16 are ours")
    assert (pace is not None) == (timing is not None)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family(name: str, engine: Engine, tmp_path: Path) -> None:
    """With codes: matrices that have none are the dense ones.

    transformers 5.0 makes the tokenizer of a qwen2 model anew as Qwen2's, which the one here is not: that is found.
    """
    family, config = FAMILIES[name]
    dense = make_model(tmp_path / "model", family, intermediate_size=128, **config)
    folder = onnx_files.quantized(dense, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    assert len(written.codes) == {"phi3": 8, "gpt_neox": 8, "opt": 12}.get(family, 14)
    check(folder, written, engine, other_tokens=family == "qwen2")


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_of_codes(name: str, engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **LAYOUTS[name])
    written = exported(folder, tmp_path / "out", engine)
    assert len(written.codes) == {"head": 43, "embeddings": 43, "ignored": 36}.get(name, 42)
    check(folder, written, engine)


@pytest.mark.parametrize("kind", ["auto", "f32"])
def test_a_dense_model(kind: str, engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    written = exported(tiny_model, tmp_path / "out", engine, kind=kind)
    parameters = sum(info.bytes // 2 for info in Checkpoint(tiny_model).tensors.values())
    data = (written.folder / "openvino_model.bin").stat().st_size
    assert data / parameters == pytest.approx({"auto": 2, "f32": 4}[kind], rel=0.01)
    check(tiny_model, written, engine, Timing(32, 4, 1))


def test_codes_of_a_llama_and_how_it_runs(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    check(folder, written, engine, Timing(32, 4, 1))
    tokens = probe_tokens(folder, False).tolist()
    as_made = ask_openvino(written.folder, engine, tokens, exact=False)
    assert not isinstance(as_made, str) and as_made.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] == "0"
    rounded = exported(folder, tmp_path / "rounded", engine, int8_inputs=True)
    as_usual = ask_openvino(rounded.folder, engine, tokens, exact=False)
    assert not isinstance(as_usual, str) and as_usual.options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] != "0"


def test_a_code_that_is_another_is_found(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    module = "model.layers.2.mlp.up_proj"
    matrix = DequantizedCheckpoint(Checkpoint(folder)).quantized(module)
    assert isinstance(matrix, Quantized)
    signed = matrix.codes.flatten() ^ 8
    packed = (signed[0::2] | (signed[1::2] << 4)).numpy().tobytes()
    data = tmp_path / "out" / "openvino_model.bin"
    raw = bytearray(data.read_bytes())
    raw[raw.index(packed) + 1000] ^= 1
    data.write_bytes(raw)
    changed = ask_openvino(written.folder, engine, probe_tokens(folder, False).tolist())
    assert not isinstance(changed, str) and written.codes.other(changed.codes) == [module]


def test_what_optimum_intel_says_is_quoted(engine: Engine, tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DscompressError, match=r"model: optimum-intel with OpenVINO .* ended without an answer \(\w+: "):
        exported(folder, tmp_path / "out", engine)
    assert not (tmp_path / "out").exists()


def test_the_line_that_is_told_runs(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    written = exported(tiny_model, tmp_path / "it's here", engine)
    line = shlex.split(dict(written.facts())["run"])
    assert line[0] == "python"
    done = subprocess.run([engine.python, *line[1:]], capture_output=True, text=True, check=True)
    assert len(done.stdout) > 40


def test_optimum_intel_opens_it(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    tokens = probe_tokens(folder, False).tolist()[:32]
    ours = ask_openvino(written.folder, engine, tokens)
    assert not isinstance(ours, str)
    script = (
        "import sys, json, torch; from optimum.intel import OVModelForCausalLM; "
        "model = OVModelForCausalLM.from_pretrained(sys.argv[1], ov_config={'INFERENCE_PRECISION_HINT': 'f32'}); "
        "ids = torch.tensor([json.loads(sys.argv[2])]); "
        "print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, "
        "do_sample=False)[0, ids.shape[1]:].tolist())"
    )
    command = [engine.python, "-c", script, written.folder, str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(ours.continuation)
