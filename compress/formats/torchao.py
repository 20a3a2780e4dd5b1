"""torchao's tensors in safetensors, which stock transformers opens with its TorchAoConfig: int8 that a CPU executes.

Two schemes, both with inputs that are rounded token by token as the model runs:

- 8-bit weights with a scale per row (`Int8Tensor`): the linears multiply whole numbers, on CPUs and GPUs.
- 4-bit weights with a scale per group (`IntxUnpackedToInt8Tensor`), a byte each in the file. This is the form that is
  exported to phones (ExecuTorch) and repacked for ARM; elsewhere torchao multiplies floats, which is slow.

The codes go into the tensors as they are: nothing is rounded again. Simulation, evaluation and reading use the same
tensors, so that the arithmetic is torchao's everywhere.

Left out: static inputs, float8, weights with zero points, and torchao's 4-bit tensors for CPUs (`Int4OpaqueTensor`,
`IntxOpaqueTensor`), whose kernels its wheels for x86 lack and which it can't write to safetensors. torchao is imported
where it is used: it is an extra.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats.base import DTYPES, Format, Infos, Scheme
from compress.formats.facts import TORCHAO
from compress.quant.grid import Grid, Quantized

PARTS = ("_weight_qdata", "_weight_scale", "_weight_zero_point")
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]  # its stubs lack it
_SCHEMES = ((8, -1), (4, -1), (4, 32), (4, 64), (4, 128))  # bits, group_size


def weight(matrix: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] that a Linear runs with, in torchao's class.

    Args:
        matrix: on a grid of 8 bits with a scale per row, or of 4 bits.
        dtype: of the model's forward passes.
    """
    return _wrap(pack(matrix), matrix.grid, dtype)


def _wrap(tensors: Mapping[str, Tensor], grid: Grid, dtype: torch.dtype) -> Tensor:
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    codes, scale = tensors["_weight_qdata"], tensors["_weight_scale"]
    block = [1, grid.columns_per_group(codes.shape[1])]
    made: Tensor
    if grid.bits == 8:
        made = Int8Tensor(codes, scale, block, dtype, act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerRow()))
    else:
        zero = tensors["_weight_zero_point"]
        made = IntxUnpackedToInt8Tensor(codes, scale, zero, _INT4, block, dtype, "int8_asym_per_token")
    return made


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it.

    Returns:
        _weight_qdata int8 [O, I], also for 4 bits; _weight_scale [O, G] in the grid's `scale_dtype`; for 4 bits
        _weight_zero_point int8 [O, G], all 0.
    """
    codes = (matrix.codes.to(torch.int16) - matrix.grid.middle).to(torch.int8)
    tensors = {"_weight_qdata": codes, "_weight_scale": matrix.scale.to(matrix.grid.scale_dtype)}
    if matrix.grid.bits == 4:
        tensors["_weight_zero_point"] = torch.zeros_like(matrix.scale, dtype=torch.int8)
    return tensors


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The matrix that `pack` gave as these tensors."""
    scale = tensors["_weight_scale"]
    codes = (tensors["_weight_qdata"].to(torch.int16) + grid.middle).to(torch.uint8)
    return Quantized(codes, scale, torch.full_like(scale, grid.middle, dtype=torch.uint8), grid)


def describe(infos: Infos, _: Sequence[int], scheme: Scheme) -> Grid:
    """The grid of a module in a file.

    Args:
        infos: headers of its tensors, by their names inside the module.
        scheme: its `bits`.

    Raises:
        ModelError: tensors that don't fit each other, as a predicate.
    """
    codes, scale = infos[PARTS[0]], infos.get(PARTS[1])
    if scale is None or scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
        raise ModelError("has no _weight_scale that fits its _weight_qdata; get the files again")
    groups = scale.shape[1]
    size = -1 if groups == 1 else codes.shape[1] // groups
    return Grid(scheme["bits"], size, True, DTYPES[scale.dtype], signed_scale=False)


def metadata(grids: Mapping[str, Grid], shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """What every safetensors file's header says of all tensors, so that torchao puts its own together.

    Args:
        grids: the grid of every quantized module.
        shapes: of all tensors in the files, by full name.
    """
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    whole: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if part not in PARTS:
            whole[name] = torch.empty(shape, device="meta")
        elif part == PARTS[0]:
            rows, columns = shape
            dtype = grids[module].scale_dtype
            groups = columns // grids[module].columns_per_group(columns)
            empty = torch.empty(rows, columns, dtype=torch.int8, device="meta")
            scale = torch.empty(rows, groups, dtype=dtype, device="meta")
            parts = dict(zip(PARTS, (empty, scale, scale.to(torch.int8)), strict=True))
            whole[f"{module}.weight"] = _wrap(parts, grids[module], dtype)
    found: dict[str, str] = flatten_tensor_state_dict(whole)[1]
    return found


def quantization_config(grids: Mapping[str, Grid], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Args:
        grids: the grid of every quantized module, by its full name; all on one scheme.
        unquantized: full names of the Linear modules that keep their weights (such as `lm_head`).
    """
    first = next(iter(grids.values()))
    return {
        "quant_method": "torchao",
        "quant_type": {"default": _quant_type(first.bits, first.group_size)},
        "modules_to_not_convert": list(unquantized),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def _quant_type(bits: int, group_size: int) -> dict[str, Any]:
    from torchao.core.config import config_to_dict
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        PerAxis,
        PerGroup,
    )

    if bits == 8:
        config: Any = Int8DynamicActivationInt8WeightConfig()
    else:
        granularity = PerAxis(0) if group_size == -1 else PerGroup(group_size)
        config = Int8DynamicActivationIntxWeightConfig(weight_dtype=_INT4, weight_granularity=granularity)
    found: dict[str, Any] = config_to_dict(config)
    return found


def bits_of(config: Mapping[str, Any]) -> int | None:
    """Width of the weights that a `quantization_config` stands for; None if its scheme is not one of those here."""
    theirs = (config.get("quant_type") or {}).get("default") or {}
    for bits, group_size in _SCHEMES:
        ours = _quant_type(bits, group_size)
        same = all(theirs.get("_data", {}).get(key, value) == value for key, value in ours["_data"].items())
        if theirs.get("_type") == ours["_type"] and same:
            return bits
    return None


FORMAT = Format(
    name=TORCHAO,
    parts=PARTS,
    pack=pack,
    unpack=unpack,
    describe=describe,
    config=lambda grids, unquantized, embeddings, inputs, cache: quantization_config(grids, unquantized),
    metadata=metadata,
    weight=lambda matrix, dtype, dense: weight(matrix, dtype),
    read=lambda tensors, grid, dtype: weight(unpack(tensors, grid), grid.scale_dtype),
    rounds_inputs=True,
    runs_in=lambda grid, dtype: grid.scale_dtype if grid.bits == 4 else dtype,
)
