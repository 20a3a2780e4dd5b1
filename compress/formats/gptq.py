"""The auto-gptq v1 format, which GPTQModel, transformers (through optimum), vLLM and many others open.

Layout (GPTQModel's `nn_modules/qlinear`, AutoGPTQ before it): everything is transposed to [inputs, outputs], codes are
packed along the inputs, zero points along the outputs and less one, which is why an asymmetric grid here starts its
zero points at 1 (`zero_minimum`). `g_idx`, the group of every input, is always written.

Left out: gptq_v2 (zero points as they are; few loaders know it) and a permuted `g_idx` when writing. `dequantize`
reads a permuted one.

What loaders make of it. GPTQModel opens every width, per-module schemes and a quantized head; asymmetric v1 files only
from a producer that it knows to keep zero points above 0, hence the second entry of `meta.quantizer`. transformers
with optimum opens one scheme for the decoder layers, and takes a quantized head for a missing one, which it fills with
random weights. vLLM matches `dynamic` against the names of its fused modules, so that a model with several schemes
for vLLM is better off in the compressed-tensors format. Negative scales are plain numbers to all of them; only vLLM's
optional int8 activations (`VLLM_MARLIN_INPUT_DTYPE=int8`) misread them.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress import __version__
from compress.errors import ModelError
from compress.formats.packing import pack_rows, unpack_rows
from compress.formats.patterns import has_number, inside_layer, select
from compress.quant.grid import Grid, Quantized

_ALIGNMENT = 32  # codes in whole words, for every width


def check(shape: Sequence[int], grid: Grid) -> str | None:
    """Why the format can't hold a matrix of this shape (O, I) on this grid, in one line; None when it can."""
    rows, columns = shape
    for width, what in ((rows, "outputs"), (columns, "inputs")):
        if width % _ALIGNMENT:
            return (
                f"format gptq needs {what} divisible by {_ALIGNMENT}, this matrix has {width}; "
                "leave it out with `ignore`, or use format compressed-tensors"
            )
    if columns % grid.columns_per_group(columns):
        return f"group_size {grid.group_size} does not divide the {columns} inputs"
    return None


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it; a bias stays as it is, beside them.

    Returns:
        qweight int32 [I * bits / 32, O]; qzeros int32 [G, O * bits / 32], zero - 1; scales float16 [G, O];
        g_idx int32 [I].
    """
    grid = matrix.grid
    rows, columns = matrix.codes.shape
    assert check((rows, columns), grid) is None, check((rows, columns), grid)
    assert grid.scale_dtype == torch.float16, "codes belong to scales that float16 holds"
    assert int(matrix.zero.min()) >= 1, "the format stores zero - 1"
    group = torch.arange(columns, dtype=torch.int32, device=matrix.codes.device) // grid.columns_per_group(columns)
    return {
        "qweight": pack_rows(matrix.codes, grid.bits).t().contiguous(),
        "qzeros": pack_rows(matrix.zero.t() - 1, grid.bits),
        "scales": matrix.scale.to(torch.float16).t().contiguous(),
        "g_idx": group,
    }


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The matrix that `pack` gave as these tensors.

    Raises:
        ModelError: `g_idx` does not count up in whole groups (an activation order is stored): use `dequantize`.
    """
    columns = tensors["g_idx"].numel()
    in_order = torch.arange(columns, device=tensors["g_idx"].device) // grid.columns_per_group(columns)
    if not torch.equal(tensors["g_idx"].long(), in_order):
        raise ModelError(f"g_idx is not in order of groups of {grid.group_size}: the file stores an activation order")
    codes, zero = _codes_and_zero(tensors, grid.bits)
    scale = tensors["scales"].t().contiguous()
    return Quantized(codes=codes, scale=scale, zero=zero.to(torch.uint8), grid=grid)


def dequantize(tensors: Mapping[str, Tensor], bits: int) -> Tensor:
    """The float32 weight [O, I] of any v1 file, also with a permuted `g_idx`: (code - zero) * scale of the group."""
    codes, zero = _codes_and_zero(tensors, bits)
    group = tensors["g_idx"].long()
    scale = tensors["scales"].t().float()
    return (codes.float() - zero.float()[:, group]) * scale[:, group]


def _codes_and_zero(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I] and zero points int16 [O, G]."""
    columns, rows = tensors["g_idx"].numel(), tensors["scales"].shape[1]
    codes = unpack_rows(tensors["qweight"].t(), bits, columns)
    zero = unpack_rows(tensors["qzeros"], bits, rows).t().to(torch.int16) + 1
    return codes, zero.contiguous()


def quantization_config(grids: Mapping[str, Grid], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, and the content of `quantize_config.json` for older loaders.

    The commonest scheme is the model's; modules with another one, and those of the decoder layers that keep their
    weights, are rules of `dynamic`. A module without a number in its name is the output head.

    Args:
        grids: the grid of every quantized module, by its full name.
        unquantized: full names of the Linear modules that keep their weights.
    """
    everything = [*grids, *unquantized]
    schemes = {name: (grid.bits, grid.group_size, grid.symmetric) for name, grid in grids.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    rules: dict[str, dict[str, Any]] = {}
    for scheme in dict.fromkeys(schemes.values()):
        if scheme != common:
            names = [name for name in grids if schemes[name] == scheme]
            rules |= {f"+:{pattern}": _scheme(scheme) for pattern in select(names, everything)}
    skipped = [name for name in unquantized if has_number(name)]
    rules |= {f"-:{pattern}": {} for pattern in select(skipped, everything)}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **_scheme(common),
        "desc_act": False,
        "lm_head": not all(has_number(name) for name in grids),
        "pack_dtype": "int32",
        "meta": {"quantizer": _producers(grids)},
    }
    if rules:
        config["dynamic"] = rules
    if skipped and (kept := _parts_of_every_layer(grids, skipped)):
        config["modules_in_block_to_quantize"] = [kept]
    return config


def _scheme(scheme: tuple[int, int, bool]) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    return {"bits": bits, "group_size": group_size, "sym": symmetric}


def _producers(grids: Mapping[str, Grid]) -> list[str]:
    """Who wrote the file, and the GPTQModel version whose layout it has: asymmetric files are opened from 0.9.0 on."""
    producers = [f"dscompress:{__version__}"]
    if not all(grid.symmetric for grid in grids.values()):
        producers.append("gptqmodel:0.9.0")
    return producers


def _parts_of_every_layer(grids: Mapping[str, Grid], skipped: Sequence[str]) -> list[str]:
    """Names inside a layer that are quantized in all layers, for optimum; none when layers differ."""
    kept = list(dict.fromkeys(inside_layer(name) for name in grids))
    return [] if any(inside_layer(name) in kept for name in skipped) else kept
