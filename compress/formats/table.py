"""The formats by the name that a recipe gives them; compressed-tensors with rounded inputs is `8-bit`."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.formats import gptq, torchao
from compress.formats import pack_quantized as compressed_tensors
from compress.formats import w8a8 as eight_bit
from compress.quant.grid import FakeQuantize, Grid, Quantized

Grids = Mapping[str, Grid]
Shapes = Mapping[str, tuple[int, int]]
Inputs = Mapping[str, FakeQuantize]


@dataclass(frozen=True)
class Format:
    """What the quantize stage needs to know of a checkpoint format.

    Args:
        parts: names of a module's tensors, inside the module.
        zero_minimum: smallest zero point that it can hold.
        scale_dtype: dtype of its scales for weights stored in a given dtype.
        pack: tensors of a matrix.
        unpack: the matrix of these tensors.
        config: `quantization_config` for grids, unquantized linears, the embeddings among the grids, how inputs are
            rounded, and what shares a scale in the cache (None without scales).
        problems: why it can't hold these matrices, a line each.
        extra_files: further files beside config.json, by name, from the `quantization_config`.
        metadata: what goes into every file's header, from the grids and the shapes of all tensors.
        weight: what a linear runs with, for the dtype of the forward passes.
        rounds_inputs: whether that weight rounds the inputs itself.
    """

    parts: tuple[str, ...]
    zero_minimum: int
    scale_dtype: Callable[[torch.dtype], torch.dtype]
    pack: Callable[[Quantized], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Grid], Quantized]
    config: Callable[[Grids, Sequence[str], Sequence[str], Inputs, str | None], dict[str, Any]]
    problems: Callable[[Shapes, Grids, Sequence[str]], list[str]]
    extra_files: Callable[[dict[str, Any]], dict[str, str]]
    metadata: Callable[[Grids, Mapping[str, Sequence[int]]], dict[str, str]] = lambda grids, shapes: {}
    weight: Callable[[Quantized, torch.dtype], Tensor] = Quantized.dequantize
    rounds_inputs: bool = False


def _compressed_problems(shapes: Shapes, grids: Grids, embeddings: Sequence[str]) -> list[str]:
    problem = compressed_tensors.check(grids, embeddings)
    return [] if problem is None else [problem]


def _gptq_problems(shapes: Shapes, grids: Grids, embeddings: Sequence[str]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        problem = gptq.check(shape, grids[name])
        if problem is not None:
            found.setdefault(problem, []).append(name)
    return [f"{names[0]} ({len(names)} such layers): {problem}" for problem, names in found.items()]


FORMATS = {
    "compressed-tensors": Format(
        parts=("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
        zero_minimum=0,
        scale_dtype=lambda stored: stored,
        pack=compressed_tensors.pack,
        unpack=compressed_tensors.unpack,
        config=lambda grids, unquantized, embeddings, inputs, cache: compressed_tensors.quantization_config(
            grids, unquantized, embeddings
        ),
        problems=_compressed_problems,
        extra_files=lambda config: {},
    ),
    "8-bit": Format(
        parts=("weight", "weight_scale"),
        zero_minimum=0,
        scale_dtype=lambda stored: stored,
        pack=eight_bit.pack,
        unpack=eight_bit.unpack,
        config=lambda grids, unquantized, embeddings, inputs, cache: eight_bit.quantization_config(
            grids, inputs, unquantized, cache
        ),
        problems=lambda shapes, grids, embeddings: [],
        extra_files=lambda config: {},
    ),
    "torchao": Format(
        parts=torchao.PARTS,
        zero_minimum=0,
        scale_dtype=lambda stored: stored,
        pack=torchao.pack,
        unpack=torchao.unpack,
        config=lambda grids, unquantized, embeddings, inputs, cache: torchao.quantization_config(grids, unquantized),
        problems=lambda shapes, grids, embeddings: [],
        extra_files=lambda config: {},
        metadata=torchao.metadata,
        weight=torchao.weight,
        rounds_inputs=True,
    ),
    "gptq": Format(
        parts=("qweight", "qzeros", "scales", "g_idx"),
        zero_minimum=1,
        scale_dtype=lambda stored: torch.float16,
        pack=gptq.pack,
        unpack=gptq.unpack,
        config=lambda grids, unquantized, embeddings, inputs, cache: gptq.quantization_config(grids, unquantized),
        problems=_gptq_problems,
        extra_files=lambda config: {"quantize_config.json": json.dumps(config, indent=2) + "\n"},
    ),
}
