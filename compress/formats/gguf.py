"""Matrices on ggml's block grids inside a safetensors checkpoint, byte for byte as a GGUF file will have them.

A quantized module keeps one tensor, `weight_blocks`, and `quantization_config` names the block type of each. No other
program opens such a folder: it is what a stage leaves for the writer of the .gguf file.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compress.errors import ModelError
from compress.formats.base import Format, Infos, Scheme
from compress.formats.ggml import pack, unpack
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant.blocks import Blocked

PARTS = ("weight_blocks",)
METHOD = "gguf"


def pack_module(matrix: Blocked) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it: weight_blocks uint8 [O, I / width * bytes of a block]."""
    return {"weight_blocks": pack(matrix)}


def unpack_module(tensors: Mapping[str, Tensor], kind: BlockType) -> Blocked:
    """The matrix that `pack_module` gave as these tensors."""
    return unpack(tensors["weight_blocks"], kind)


def quantization_config(types: Mapping[str, BlockType]) -> dict[str, Any]:
    """The `quantization_config` of config.json, for the block type of every quantized module."""
    return {"quant_method": METHOD, "types": {module: kind.name for module, kind in types.items()}}


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme | None:
    """What a `quantization_config` says of a module; None where it keeps its weights."""
    kind = config.get("types", {}).get(module)
    return None if kind is None else {"type": kind}


def describe(infos: Infos, scheme: Scheme) -> BlockType:
    """The block type of a module in a file.

    Args:
        infos: headers of its tensors, by their names inside the module.
        scheme: what the config says of it.

    Raises:
        ModelError: a type that is unknown, or a tensor that doesn't hold whole blocks of it, as a predicate.
    """
    kind = BLOCK_TYPES.get(scheme["type"])
    if kind is None:
        known = ", ".join(BLOCK_TYPES)
        raise ModelError(f"has blocks of type {scheme['type']}, which can't be read; readable are {known}")
    blocks = infos["weight_blocks"]
    if blocks.dtype != "U8" or len(blocks.shape) != 2 or blocks.shape[1] % kind.bytes:
        raise ModelError(
            f"weight_blocks {blocks.dtype} of shape {list(blocks.shape)} does not hold whole blocks of {kind.name} "
            f"({kind.bytes} bytes); get the files again"
        )
    return kind


FORMAT = Format(
    name=METHOD,
    parts=PARTS,
    pack=pack_module,
    unpack=unpack_module,
    describe=lambda infos, shape, scheme: describe(infos, scheme),
    config=lambda types, unquantized, embeddings, inputs, cache: quantization_config(types),
)
