"""Bytes of weights, against what a run plans and writes, and against llama.cpp's own block sizes."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from command import invoke
from random_models import make_model
from safetensors import safe_open

import compress
from compress.footprint.precisions import _BLOCKS, PRECISIONS, Precision, Weights, weights_of
from compress.footprint.subject import open_subject
from compress.system.units import size

gguf = pytest.importorskip("gguf")
BY_NAME = {precision.name: precision for precision in PRECISIONS}
STAGES = {
    "int8": "{kind: quantize, method: dynamic, dtype: int8, weight_rounding: rtn}",
    "fp8": "{kind: quantize, method: dynamic, dtype: fp8, weight_rounding: rtn}",
    "int4 g64": "{kind: quantize, method: rtn, bits: 4, group_size: 64}",
    "int4 g128": "{kind: quantize, method: rtn, bits: 4, group_size: 128}",
    "int3 g64": "{kind: quantize, method: rtn, bits: 3, group_size: 64, format: gptq}",
}
PRUNE = "{kind: prune, target: {sparsity: SHARE, of: layers}, axes: [ffn, heads]}"


def recipe(file: Path, model: Path, stages: str) -> Path:
    file.write_text(f"name: x\nmodel: {model}\nstages: [{stages}]\nevaluate: false\noutput: {file.parent / 'out'}\n")
    return file


def made(model: Path | str, name: str) -> Weights:
    found = weights_of(open_subject(str(model)), BY_NAME[name])
    assert isinstance(found, Weights), found
    return found


def dry_run(file: Path) -> list[str]:
    """What each stage comes to."""
    result = invoke("run", file, "--dry-run", "--work-dir", file.parent / "work")
    assert result.exit_code == 0, result.stderr
    return re.findall(r"result +[\d,]+ bytes \((.+?)\),", result.stdout)


@pytest.mark.parametrize("name", STAGES)
def test_bytes_are_those_that_a_run_writes(name: str, tmp_path: Path, tiny_model: Path) -> None:
    file = recipe(tmp_path / "r.yaml", tiny_model, STAGES[name])
    found = made(tiny_model, name)
    assert found.file_bytes is not None
    assert dry_run(file) == [size(found.file_bytes)]
    compress.run(str(file), device="cpu", work_dir=tmp_path / "work")
    stored = 0
    for shard in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            tensors = [opened.get_tensor(each) for each in opened.keys()]  # noqa: SIM118
        stored += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert found.bytes == stored


@pytest.mark.parametrize("share", [0.25, 0.4])
def test_pruned_bytes_are_those_of_the_dry_run(share: float, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8}
    model = make_model(tmp_path / "model", **sizes, num_key_value_heads=4, head_dim=32)
    prune = PRUNE.replace("SHARE", str(share))
    quantized = f"{prune}, {{kind: quantize, method: rtn, bits: 4}}"
    dense, packed = (made(model, f"pruned {100 * share:.0f} %, {kind}") for kind in ("bf16", "int4"))
    assert dry_run(recipe(tmp_path / "r.yaml", model, prune)) == [size(dense.file_bytes or 0)]
    assert dry_run(recipe(tmp_path / "q.yaml", model, quantized))[1] == size(packed.file_bytes or 0)


def test_headers_and_config_agree(tmp_path: Path, tiny_model: Path) -> None:
    for precision in PRECISIONS:
        by_headers = weights_of(open_subject(str(tiny_model)), precision)
        by_config = weights_of(open_subject(str(tiny_model / "config.json")), precision)
        both = [each if isinstance(each, str) else (each.bytes, each.read) for each in (by_headers, by_config)]
        assert both[0] == both[1], precision.name


def test_blocks_are_llama_cpps() -> None:
    for name, block in _BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] == block


def test_bits_of_a_gguf_row_are_near_those_of_its_blocks() -> None:
    subject = open_subject(str(Path(__file__).parent / "configs" / "llama-3.1-8b.json"))
    for precision in PRECISIONS:
        if precision.block is None or precision.block == "q8_0":
            continue
        found = weights_of(subject, precision)
        assert isinstance(found, Weights)
        weights, stored = _BLOCKS[precision.block]
        head = 128256 * 4096
        rest = (subject.parameters - head) * stored / weights + head * 210 / 256
        assert found.bytes == pytest.approx(rest, rel=1e-3)  # norms are in float32


def test_a_token_reads_the_head_and_not_the_embeddings(tmp_path: Path) -> None:
    tied, own = (made(make_model(tmp_path / str(tie), tie_word_embeddings=tie), "bf16") for tie in (True, False))
    assert tied.read == tied.bytes
    assert own.bytes - own.read == own.bytes - tied.bytes == 2 * 4096 * 64


def test_experts_stored_one_by_one_or_joined_are_the_same(tmp_path: Path) -> None:
    more = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "hidden_size": 128}
    folder = make_model(tmp_path / "moe", "qwen3_moe", **more)
    by_headers, by_config = (open_subject(str(path)) for path in (folder, folder / "config.json"))
    assert (by_headers.told, by_config.told, by_headers.experts, by_headers.used) == ("headers", "config", 8, 2)
    for name in ("bf16", "int4 g64", "gguf q8_0"):
        one, other = (weights_of(each, BY_NAME[name]) for each in (by_headers, by_config))
        assert isinstance(one, Weights) and isinstance(other, Weights)
        assert (one.bytes, one.read) == (other.bytes, other.read)
    each = 3 * 128 * 128
    assert by_headers.parameters - by_headers.active == 2 * 6 * each
    with safe_open(next(folder.glob("*.safetensors")), framework="pt") as opened:
        assert by_headers.parameters == sum(math.prod(opened.get_slice(n).get_shape()) for n in opened.keys())  # noqa: SIM118


def test_groups_that_do_not_divide_are_said(tmp_path: Path) -> None:
    found = weights_of(open_subject(str(make_model(tmp_path / "m"))), BY_NAME["int4 g128"])
    assert found == "128 does not divide the width 96"


def test_fp32_keeps_a_cache_of_float32() -> None:
    widths = {precision.name: precision.width for precision in PRECISIONS}
    assert widths.pop("fp32") == 4 and set(widths.values()) == {2}
    assert Precision("fp32", 32).made == "as it is"
