"""Every family and layout of codes that is exported to ONNX, built and opened by the real ONNX Runtime GenAI.

`make clients` installs it. What is built is exact: log-probabilities within 1e-3 nats of our reader.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import onnx_files
import pytest
from command import invoke
from random_models import make_model

from compress.evaluation.onnx_runtime import PROGRAM, ask_onnx_runtime, check_in_onnx_runtime
from compress.evaluation.verify import probe_tokens
from compress.exports.onnx.build import Written, export_onnx
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.packing import pack_rows
from compress.model.checkpoint import Checkpoint
from compress.quant.grid import Quantized
from compress.records import Report
from compress.system.programs import Engine, find_program
from compress.system.progress import Reporter

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
ROPE = {"rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3", **ROPE, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SOFT = {"final_logit_softcapping": 20.0, "attn_logit_softcapping": 40.0, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama with a head of its own": ("llama", {"tie_word_embeddings": False}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with scaled positions": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with an idle window": ("mistral", {"sliding_window": 4096}),
    "qwen2": ("qwen2", {}),
    "qwen2 with linear positions": ("qwen2", {"rope_parameters": {"rope_type": "linear", **ROPE, "factor": 4.0}}),
    "qwen2 with a window": ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3 with wide heads": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", SOFT | {"sliding_window": 16}),
    "gemma2 with a long window": ("gemma2", SOFT | {"sliding_window": 4096}),
    "phi3": ("phi3", {"sliding_window": None, "original_max_position_embeddings": 128}),
}
W4 = {"method": "rtn", "bits": 4, "group_size": 32}
DENSE_ALONE = ("phi3", "mistral with an idle window", "gemma2 with a long window")
LAYOUTS: dict[str, dict[str, Any]] = {
    "compressed-tensors": W4,
    "gptq": W4 | {"format": "gptq"},
    "asymmetric": W4 | {"symmetric": False},
    "8 bits, whole rows": W4 | {"bits": 8, "group_size": -1},
    "3 bits": W4 | {"bits": 3},
    "2 bits": W4 | {"bits": 2, "group_size": 64},
    "mixed, q apart from k and v": W4 | {"overrides": {"*.q_proj": {"bits": 8}, "*.down_proj": {"group_size": 64}}},
    "head": W4 | {"lm_head": True},
    "embeddings": W4 | {"embeddings": True},
    "rounded inputs": {"method": "dynamic"},
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = find_program(PROGRAM, os.environ.get("DSCOMPRESS_ORT"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


def exported(folder: Path, output: Path, engine: Engine, **options: Any) -> Written:
    return export_onnx(folder, output, engine, reporter=Reporter(quiet=True), **options)


def check(folder: Path, written: Written, engine: Engine, **options: Any) -> None:
    codes = written.codes
    checks, _ = check_in_onnx_runtime(folder, written.folder, engine, len(codes), codes.other, **options)
    assert {each.name for each in checks} >= {"tokens", "onnx runtime"} | ({"codes"} if len(codes) else set())
    assert all(each.passed for each in checks), checks
    if not options:
        assert checks[-1].detail.endswith("of 16 tokens it goes on with, the first 16 are ours")


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_dense(name: str, engine: Engine, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    folder = make_model(tmp_path / "model", family, intermediate_size=128, **config)
    check(folder, exported(folder, tmp_path / "out", engine), engine)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in DENSE_ALONE])
def test_each_family_with_codes(name: str, engine: Engine, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    dense = make_model(tmp_path / "model", family, intermediate_size=128, **config)
    folder = onnx_files.quantized(dense, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    assert len(written.codes) == 14
    check(folder, written, engine)


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_of_codes(name: str, engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **LAYOUTS[name])
    written = exported(folder, tmp_path / "out", engine)
    assert len(written.codes) == 42 + (name == "head")
    check(folder, written, engine)


def test_inputs_in_8_bits(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine, int8_inputs=True)
    check(folder, written, engine, int8_inputs=True)


def test_a_code_that_is_another_is_found(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    folder = onnx_files.quantized(tiny_model, tmp_path / "work", **W4)
    written = exported(folder, tmp_path / "out", engine)
    answer = ask_onnx_runtime(written.folder, engine, probe_tokens(folder, False).tolist())
    assert not isinstance(answer, str) and written.codes.other(answer.nodes) == []
    module = "model.layers.2.mlp.up_proj"
    packed = DequantizedCheckpoint(Checkpoint(folder)).quantized(module)
    assert isinstance(packed, Quantized)
    data = tmp_path / "out" / "model.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[raw.index(pack_rows(packed.codes, 4).numpy().tobytes()) + 1000] ^= 1
    data.write_bytes(raw)
    changed = ask_onnx_runtime(written.folder, engine, probe_tokens(folder, False).tolist())
    assert not isinstance(changed, str) and written.codes.other(changed.nodes) == [module]


def test_the_bundled_recipe_leaves_a_folder_that_computes_the_same(
    engine: Engine, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    smaller = ["calibration.samples=4", "calibration.sequence_length=128", "evaluate=false"]
    smaller += [f"export.0={{to: onnx, python: {engine.python}}}"]
    options = [option for value in smaller for option in ("--set", value)]
    done = invoke("run", "8b_onnx_int4", "--model", tiny_model, "--device", "cpu", *options)
    assert done.exit_code == 0, done.stderr
    output = tmp_path / "outputs" / "8b_onnx_int4"
    (found,) = Report.model_validate_json((output / "report.json").read_bytes()).exports
    assert found.passed and found.carried == 42 and found.version == engine.version and found.pace is not None
    assert {check.name for check in found.checks} == {"codes", "tokens", "onnx runtime"}
    answer = ask_onnx_runtime(output / "onnx", engine, probe_tokens(output, False).tolist())
    assert not isinstance(answer, str) and len(answer.nodes) == 30  # q, k and v of a layer are joined
    assert invoke("verify", output).exit_code == 0
    data = output / "onnx" / "model.onnx.data"
    data.unlink()
    done = invoke("verify", output)
    assert done.exit_code == 1 and "FAIL files: changed since they were written: onnx/model.onnx.data" in done.stdout


def test_the_line_that_is_told_runs(engine: Engine, tmp_path: Path, tiny_model: Path) -> None:
    written = exported(tiny_model, tmp_path / "it's here", engine)
    line = shlex.split(dict(written.facts())["run"])
    assert line[0] == "python"
    done = subprocess.run([engine.python, *line[1:]], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Once upon a time") and len(done.stdout) > 40
    shutil.rmtree(written.folder)
