"""The compressed-tensors format (`pack-quantized`), which stock transformers and vLLM open.

The integer codes go into the file as they are. The library's own `compress` is not called, because it rounds float
weights again; the tests hold that both write the same tensors.

Left out: a stored activation order (`weight_g_idx`; groups are static, so that no loader needs it), activations, the
key-value cache, sparsity.

What loaders make of it:

- transformers opens all widths and groups; 3 bits with compressed-tensors 0.18 or later. Its default path has no
  room for packed zero points (with compressed-tensors 0.18 to 0.20) nor for embeddings. `"dequantize": true` in the
  config opens both, for one scheme in the whole model: zero points from transformers 5.3 on, embeddings from 5.23 on.
- vLLM takes 4 and 8 bits, and its fused modules (`qkv_proj`, `gate_up_proj`) need one scheme for all of their parts.
- Negative scales are plain numbers to both; only vLLM's optional int8 activations (`VLLM_MARLIN_INPUT_DTYPE=int8`)
  misread them.
"""

from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats.base import DTYPES, Format, Infos, Scheme, loaded
from compress.formats.facts import PACK_QUANTIZED
from compress.formats.packing import pack_rows, unpack_rows
from compress.formats.patterns import has_number, select
from compress.quant.grid import Grid, Quantized

_Kind = tuple[int, int, bool]  # bits, group_size, symmetric


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it.

    Returns:
        weight_packed int32 [O, ceil(I * bits / 32)], packed along the inputs; weight_scale [O, G] in the grid's
        `scale_dtype`; weight_shape int64 [2] = (O, I); and for an asymmetric grid weight_zero_point int32
        [ceil(O * bits / 32), G], packed along the outputs.
    """
    grid = matrix.grid
    tensors = {
        "weight_packed": pack_rows(matrix.codes, grid.bits),
        "weight_scale": matrix.scale.to(grid.scale_dtype).contiguous(),
        "weight_shape": torch.tensor(matrix.codes.shape),
    }
    if not grid.symmetric:
        tensors["weight_zero_point"] = pack_rows(matrix.zero.t(), grid.bits).t().contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The matrix that `pack` gave as these tensors."""
    rows, columns = tensors["weight_shape"].tolist()
    scale = tensors["weight_scale"]
    if grid.symmetric:
        zero = torch.full_like(scale, grid.middle, dtype=torch.uint8)
    else:
        zero = unpack_rows(tensors["weight_zero_point"].t(), grid.bits, rows).t().contiguous()
    codes = unpack_rows(tensors["weight_packed"], grid.bits, columns)
    return Quantized(codes=codes, scale=scale, zero=zero, grid=grid)


def describe(infos: Infos, shape: Sequence[int], scheme: Scheme) -> Grid:
    """The grid of a module in a file.

    Args:
        infos: headers of its tensors, by their names inside the module.
        shape: (O, I), what its weight_shape holds; empty without one.
        scheme: what the config says of it.

    Raises:
        ModelError: tensors that don't fit each other or the scheme, as a predicate.
    """
    packed, scale = infos["weight_packed"], infos.get("weight_scale")
    if "weight_g_idx" in infos:
        raise ModelError("stores an activation order (weight_g_idx), which can't be read here")
    if scale is None or not shape:
        raise ModelError(f"has no {'weight_shape' if scale is not None else 'weight_scale'}; get the files again")
    rows, columns = shape
    bits = packed.shape[1] * 32 // columns
    if packed.dtype != "I32" or packed.shape != (rows, -(-columns * bits // 32)):
        raise ModelError(f"weight_packed of shape {list(packed.shape)} does not hold [{rows}, {columns}] without gaps")
    if len(scale.shape) != 2 or scale.shape[0] != rows or columns % scale.shape[1] or scale.dtype not in DTYPES:
        raise ModelError(f"weight_scale of shape {list(scale.shape)} does not fit [{rows}, {columns}]")
    groups = scale.shape[1]
    grid = Grid(bits, -1 if groups == 1 else columns // groups, "weight_zero_point" not in infos, DTYPES[scale.dtype])
    weights = scheme["weights"]
    width = columns if weights.get("group_size") in (None, -1) else weights["group_size"]
    said = (weights.get("num_bits", 8), columns // width, weights.get("symmetric", True))
    if said != (bits, groups, grid.symmetric):
        raise ModelError(
            f"holds {_describe((bits, grid.group_size, grid.symmetric))}, config.json says "
            f"{_describe((said[0], -1 if width == columns else width, said[2]))}; get both from the same place"
        )
    return grid


def check(grids: Mapping[str, Grid], embeddings: Collection[str] = ()) -> str | None:
    """Why transformers could not open a checkpoint with these modules, in one line; None when it can.

    Args:
        grids: the grid of every quantized module, by its full name.
        embeddings: which of them are embeddings and not Linear modules.
    """
    schemes = _members(grids)
    if len(schemes) == 1 or not _needs_dequantize(grids, embeddings):
        return None
    listed = "; ".join(_describe(scheme) for scheme in schemes)
    cause = "quantized embeddings" if embeddings else "asymmetric layers"
    return (
        f"format compressed-tensors: transformers opens {cause} only where all modules share one scheme, these have "
        f"{len(schemes)} ({listed}); make all symmetric and keep embeddings, or use one scheme"
    )


def quantization_config(
    grids: Mapping[str, Grid], unquantized: Sequence[str], embeddings: Collection[str] = ()
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    One scheme for every quantized Linear is written the usual way, the class `Linear` minus `ignore`, and an output
    head by its name too, since vLLM's has another class. Several schemes select modules by their names and never by
    class, because vLLM looks at a fused module's class before its parts.

    Args:
        grids: the grid of every quantized module, by its full name.
        unquantized: full names of the Linear modules that keep their weights (such as `lm_head`).
        embeddings: which of `grids` are embeddings and not Linear modules.
    """
    everything = [*grids, *unquantized]
    linears = set(grids) - set(embeddings)
    groups = {}
    for index, (scheme, names) in enumerate(_members(grids).items()):
        by_name = names
        targets = []
        if linears and linears <= set(names):
            targets = ["Linear"]
            by_name = [name for name in names if name in embeddings or not has_number(name)]
        groups[f"group_{index}"] = {
            "targets": targets + [f"re:{pattern}" for pattern in select(by_name, everything)],
            "weights": _weights(scheme),
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(unquantized),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "version": version("compressed-tensors"),
    }
    if len(groups) == 1 and _needs_dequantize(grids, embeddings):
        config["dequantize"] = True
    return config


def _members(grids: Mapping[str, Grid]) -> dict[_Kind, list[str]]:
    members: dict[_Kind, list[str]] = {}
    for name, grid in grids.items():
        members.setdefault((grid.bits, grid.group_size, grid.symmetric), []).append(name)
    return members


def _needs_dequantize(grids: Mapping[str, Grid], embeddings: Collection[str]) -> bool:
    return bool(embeddings) or not all(grid.symmetric for grid in grids.values())


def _weights(scheme: _Kind) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }


def _describe(scheme: _Kind) -> str:
    bits, group_size, symmetric = scheme
    return f"{bits} bits, group {group_size}, {'symmetric' if symmetric else 'asymmetric'}"


def _problems(shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, Grid], embeddings: Sequence[str]) -> list[str]:
    problem = check(grids, embeddings)
    return [] if problem is None else [problem]


FORMAT = Format(
    name=PACK_QUANTIZED,
    parts=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
    pack=pack,
    unpack=unpack,
    describe=describe,
    config=lambda grids, unquantized, embeddings, inputs, cache: quantization_config(grids, unquantized, embeddings),
    problems=_problems,
    dense=_needs_dequantize,
    weight=loaded,
)
