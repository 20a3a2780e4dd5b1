"""Checkpoints as folders for ONNX Runtime GenAI: what its builder is given to read, and what is refused before.

tests/clients has the real builder and runtime; here a stand-in keeps what it was given.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import invoke
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import builder, quantized
from random_models import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.errors import DscompressError, ModelError, OutputError
from compress.exports.marked import MARK
from compress.exports.onnx.build import Written, export_onnx
from compress.exports.onnx.codes import Digests, grid_of, laid_out, pack
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint
from compress.quant.grid import Grid, Quantized
from compress.system.progress import Reporter

Made = Callable[..., Path]
W4 = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "model", intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The model quantized; made once for each spec."""
    found: dict[str, Path] = {}

    def make(**spec: Any) -> Path:
        if str(spec) not in found:
            found[str(spec)] = quantized(dense, tmp_path_factory.mktemp("quantized"), **spec)
        return found[str(spec)]

    return make


def exported(folder: Path, tmp_path: Path, **options: Any) -> Written:
    return export_onnx(folder, tmp_path / "out", builder(tmp_path / "python"), reporter=Reporter(quiet=True), **options)


def read(written: Written) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors that the builder was given."""
    folder = written.folder / "read"
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def options(written: Written) -> set[str]:
    return set((written.folder / "command").read_text().split("--extra_options ")[1].split())


def numbers(tensors: dict[str, Tensor], bits: int, block: int) -> np.ndarray[Any, Any]:
    """The matrix [O, I] that ONNX Runtime's documentation says these mean, in float32 by float64."""
    rows = tensors["qweight"].shape[0]

    def each(packed: Tensor, count: int) -> np.ndarray[Any, Any]:
        spread = np.unpackbits(packed.numpy(), axis=1, bitorder="little").reshape(rows, -1, bits)
        return (spread.astype(np.int64) << np.arange(bits)).sum(-1)[:, :count]

    scales = tensors["scales"].numpy().astype(np.float64)
    codes = each(tensors["qweight"], tensors["qweight"].shape[1] * 8 // bits).reshape(rows, scales.shape[1], block)
    zeros = each(tensors["qzeros"], scales.shape[1])
    return ((codes - zeros[..., None]) * scales[..., None]).reshape(rows, -1).astype(np.float32)


@given(data=st.data(), bits=st.sampled_from((2, 3, 4, 8)), width=st.sampled_from((16, 32, 48, 64, 512, -1)))
def test_what_is_laid_out_anew_means_the_same_numbers(data: st.DataObject, bits: int, width: int) -> None:
    rows, groups = data.draw(st.integers(1, 5)), 1 if width == -1 else data.draw(st.integers(1, 3))
    columns = groups * (data.draw(st.sampled_from((16, 96, 256))) if width == -1 else width)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    grid = Grid(bits, width, False)
    matrix = Quantized(
        codes=torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8),
        scale=torch.randn(rows, groups, generator=generator).to(torch.bfloat16),
        zero=torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8),
        grid=grid,
    )
    laid = grid_of(grid, columns)
    assert isinstance(laid, Grid) and laid.bits in (2, 4, 8) and laid.group_size in (16, 32, 64, 128, 256)
    assert np.array_equal(
        numbers(pack(laid_out(matrix, laid)), laid.bits, laid.group_size), matrix.dequantize().numpy()
    )


@pytest.mark.parametrize(
    "spec",
    [W4, W4 | {"format": "gptq"}, W4 | {"symmetric": False}, W4 | {"bits": 3, "group_size": -1},
     W4 | {"overrides": {"*.down_proj": {"bits": 8, "group_size": 64}}}, W4 | {"lm_head": True}],
    ids=["compressed-tensors", "gptq", "asymmetric", "3 bits, whole rows", "mixed", "head"],
)  # fmt: skip
def test_the_builder_is_given_the_codes_that_the_checkpoint_has(
    made: Made, tmp_path: Path, spec: dict[str, Any]
) -> None:
    folder = made(**spec)
    written = exported(folder, tmp_path)
    config, tensors = read(written)
    view = DequantizedCheckpoint(Checkpoint(folder)).unrounded()
    schemes = config["quantization_config"]["overrides"]
    assert config["quantization_config"]["quant_method"] == "olive" and set(schemes) == set(view.grids)
    assert len(written.codes) == len(view.grids)
    wanted = view.load(view.tensors)
    for module, scheme in schemes.items():
        parts = {part: tensors.pop(f"{module}.{part}") for part in ("qweight", "scales", "qzeros")}
        means = numbers(parts, scheme["bits"], scheme["group_size"])
        assert np.array_equal(means, wanted.pop(f"{module}.weight").numpy()), module
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_nothing_more_is_rounded_than_the_checkpoint_did(made: Made, tmp_path: Path) -> None:
    folder = made(**W4)
    exact = exported(folder, tmp_path)
    assert options(exact) == {
        "hf_token=false", "shared_embeddings=true", "windowed_kv_cache=false", "accuracy_level=1",
        "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather",
    }  # fmt: skip
    assert "-p int4 -e cpu" in (exact.folder / "command").read_text()
    assert "accuracy_level=4" in options(exported(folder, tmp_path, int8_inputs=True))
    assert "shared_embeddings=false" in options(exported(made(**W4, lm_head=True), tmp_path))


def test_a_dense_checkpoint_is_read_as_it_is(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    config, tensors = read(written)
    stored = load_file(dense / "model.safetensors")
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert (config["dtype"], config["architectures"]) == ("bfloat16", ["LlamaForCausalLM"])
    assert "-p fp32" in (written.folder / "command").read_text() and len(written.codes) == 0
    assert options(written) == {"hf_token=false", "shared_embeddings=true", "windowed_kv_cache=false"}
    assert (written.folder / "read" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()


def test_a_head_that_is_no_copy_is_not_shared(dense: Path, tmp_path: Path) -> None:
    """config.json says tied, and a head with other values is stored, which transformers keeps."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((dense / name).read_bytes())
    tensors = load_file(dense / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}, other / "model.safetensors")
    assert "shared_embeddings=false" in options(exported(other, tmp_path))


def test_codes_become_weights_on_request(made: Made, tmp_path: Path) -> None:
    folder = made(**W4)
    written = exported(folder, tmp_path, kind="f32")
    config, tensors = read(written)
    view = DequantizedCheckpoint(Checkpoint(folder))
    wanted = view.load(view.tensors)
    assert "quantization_config" not in config and config["dtype"] == "float32" and len(written.codes) == 0
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert written.remarks[0].startswith("14 quantized matrices are written as float32: ")


def test_norms_to_which_one_is_added_are_given_in_float32(tmp_path: Path) -> None:
    gemma = make_model(tmp_path / "gemma", "gemma", intermediate_size=128)
    assert read(exported(gemma, tmp_path))[0]["dtype"] == "float32"
    tensors = read(exported(quantized(gemma, tmp_path / "work", **W4), tmp_path))[1]
    assert tensors["model.norm.weight"].dtype == torch.float32


REMARKS: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": (W4 | {"bits": 3}, "3-bit codes of 14 matrices take the next of (2, 4, 8) bits each; none changes"),
    "8 bits": (W4 | {"bits": 8}, "codes of 2 and 8 bits are slow with inputs in float32; --int8-inputs makes them"),
    "rounded inputs": ({"method": "dynamic"}, "the checkpoint rounds the inputs of linears to 8 bits by its own"),
    "embeddings": (W4 | {"embeddings": True}, "model.embed_tokens is written as float32: the builder knows no codes"),
}


def test_a_large_head_is_told_where_codes_would_be_smaller(made: Made, tmp_path: Path) -> None:
    """Of a tied model the head costs nothing: the embeddings are there in float32 anyway."""
    dense = make_model(tmp_path / "untied", intermediate_size=128, tie_word_embeddings=False)
    untied = exported(quantized(dense, tmp_path / "work", **W4), tmp_path)
    assert len(untied.remarks) == 1
    assert untied.remarks[0].startswith("1.05 MB of 5 B is the output head in float32; `lm_head: true` in the recipe's")
    assert exported(made(**W4), tmp_path).remarks == []


@pytest.mark.parametrize("case", REMARKS)
def test_what_is_not_as_in_the_checkpoint_is_said(made: Made, tmp_path: Path, case: str) -> None:
    spec, line = REMARKS[case]
    assert any(each.startswith(line) for each in exported(made(**spec), tmp_path).remarks)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("gemma3_text", {}, "builder does not make 'gemma3_text' models rightly; supported: llama, mistral"),
    "positions": ("llama", {"rope_parameters": LINEAR}, "rope_type linear: ONNX Runtime GenAI's builder computes"),
    "yarn": ("qwen2", {"rope_parameters": YARN}, "rope_type yarn: ONNX Runtime GenAI's builder computes default"),
    "heads": ("llama", {"head_dim": 8}, "head_dim 8: ONNX Runtime's attention takes multiples of 16; use --to gguf"),
    "window": ("mistral", {"sliding_window": 32}, "sliding_window 32: ONNX Runtime GenAI's builder makes mistral"),
    "longer": ("phi3", {"original_max_position_embeddings": 64}, "original_max_position_embeddings 64: "),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_builder_makes_otherwise_is_refused_by_name(tmp_path: Path, case: str) -> None:
    family, config, message = REFUSED[case]
    folder = make_model(tmp_path / "model", family, **config)
    with pytest.raises(ModelError) as caught:
        exported(folder, tmp_path)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_codes_that_it_can_not_have_are_refused_by_name(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"down_proj and 1 more linears kept their weights, and ONNX .* or use --type"):
        exported(made(**W4, ignore=["*.down_proj"]), tmp_path)
    with pytest.raises(ModelError, match="has float8 weights, and MatMulNBits takes whole numbers; use --type f32"):
        exported(made(method="dynamic", dtype="fp8"), tmp_path)
    with pytest.raises(ModelError, match="has no codes here, and ONNX Runtime rounds inputs only of linears that do"):
        exported(made(**W4), tmp_path, kind="f32", int8_inputs=True)
    phi = make_model(tmp_path / "phi", "phi3", original_max_position_embeddings=128, intermediate_size=128)
    with pytest.raises(ModelError, match="builder misreads codes of a Phi3ForCausalLM; use --type f32 or --to gguf"):
        exported(quantized(phi, tmp_path / "work", **W4), tmp_path)
    assert grid_of(Grid(4, 24, True), 48) == (
        "has groups of 24 columns, and MatMulNBits takes 16, 32, 64, 128 or 256, or multiples of them"
    )


FAILURES = {
    "echo loading; echo 'KeyError: 1' >&2; exit 1": (
        DscompressError,
        "ONNX Runtime GenAI 0.18.0's builder ended without an answer (KeyError: 1)",
    ),
    "exit 0": (DscompressError, "builder ended without a model"),
    "kill -9 $$": (DscompressError, "builder stopped by signal 9"),
    "echo 'OSError: [Errno 28] No space left on device'; exit 1": (OutputError, "out: no space left on the disk"),
}


@pytest.mark.parametrize("more", FAILURES)
def test_where_the_builder_fails_nothing_is_left_and_what_was_there_stays(
    dense: Path, tmp_path: Path, more: str
) -> None:
    exported(dense, tmp_path)
    (tmp_path / "out" / "old").touch()
    kind, message = FAILURES[more]
    with pytest.raises(kind) as caught:
        export_onnx(dense, tmp_path / "out", builder(tmp_path / "python", more), reporter=Reporter(quiet=True))
    assert type(caught.value) is kind and message in str(caught.value)
    assert (tmp_path / "out" / "old").exists() and {path.name for path in tmp_path.iterdir()} == {"out", "python"}


def test_it_replaces_what_is_ours_and_nothing_else(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    assert json.loads((written.folder / MARK).read_text())["onnxruntime-genai"] == "0.18.0"
    (written.folder / "old").touch()
    assert not (exported(dense, tmp_path).folder / "old").exists()
    (written.folder / MARK).unlink()
    with pytest.raises(OutputError, match="out: exists, and was not written by dscompress; name another folder"):
        exported(dense, tmp_path)


def test_sizes_are_measured(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    sizes = {file.name: file.stat().st_size for file in written.folder.rglob("*") if file.is_file()}
    del sizes[MARK]
    assert (written.bytes, written.weights) == (sum(sizes.values()), 5)


def test_other_codes_are_found_also_where_q_k_and_v_are_joined() -> None:
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, dict[str, Tensor]] = {}
    digests = Digests()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        module = f"model.layers.3.self_attn.{name}"
        sizes = {"qweight": 64, "scales": 4, "qzeros": 2}
        parts[name] = {
            part: torch.randint(0, 255, (8, size), generator=generator, dtype=torch.uint8)
            for part, size in sizes.items()
        }
        digests.add(module, parts[name])

    def node(*names: str) -> tuple[str, ...]:
        joined = [torch.cat([parts[name][part] for name in names]) for part in ("qweight", "scales", "qzeros")]
        return tuple(hashlib.sha256(each.numpy().tobytes()).hexdigest() for each in joined)

    place = "/model/layers.3/attn/{}/MatMulNBits"
    whole = {place.format("qkv_proj"): node("q_proj", "k_proj", "v_proj"), place.format("o_proj"): node("o_proj")}
    assert digests.other(whole) == []
    assert digests.other({place.format(name): node(name) for name in parts}) == []
    qkv = [f"model.layers.3.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    assert digests.other(whole | {place.format("qkv_proj"): node("k_proj", "q_proj", "v_proj")}) == qkv
    assert digests.other({place.format("qkv_proj"): whole[place.format("qkv_proj")]}) == [
        "model.layers.3.self_attn.o_proj"
    ]


# The command


def test_without_the_program(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.system.programs.CLONE", tmp_path)
    monkeypatch.setattr("compress.system.programs.find_spec", lambda name: None)
    done = invoke("export", dense, "--to", "onnx")
    assert done.exit_code == 2 and done.stderr == (
        f"error: --to onnx: ONNX Runtime GenAI is not installed here and there is no .venv-ort in {tmp_path}; "
        "pip install 'dscompress[onnx]', or name the Python of an environment that has it\n"
    )


def test_the_command_says_what_it_wrote(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python = builder(tmp_path / "python").python
    done = invoke("export", dense, "--to", "onnx", "--python", python, "--no-check", "-q")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"folder      {tmp_path / 'model-onnx'}"
    assert lines[1].endswith(" bytes, 5 of them model.onnx and its data)")
    assert lines[2].startswith("run         python -c 'import onnxruntime_genai as og; ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "onnx", "--type", "q8_0"], "--type q8_0: is not known; use auto, f32"),
        (["--to", "onnx", "--split", "1GB"], "--split: is for --to gguf; leave it out"),
        (["--to", "gguf", "--int8-inputs"], "--int8-inputs: is for --to onnx or openvino; leave it out"),
        (["--to", "gguf", "--python", "python"], "--python: is for --to onnx or openvino; leave it out"),
    ],
)
def test_mistakes_are_one_line(dense: Path, arguments: list[str], message: str) -> None:
    done = invoke("export", dense, *arguments)
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", f"error: {message}\n")


def test_a_file_is_in_the_way(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(OutputError, match="out: is a file; name a folder"):
        compress.export(dense, to="onnx", output=tmp_path / "out", python=builder(tmp_path / "python").python)
