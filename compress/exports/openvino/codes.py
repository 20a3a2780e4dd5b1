"""Codes of a quantized checkpoint as OpenVINO's files hold them, value for value.

A matrix is (code - zero point) * scale of three constants there, in the form that NNCF writes and every device of
OpenVINO knows: codes are i4 or i8 around zero where the zero point is the middle, else u4 or u8 with zero points. Codes
of 2 and 3 bits take 4. Scales are float16 where it holds each of them exactly, else float32.

Element types: https://docs.openvino.ai/2026/documentation/openvino-ir-format.html
Shapes: O output rows, I input columns, G groups of columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats.base import AnyGrid
from compress.model.gguf.block_types import BlockType
from compress.quant.grid import Grid, Quantized

WIDTHS = (4, 8)
PARTS = ("codes", "scales", "zeros")


def width_of(bits: int) -> int:
    """Bits that a code takes."""
    return next(each for each in WIDTHS if each >= bits)


def carried_grids(
    name: object, grids: Mapping[str, AnyGrid], columns: Callable[[str], int], kind: str, int8_inputs: bool
) -> dict[str, Grid]:
    """Grids of the modules whose codes go into the file as they are.

    Args:
        name: of the checkpoint, for messages.
        grids: of its quantized modules.
        columns: how many one of them has.
        kind: of matrices, "auto" or "f32", which has no codes.
        int8_inputs: whether the inputs of linears are rounded to 8 bits as it runs.

    Raises:
        ModelError: what OpenVINO has no place for, naming the module.
    """
    found: dict[str, Grid] = {}
    for module, grid in grids.items() if kind == "auto" else ():
        if isinstance(grid, BlockType):
            raise ModelError(f"{name}: {module} has codes on a grid of llama.cpp; use --to gguf, or --type f32")
        if grid.float8:
            raise ModelError(f"{name}: {module} has float8 weights; use --type f32, or quantize it to whole numbers")
        if width_of(grid.bits) == 4 and grid.columns_per_group(columns(module)) % 2:
            raise ModelError(f"{name}: {module} has groups of an odd number of columns; use --type f32")
        found[module] = grid
    if int8_inputs and not found:
        raise ModelError(
            f"{name}: has no codes here, and OpenVINO rounds inputs only of linears that do; leave out --int8-inputs"
        )
    return found


def laid_out(matrix: Quantized) -> dict[str, Tensor]:
    """The constants of one matrix.

    Returns:
        codes and zeros uint8 (a byte each, or two of 4 bits with the lower one first), in the order of rows; scales
        float16 or float32 [O, G]. No zeros where codes are around zero.
    """
    bits, scale = width_of(matrix.grid.bits), matrix.scale.float().contiguous()
    half = scale.half()
    parts = {"scales": half if torch.equal(half.float(), scale) else scale}
    if not matrix.grid.symmetric:
        return {"codes": _packed(matrix.codes, bits), **parts, "zeros": _packed(matrix.zero, bits)}
    zero = matrix.zero.repeat_interleave(matrix.codes.shape[1] // scale.shape[1], 1)
    return {"codes": _packed(matrix.codes - zero, bits), **parts}  # uint8 wraps round, as two's complement does


def shape_of(matrix: Quantized) -> dict[str, Any]:
    """What one must know to read the constants: bits, rows, columns, groups in a row, whether codes are signed."""
    rows, columns = matrix.codes.shape
    return {
        "bits": width_of(matrix.grid.bits), "rows": rows, "columns": columns, "groups": matrix.scale.shape[1],
        "signed": matrix.grid.symmetric,
    }  # fmt: skip


def _packed(codes: Tensor, bits: int) -> Tensor:
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.contiguous()
    low = torch.nn.functional.pad(flat, (0, flat.numel() % 2)) & 15
    return low[0::2] | (low[1::2] << 4)


@dataclass
class Digests:
    """SHA-256 of the constants that a file must hold, by module, in the order of `PARTS`; "" where there is none."""

    modules: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.modules)

    @classmethod
    def load(cls, kept: Mapping[str, list[str]]) -> "Digests":
        """Those that `dump` gave."""
        return cls(dict(kept))

    def dump(self) -> dict[str, list[str]]:
        """As JSON can hold them."""
        return self.modules

    def add(self, module: str, parts: Mapping[str, Tensor]) -> None:
        """Note what `laid_out` gave of a module."""
        self.modules[module] = [
            sha256(parts[part].numpy().tobytes()).hexdigest() if part in parts else "" for part in PARTS
        ]

    def other(self, found: Mapping[str, list[str]]) -> list[str]:
        """Modules whose constants are not in a file as they were noted, by the file's own digests."""
        return [module for module, digests in self.modules.items() if found.get(module) != digests]
