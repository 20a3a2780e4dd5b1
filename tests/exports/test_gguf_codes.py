"""Quantized checkpoints as GGUF files: the same codes in ggml's blocks where they fit, said where they don't."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exported import written
from hypothesis import given
from hypothesis import strategies as st
from quantized import quantize
from random_models import make_model, random_tokens
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.evaluation.llama_cpp import LlamaAnswer, ask_llama_cpp, llama_cpp_missing
from compress.evaluation.verify import own_logits
from compress.exports.gguf.blocks import as_blocks
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.ggml import pack
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.quant.grid import Grid, Quantized
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.system.progress import Reporter

CPU = torch.device("cpu")
Spec = dict[str, Any]
Make = Callable[[Spec], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A quantized Llama with heads of its own width; made once for each spec."""
    dense = make_model(tmp_path_factory.mktemp("dense") / "model", intermediate_size=128, tie_word_embeddings=True)
    found: dict[str, Path] = {}

    def make(spec: Spec) -> Path:
        if str(spec) not in found:
            work = tmp_path_factory.mktemp("quantized")
            kind = WeightActivationStage if spec.get("method") in ("dynamic", "static") else WeightOnlyStage
            tokens = TokenSet(random_tokens(2, 24, 1), "random", "random", None)
            context = Context(CPU, torch.float32, tokens, random_tokens(1, 8, 2), Reporter(quiet=True), False)
            quantize(kind(kind="quantize", **spec), Checkpoint(dense), work, context)
            found[str(spec)] = work / "checkpoint"
        return found[str(spec)]

    return make


def in_halves(rows: np.ndarray[Any, Any], heads: int) -> Tensor:
    """Rows of a matrix [O, I] of q or k, from pairs back to transformers' halves."""
    values = torch.from_numpy(rows.copy())
    return values.view(heads, -1, 2, values.shape[1]).transpose(1, 2).reshape(values.shape)


def dequantized(file: Path) -> dict[str, Tensor]:
    """Matrices by their names in the file, float32, as the gguf package reads them; q and k in transformers' order."""
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        if len(tensor.shape) < 2:
            continue
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        heads = {"attn_q": 4, "attn_k": 2}.get(tensor.name.split(".")[-2], 0)
        found[tensor.name] = in_halves(values, heads) if heads else torch.from_numpy(values.copy())
    return found


NAMES = {
    "blk.1.attn_q.weight": "model.layers.1.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.1.attn_v.weight": "model.layers.1.self_attn.v_proj.weight",
    "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
}
EXACT: dict[str, tuple[Spec, str]] = {
    "W4 g32": ({"method": "rtn", "bits": 4, "group_size": 32}, "Q4_0"),
    "W4 g64": ({"method": "rtn", "bits": 4, "group_size": 64}, "Q4_0"),
    "W3 g32": ({"method": "rtn", "bits": 3, "group_size": 32}, "Q4_0"),
    "W8 g32": ({"method": "rtn", "bits": 8, "group_size": 32}, "Q8_0"),
    "W8 by rows": ({"method": "rtn", "bits": 8, "group_size": -1}, "Q8_0"),
    "gptq W4 g32": ({"method": "rtn", "bits": 4, "group_size": 32, "format": "gptq"}, "Q4_0"),
    "int8 inputs": ({"method": "dynamic", "dtype": "int8"}, "Q8_0"),
}


@pytest.mark.parametrize("name", EXACT)
def test_symmetric_codes_are_carried_over_to_the_bit(name: str, made: Make, tmp_path: Path) -> None:
    spec, type = EXACT[name]
    folder = made(spec)
    done = written(folder, tmp_path / "model.gguf", "auto")
    assert done.carried == 14 and done.types[type] == 14
    assert done.types["BF16"] == 1  # embeddings
    view, values = DequantizedCheckpoint(Checkpoint(folder)), dequantized(tmp_path / "model.gguf")
    for ours, theirs in NAMES.items():
        assert torch.equal(values[ours], view.load([theirs])[theirs])
    assert bool(done.remarks) == (name == "int8 inputs")


def test_zero_points_become_offsets(made: Make, tmp_path: Path) -> None:
    """The codes and steps are the same; the value of code 0 is rounded to float16."""
    folder = made({"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False})
    done = written(folder, tmp_path / "model.gguf", "auto")
    assert done.carried == done.types["Q4_1"] == 14
    view = DequantizedCheckpoint(Checkpoint(folder))
    matrix = view.quantized("model.layers.0.mlp.down_proj")
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    blocks = reader["blk.0.ffn_down.weight"].data.reshape(64, 4, 20)
    low, high = blocks[..., 4:] & 15, blocks[..., 4:] >> 4
    assert np.array_equal(np.concatenate([low, high], -1).reshape(64, 128), matrix.codes.numpy())
    d, m = (np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0] for at in (0, 2))
    assert np.array_equal(d.astype(np.float64), matrix.scale.double().numpy())
    offset = -(matrix.zero.double() * matrix.scale.double()).numpy()
    assert np.array_equal(m, offset.astype(np.float16))
    values = dequantized(tmp_path / "model.gguf")
    for ours, theirs in NAMES.items():
        matrix = view.quantized(theirs.removesuffix(".weight"))
        largest = (matrix.zero.float() * matrix.scale.float()).abs().max()
        assert (values[ours] - matrix.dequantize()).abs().max() <= 2**-11 * largest


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"method": "dynamic", "dtype": "fp8"}, "auto"),
        ({"method": "rtn", "bits": 8, "group_size": 32, "symmetric": False}, "auto"),
        ({"method": "rtn", "bits": 4, "group_size": 32}, "bf16"),
    ],
    ids=["fp8", "W8 with zero points", "asked for bf16"],
)
def test_other_codes_are_dequantized_and_that_is_said(spec: Spec, kind: str, made: Make, tmp_path: Path) -> None:
    folder = made(spec)
    done = written(folder, tmp_path / "model.gguf", kind)
    assert done.carried == 0 and done.types["BF16"] == 15
    said = [line for line in done.remarks if "quantized matrices" in line]
    assert len(said) == 1 and "14" in said[0] and "BF16" in said[0] and "kB in all" in said[0]
    view = DequantizedCheckpoint(Checkpoint(folder)).running_in(torch.bfloat16)
    values = dequantized(tmp_path / "model.gguf")
    for ours, theirs in NAMES.items():
        assert torch.equal(values[ours].bfloat16(), view.load([theirs])[theirs].bfloat16())


@pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")
@pytest.mark.parametrize("name", ["W4 g32", "W8 g32", "gptq W4 g32"])
def test_llama_cpp_computes_with_the_codes(name: str, made: Make, tmp_path: Path) -> None:
    """Its inputs have 8 bits: closer to our reader of the codes than the model before quantization is."""
    folder = made(EXACT[name][0])
    tokens = random_tokens(1, 48)[0]
    answer = ask_llama_cpp(written(folder, tmp_path / "m.gguf", "auto").files[0], tokens.tolist(), new_tokens=0)
    assert isinstance(answer, LlamaAnswer), answer
    own = own_logits(Checkpoint(folder), tokens, CPU, torch.float32, False)
    apart = (answer.logits.log_softmax(-1) - own.log_softmax(-1)).abs().mean()
    other = own_logits(Checkpoint(folder), tokens.roll(1), CPU, torch.float32, False)
    assert apart <= 0.1 * (other.log_softmax(-1) - own.log_softmax(-1)).abs().mean()


def matrix(codes: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> Quantized:
    return Quantized(codes, scale, zero, Grid(bits, codes.shape[1] // scale.shape[1], symmetric, scale.dtype))


@given(st.integers(2, 8), st.integers(1, 3), st.integers(0, 2**32 - 1), st.booleans())
def test_any_codes_and_scales_that_float16_holds(bits: int, repeat: int, seed: int, turned: bool) -> None:
    """To the bit; rows in any order; extremes of codes and of scales, zeros and both signs."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (6, 2 * 32 * repeat), generator=draw, dtype=torch.uint8)
    codes[0] = 2 ** (bits - 1)  # a row of zeros
    codes[1, :32], codes[1, 32:] = 0, 2**bits - 1
    bits16 = torch.randint(-(2**15), 2**15, (6, 2), generator=draw, dtype=torch.int16)
    scale = bits16.view(torch.float16)
    scale = torch.where(scale.isfinite(), scale, torch.full_like(scale, 65504.0))
    order = torch.randperm(6, generator=draw) if turned else None
    whole = matrix(codes, scale, torch.full((6, 2), 2 ** (bits - 1), dtype=torch.uint8), bits, True)
    blocked = as_blocks(whole, order)
    assert blocked is not None
    kind = gguf.GGMLQuantizationType(blocked.type.number)
    read = torch.from_numpy(gguf.dequantize(pack(blocked).numpy(), kind))
    expected = whole.dequantize()
    assert torch.equal(read, expected if order is None else expected[order])


@pytest.mark.parametrize("scale", [1e-30, 3e-8, 1.0009765625e-4, 1e5])
def test_scales_that_float16_does_not_hold(scale: float) -> None:
    """But for a group of zeros, whose scale makes no difference."""
    codes = torch.full((1, 64), 8, dtype=torch.uint8)
    scales = torch.tensor([[scale, 0.5]])
    zero = torch.full((1, 2), 8, dtype=torch.uint8)
    blocked = as_blocks(matrix(codes, scales, zero, 4, True))
    assert blocked is not None and not blocked.dequantize().any()
    codes[0, 5] = 9
    assert as_blocks(matrix(codes, scales, zero, 4, True)) is None


def test_grids_that_ggml_has_not() -> None:
    codes, zero = torch.zeros(2, 64, dtype=torch.uint8), torch.zeros(2, 4, dtype=torch.uint8)
    assert as_blocks(matrix(codes, torch.ones(2, 4), zero, 4, True)) is None  # groups of 16
    assert as_blocks(matrix(codes, torch.ones(2, 2), zero[:, :2], 8, False)) is None
