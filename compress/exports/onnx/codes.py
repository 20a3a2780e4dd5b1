"""Codes of a quantized checkpoint in the layout of ONNX Runtime's MatMulNBits, value for value.

A code has 2, 4 or 8 bits there, and 16 to 256 columns (a power of two) share a float32 scale and a zero point. What
does not lie so is laid out anew and means the same numbers: 3-bit codes take 4 bits each, and a scale of a whole row is
repeated for each of its blocks.

Layout: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
Shapes: O output rows, I input columns, G blocks of columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from compress.formats.packing import pack_rows
from compress.quant.grid import Grid, Quantized

WIDTHS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)
PARTS = ("qweight", "scales", "qzeros")
_JOINED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def grid_of(grid: Grid, columns: int) -> Grid | str:
    """The grid in ONNX of a matrix with so many columns, or why there is none, as a predicate."""
    if grid.float8:
        return "has float8 weights, and MatMulNBits takes whole numbers"
    width = grid.columns_per_group(columns)
    block = next((each for each in BLOCKS if width % each == 0), None)
    if block is None:
        return f"has groups of {width} columns, and MatMulNBits takes 16, 32, 64, 128 or 256, or multiples of them"
    bits = next(each for each in WIDTHS if each >= grid.bits)
    return replace(grid, bits=bits, group_size=block, symmetric=False, scale_dtype=torch.float32, rows=1)


def laid_out(matrix: Quantized, grid: Grid) -> Quantized:
    """The same numbers on a grid of `grid_of`: codes as they are, scales and zero points once for each block."""
    times = matrix.codes.shape[1] // matrix.scale.shape[1] // grid.group_size
    scale, zero = (each.repeat_interleave(times, 1) for each in (matrix.scale.float(), matrix.zero))
    return Quantized(codes=matrix.codes, scale=scale, zero=zero, grid=grid)


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names in the format of Olive, which the builder reads without computing.

    Returns:
        qweight uint8 [O, I * bits / 8], lowest bits first; scales float32 [O, G]; qzeros uint8
        [O, ceil(G * bits / 8)].
    """
    bits = matrix.grid.bits
    return {
        "qweight": _bytes(matrix.codes, bits),
        "scales": matrix.scale.contiguous(),
        "qzeros": _bytes(matrix.zero, bits),
    }


def joined_last(name: str) -> int:
    """A key to sort tensors of a layer by: q, k and v in the order in which the builder joins them."""
    return next((place for place, part in enumerate(_JOINED, 1) if part in name), 0)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] in whole bytes of a row."""
    return pack_rows(codes, bits).view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous()


@dataclass(frozen=True)
class _Known:
    """A digest that was computed before."""

    digits: str

    def hexdigest(self) -> str:
        return self.digits


@dataclass
class Digests:
    """SHA-256 of what the nodes of a file must hold, part by part.

    The builder joins q, k and v to one matrix where it can; then a node has the rows of all three.
    """

    _modules: dict[str, list[Any]] = field(default_factory=dict)
    _joined: dict[str, list[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._modules)

    @classmethod
    def load(cls, kept: Mapping[str, Mapping[str, Sequence[str]]]) -> "Digests":
        """Those that `dump` gave."""
        modules, joined = (
            {name: [_Known(digits) for digits in whole] for name, whole in kept[key].items()}
            for key in ("modules", "joined")
        )
        return cls(modules, joined)

    def dump(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """As JSON can hold them."""
        return {
            key: {name: _hex(whole) for name, whole in found.items()}
            for key, found in (("modules", self._modules), ("joined", self._joined))
        }

    def add(self, module: str, packed: Mapping[str, Tensor]) -> None:
        """Note what `pack` gave of a module; those of a layer in the order of `joined_last`."""
        wholes = [self._modules.setdefault(module, [])]
        if module.endswith(_JOINED):
            wholes.append(self._joined.setdefault(f"{module.rpartition('.')[0]}.qkv_proj", []))
        for whole in wholes:
            whole.extend([sha256() for _ in PARTS[len(whole) :]])
            for part, found in zip(PARTS, whole, strict=True):
                found.update(packed[part].numpy().tobytes())

    def other(self, nodes: Mapping[str, tuple[str, ...]]) -> list[str]:
        """Modules whose codes, scales or zero points are not in a file as they were noted.

        Args:
            nodes: digests of the nodes of a file, by name.
        """
        found = {_module(name): digests for name, digests in nodes.items()}
        same = {name for name, whole in {**self._modules, **self._joined}.items() if found.get(name) == _hex(whole)}
        return [
            name for name in self._modules
            if name not in same and not (name.endswith(_JOINED) and f"{name.rpartition('.')[0]}.qkv_proj" in same)
        ]  # fmt: skip


def _hex(whole: list[Any]) -> tuple[str, ...]:
    return tuple(each.hexdigest() for each in whole)


def _module(node: str) -> str:
    """The module of a node: "/model/layers.0/attn/q_proj/MatMulNBits" is model.layers.0.self_attn.q_proj."""
    return node.strip("/").removesuffix("/MatMulNBits").replace("/attn/", "/self_attn/").replace("/", ".")
