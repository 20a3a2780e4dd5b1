"""What every checkpoint format gives to the quantize stage and to readers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from compress.formats.facts import scale_dtype
from compress.model.checkpoint import TensorInfo
from compress.model.gguf.block_types import BlockType
from compress.quant.blocks import Blocked
from compress.quant.grid import FakeQuantize, Grid, Quantized

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

AnyGrid: TypeAlias = Grid | BlockType
AnyQuantized: TypeAlias = Quantized | Blocked
Grids: TypeAlias = Mapping[str, AnyGrid]
Shapes: TypeAlias = Mapping[str, tuple[int, int]]
Inputs: TypeAlias = Mapping[str, FakeQuantize]
Infos: TypeAlias = Mapping[str, TensorInfo]  # of a module's tensors, by their names inside it
Scheme: TypeAlias = Mapping[str, Any]  # what a `quantization_config` says of a module, in the format's own words


def _exact(matrix: AnyQuantized, dtype: torch.dtype, dense: bool) -> Tensor:
    return matrix.dequantize().to(dtype) if isinstance(matrix, Blocked) else matrix.dequantize(dtype)


@dataclass(frozen=True)
class Format:
    """A checkpoint format, for matrices and grids of its own kind.

    Args:
        name: as its library calls it; a key of `compress.formats.facts.FACTS`.
        parts: names of a module's tensors, inside the module; the first one tells a quantized module.
        pack: tensors of a matrix.
        unpack: the matrix of these tensors.
        describe: the grid of a module in a file, from the headers of its tensors, its shape (O, I) where a tensor says
            it (else empty), and its scheme. Raises ModelError where they contradict each other, with a predicate.
        config: `quantization_config` for grids, unquantized linears, the embeddings among the grids, how inputs are
            rounded, and what shares a scale in the cache (None without scales).
        zero_minimum: smallest zero point that it can hold.
        problems: why it can't hold these matrices, a line each.
        extra_files: further files beside config.json, by name, from the `quantization_config`.
        metadata: what goes into every file's header, from the grids and the shapes of all tensors.
        dense: whether the config of these grids (and embeddings among them) makes loaders dequantize as they load.
        weight: what a linear runs with, for the dtype of the forward passes and `dense`.
        read: the same from a file's tensors; None: `weight` of what `unpack` gives.
        rounds_inputs: whether that weight rounds the inputs itself.
        runs_in: dtype in which a matrix on a grid runs where another is asked for.
    """

    name: str
    parts: tuple[str, ...]
    pack: Callable[[Any], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], Any], AnyQuantized]
    describe: Callable[[Infos, Sequence[int], Scheme], AnyGrid]
    config: Callable[[Any, Sequence[str], Sequence[str], Inputs, str | None], dict[str, Any]]
    zero_minimum: int = 0
    problems: Callable[[Shapes, Any, Sequence[str]], list[str]] = lambda shapes, grids, embeddings: []
    extra_files: Callable[[dict[str, Any]], dict[str, str]] = lambda config: {}
    metadata: Callable[[Any, Mapping[str, Sequence[int]]], dict[str, str]] = lambda grids, shapes: {}
    dense: Callable[[Any, Sequence[str]], bool] = lambda grids, embeddings: False
    weight: Callable[[Any, torch.dtype, bool], Tensor] = _exact
    read: Callable[[Mapping[str, Tensor], Any, torch.dtype], Tensor] | None = None
    rounds_inputs: bool = False
    runs_in: Callable[[Any, torch.dtype], torch.dtype] = lambda grid, dtype: dtype

    def scale_dtype(self, model: str) -> torch.dtype:
        """In which it stores scales for a model of this dtype (`compress.model.shapes.model_dtype`)."""
        return DTYPES[scale_dtype(self.name, model)]

    def load(self, tensors: Mapping[str, Tensor], grid: AnyGrid, dtype: torch.dtype, dense: bool) -> Tensor:
        """The weight [O, I] of a file's tensors, as the loader has it that is asked for `dtype`."""
        if self.read is not None:
            return self.read(tensors, grid, dtype)
        return self.weight(self.unpack(tensors, grid), dtype, dense)


def loaded(matrix: Quantized, dtype: torch.dtype, dense: bool) -> Tensor:
    """The weight [O, I] that compressed-tensors' loaders multiply with.

    Args:
        matrix: as the file has it.
        dtype: in which the model is opened. Scales become it before they are multiplied.
        dense: the config says `dequantize`: the product is in the scales' own dtype, and only then becomes `dtype`.
    """
    if dense:
        return matrix.dequantize(matrix.scale.dtype).to(dtype)
    return Quantized(matrix.codes, matrix.scale.to(dtype), matrix.zero, matrix.grid).dequantize(dtype)
