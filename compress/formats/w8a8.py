"""The 8-bit formats of compressed-tensors, `int-quantized` and `float-quantized`: a weight per byte, rounded inputs.

Stock transformers rounds the inputs as it runs (and computes in 16 bits); vLLM multiplies the bytes themselves. As in
`pack_quantized.py` the codes go into the file as they are, and the tests hold that the library writes the same.

What loaders make of it: both open all of it. vLLM's fused modules (`qkv_proj`, `gate_up_proj`) need one scheme for all
of their parts, and its block kernels need widths that 128 divides. Its key-value cache takes a scale per tensor with
every attention backend, and a scale per head with Flash Attention only.
"""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats.base import DTYPES, Format, Infos, Scheme, loaded
from compress.formats.facts import FLOAT_QUANTIZED, INT_QUANTIZED
from compress.formats.patterns import select
from compress.quant.grid import FLOAT8, CacheFakeQuantize, FakeQuantize, Grid, Quantized


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it.

    Returns:
        weight int8 or float8_e4m3fn [O, I]; weight_scale [O, 1] for a scale per row, [1] for one in all, or
        [ceil(O / 128), I / 128] for blocks.
    """
    if matrix.grid.float8:
        weight = matrix.codes.view(FLOAT8)
    else:
        weight = (matrix.codes.to(torch.int16) - matrix.grid.middle).to(torch.int8)
    scale = matrix.scale
    if matrix.grid.rows == -1:
        scale = scale[0]
    elif matrix.grid.rows > 1:
        scale = scale[:: matrix.grid.rows]
    return {"weight": weight.contiguous(), "weight_scale": scale.to(matrix.grid.scale_dtype).contiguous()}


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The matrix that `pack` gave as these tensors, or another writer's with a `weight_zero_point` int8 beside them."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    rows = len(weight)
    codes = weight.view(torch.uint8) if grid.float8 else (weight.to(torch.int16) + grid.middle).to(torch.uint8)
    if grid.symmetric:
        zero = torch.full_like(scale, 0 if grid.float8 else grid.middle, dtype=torch.uint8)
    else:
        zero = (tensors["weight_zero_point"].to(torch.int16) + grid.middle).to(torch.uint8)
    scale, zero = (_by_row(each, rows, grid).contiguous() for each in (scale, zero))
    return Quantized(codes=codes, scale=scale, zero=zero, grid=grid)


def _by_row(stored: Tensor, rows: int, grid: Grid) -> Tensor:
    """What is stored for each row, for the matrix or for blocks, [O, G]."""
    if grid.rows == -1:
        return stored.view(1, 1).expand(rows, 1)
    return stored.repeat_interleave(grid.rows, 0)[:rows] if grid.rows > 1 else stored


def quantization_config(
    grids: Mapping[str, Grid], inputs: Mapping[str, FakeQuantize], unquantized: Sequence[str], cache: str | None
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        grids: the grid of every quantized module, by its full name.
        inputs: how its inputs are rounded.
        unquantized: full names of the Linear modules that keep their weights (such as `lm_head`).
        cache: what shares a scale in a float8 cache of keys and values: `tensor` (scales [1]) or `attn_head` (a scale
            per key-value head, [K, 1, 1]); None where the file has no such scales.
    """
    schemes: dict[tuple[Grid, bool], list[str]] = {}
    for name, grid in grids.items():
        schemes.setdefault((grid, inputs[name].scale is not None), []).append(name)
    layout = FLOAT_QUANTIZED if any(grid.float8 for grid in grids.values()) else INT_QUANTIZED
    everything = [*grids, *unquantized]
    groups = {}
    for index, ((grid, static), names) in enumerate(schemes.items()):
        targets = ["Linear"] if len(schemes) == 1 else [f"re:{pattern}" for pattern in select(names, everything)]
        groups[f"group_{index}"] = {
            "targets": targets,
            "weights": _weights(grid),
            "input_activations": _inputs(grid, static),
            "output_activations": None,
            "format": layout,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None if cache is None else _arguments(True, cache),
        "global_compression_ratio": None,
        "version": version("compressed-tensors"),
    }


def _arguments(float8: bool, strategy: str, **others: Any) -> dict[str, Any]:
    kind = "float" if float8 else "int"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **others}


def _weights(grid: Grid) -> dict[str, Any]:
    if grid.rows > 1:
        return _arguments(grid.float8, "block", block_structure=[grid.rows, grid.group_size])
    return _arguments(grid.float8, "tensor" if grid.rows == -1 else "channel")


def _inputs(grid: Grid, static: bool) -> dict[str, Any]:
    if static:
        return _arguments(grid.float8, "tensor")
    if grid.rows > 1:
        return _arguments(grid.float8, "group", dynamic=True, group_size=grid.group_size)
    return _arguments(grid.float8, "token", dynamic=True)


def describe(infos: Infos, _: Sequence[int], scheme: Scheme) -> Grid:
    """The grid of a module in a file.

    Args:
        infos: headers of its tensors, by their names inside the module.
        scheme: what the config says of it.

    Raises:
        ModelError: tensors that don't fit each other or the scheme, as a predicate.
    """
    weight, scale, weights = infos.get("weight"), infos["weight_scale"], scheme["weights"]
    if weight is None or weight.dtype not in ("I8", "F8_E4M3"):
        raise ModelError("has a weight_scale but no weight of 8 bits; get the files again")
    float8, symmetric = weight.dtype == "F8_E4M3", weights.get("symmetric", True)
    if float8 != (weights.get("type", "int") == "float"):
        raise ModelError(
            f"holds {weight.dtype}, config.json says {weights.get('type', 'int')}; get both from the same place"
        )
    rows, columns = weight.shape
    shared, width = 1, -1
    wanted: tuple[int, ...] = rows, 1
    if weights.get("strategy", "tensor") == "tensor":
        shared, wanted = -1, (1,)
    elif weights["strategy"] == "block":
        shared, width = weights["block_structure"]
        wanted = -(-rows // shared), columns // width if columns % width == 0 else 0
    fits = scale.shape == wanted or (shared == -1 and math.prod(scale.shape) == 1)
    if not fits or scale.dtype not in DTYPES:
        raise ModelError(
            f"weight_scale of shape {list(scale.shape)} does not fit [{rows}, {columns}]: {_said(weights)}"
        )
    zero = infos.get("weight_zero_point")
    if (zero is None) != symmetric or (zero is not None and (zero.dtype != "I8" or zero.shape != scale.shape)):
        raise ModelError(f"has {'no' if zero is None else 'another'} weight_zero_point: {_said(weights)}")
    return Grid(8, width, symmetric, DTYPES[scale.dtype], signed_scale=False, float8=float8, rows=shared)


def _said(weights: Scheme) -> str:
    return (
        f"config.json says strategy {weights.get('strategy', 'tensor')}, "
        f"{'symmetric' if weights.get('symmetric', True) else 'asymmetric'}; get both from the same place"
    )


def input_rounding(scheme: Scheme, scale: Tensor | None) -> FakeQuantize | None:
    """How a module's inputs are rounded, in any format of compressed-tensors; None where they are not.

    Args:
        scheme: what the config says of the module.
        scale: its `input_scale`, where the file has one.

    Raises:
        ModelError: a static scale that is missing, or one too many, as a predicate.
    """
    arguments = scheme.get("input_activations") or {}
    static = bool(arguments) and not arguments.get("dynamic")
    if static != (scale is not None) or (scale is not None and scale.numel() != 1):
        there = "no input_scale" if scale is None else "an input_scale" + (f" of shape {list(scale.shape)}" * static)
        said = "static, with one scale" if static else "dynamic" if arguments else "not rounded"
        raise ModelError(f"has {there}, config.json says its inputs are {said}; get both from the same place")
    if not arguments:
        return None
    group_size = arguments.get("group_size") if arguments.get("strategy") == "group" else None
    return FakeQuantize(
        arguments.get("type", "int") == "float", None if scale is None else scale.view(()), group_size or -1
    )


def cache_rounding(arguments: Scheme, keys: Tensor, values: Tensor) -> CacheFakeQuantize:
    """How keys and values are rounded on their way into the cache, with the scales of an attention module."""
    float8 = arguments.get("type", "int") == "float"
    return CacheFakeQuantize(FakeQuantize(float8, keys.float()), FakeQuantize(float8, values.float()))


def _format(name: str) -> Format:
    return Format(
        name=name,
        parts=("weight_scale", "weight", "weight_zero_point"),
        pack=pack,
        unpack=unpack,
        describe=describe,
        config=lambda grids, unquantized, embeddings, inputs, cache: quantization_config(
            grids, inputs, unquantized, cache
        ),
        weight=loaded,
    )


INT, FLOAT = _format(INT_QUANTIZED), _format(FLOAT_QUANTIZED)
