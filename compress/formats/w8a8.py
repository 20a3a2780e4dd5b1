"""The 8-bit formats of compressed-tensors, `int-quantized` and `float-quantized`: a weight per byte, rounded inputs.

Stock transformers rounds the inputs as it runs (and computes in 16 bits); vLLM multiplies the bytes themselves. As in
`compressed_tensors.py` the codes go into the file as they are, and the tests hold that the library writes the same.

What loaders make of it: both open all of it. vLLM's fused modules (`qkv_proj`, `gate_up_proj`) need one scheme for all
of their parts, and its block kernels need widths that 128 divides. Its key-value cache takes a scale per tensor with
every attention backend, and a scale per head with Flash Attention only.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import compressed_tensors
import torch
from torch import Tensor

from compress.formats.patterns import select
from compress.quant.grid import FLOAT8, FakeQuantize, Grid, Quantized

BLOCK = 128
FORMATS = ("int-quantized", "float-quantized")


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
    """The matrix that `pack` gave as these tensors."""
    weight, scale = tensors["weight"], tensors["weight_scale"]
    codes = weight.view(torch.uint8) if grid.float8 else (weight.to(torch.int16) + grid.middle).to(torch.uint8)
    if grid.rows == -1:
        scale = scale.view(1, 1).expand(len(weight), 1)
    elif grid.rows > 1:
        scale = scale.repeat_interleave(grid.rows, 0)[: len(weight)]
    zero = torch.full_like(scale, 0 if grid.float8 else grid.middle, dtype=torch.uint8)
    return Quantized(codes=codes, scale=scale.contiguous(), zero=zero, grid=grid)


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
    layout = FORMATS[any(grid.float8 for grid in grids.values())]
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
        "version": compressed_tensors.__version__,
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


def grid_of(weight: str, rows: int, scale_shape: Sequence[int], scale_dtype: torch.dtype) -> Grid:
    """The grid of a module in a file.

    Args:
        weight: dtype of its weight, I8 or F8_E4M3.
        rows: outputs.
        scale_shape: of its weight_scale.
        scale_dtype: of its weight_scale.
    """
    shared, width = 1, -1
    if math.prod(scale_shape) == 1:
        shared = -1
    elif scale_shape[0] != rows:
        shared, width = BLOCK, BLOCK
    return Grid(8, width, True, scale_dtype, signed_scale=False, float8=weight == "F8_E4M3", rows=shared)


def activation_fake_quantize(config: Mapping[str, Any], module: str, scale: Tensor | None) -> FakeQuantize | None:
    """How a module's inputs are rounded, as a `quantization_config` says it; None where they are not.

    Args:
        config: the `quantization_config`.
        module: full name of a Linear.
        scale: its `input_scale`, where the file has one.
    """
    groups = config.get("config_groups", {}).values()
    by_name = [g for g in groups for t in g["targets"] if t == module or (t[:3] == "re:" and re.match(t[3:], module))]
    found = [*by_name, *(group for group in groups if "Linear" in group["targets"])]
    arguments = found[0].get("input_activations") if found else None
    if not arguments:
        return None
    group_size = arguments.get("group_size") or -1
    return FakeQuantize(
        arguments["type"] == "float", None if arguments["dynamic"] or scale is None else scale.view(()), group_size
    )
