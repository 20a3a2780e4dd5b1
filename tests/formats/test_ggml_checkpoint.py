"""Blocks in a safetensors file, read back, and what is said of files that don't fit their config."""

import json
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from safetensors.torch import save_file

from compress.errors import ModelError
from compress.formats.gguf import PARTS, describe, pack_module, quantization_config, scheme_of, unpack_module
from compress.model.checkpoint import Checkpoint, TensorInfo
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant.block_gptq import block_rtn

MODULE = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("kind", BLOCK_TYPES.values(), ids=BLOCK_TYPES)
def test_a_file_gives_back_the_matrix(kind: BlockType, tmp_path: Path) -> None:
    matrix = block_rtn(torch.randn(3, 512, generator=torch.Generator().manual_seed(0)), torch.ones(512), kind)
    tensors = pack_module(matrix)
    assert tuple(tensors) == PARTS
    save_file({f"{MODULE}.{part}": tensor for part, tensor in tensors.items()}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": quantization_config({MODULE: kind})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    infos = {name.rpartition(".")[2]: info for name, info in checkpoint.tensors.items()}
    scheme = scheme_of(checkpoint.config["quantization_config"], MODULE)
    assert scheme is not None and scheme_of(checkpoint.config["quantization_config"], "lm_head") is None
    assert describe(infos, scheme) is kind
    loaded = {part: checkpoint.load([f"{MODULE}.{part}"])[f"{MODULE}.{part}"] for part in PARTS}
    theirs = dequantize(loaded["weight_blocks"].numpy(), GGMLQuantizationType(kind.number))
    assert torch.equal(unpack_module(loaded, kind).dequantize(), torch.from_numpy(theirs))


@pytest.mark.parametrize(
    "stored, dtype, shape, words",
    [
        ("q4_k", "U8", (3, 145), r"weight_blocks U8 of shape \[3, 145\] does not hold whole blocks of q4_k"),
        ("q4_k", "I8", (3, 144), "weight_blocks I8 of shape"),
        ("q4_k", "U8", (144,), "does not hold whole blocks"),
        ("iq1_s", "U8", (3, 144), "has blocks of type iq1_s, which can't be read; readable are q4_0, q4_1"),
    ],
)
def test_what_does_not_fit_is_refused(stored: str, dtype: str, shape: tuple[int, ...], words: str) -> None:
    info = TensorInfo(Path("model.safetensors"), "", dtype, shape, 0, 0)
    with pytest.raises(ModelError, match=words):
        describe({"weight_blocks": info}, {"type": stored})
