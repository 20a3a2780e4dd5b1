"""Matrices on ggml's block grids to the bytes of a GGUF file, and back.

A block is a few fields one after the other. Codes (and most scales of scales) lie in them as planes: some bits of each
number, several numbers to a byte, and numbers that share a byte a run apart. With runs of n bytes and b bits to a
number, byte l of a run holds the numbers l, l + n, l + 2n, ..., lowest bits first. So a type's layout is a row of data.
The formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (structs) and ggml-quants.c.

Shapes: O output rows, I input columns, B blocks, S blocks of a row, s sub-blocks of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.model.gguf.block_types import BlockType
from compress.quant.blocks import Blocked


@dataclass(frozen=True)
class _Plane:
    """`bits` bits of each number, from bit `shift` on, in runs of `run` bytes."""

    shift: int
    bits: int
    run: int

    def bytes_of(self, numbers: int) -> int:
        return numbers * self.bits // 8

    def pack(self, numbers: Tensor) -> Tensor:
        """uint8 [B, bytes] of uint8 [B, numbers]."""
        parts = (numbers >> self.shift & (1 << self.bits) - 1).view(len(numbers), -1, 8 // self.bits, self.run)
        packed = parts[:, :, 0].clone()
        for position in range(1, 8 // self.bits):
            packed |= parts[:, :, position] << position * self.bits
        return packed.flatten(1)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [B, numbers], with this plane's bits at their place, of uint8 [B, bytes]."""
        runs = packed.reshape(len(packed), -1, self.run)
        mask = (1 << self.bits) - 1
        parts = [(runs >> position * self.bits & mask) << self.shift for position in range(8 // self.bits)]
        return torch.stack(parts, 2).flatten(1)


_D, _M, _SIX_BIT_PAIRS = "d", "m", "six-bit pairs"
_SCALES, _CODES = "scales", "codes"
_Field = str | tuple[str, _Plane]


def _codes(shift: int, bits: int, run: int) -> _Field:
    return _CODES, _Plane(shift, bits, run)


def _scales(shift: int, bits: int, run: int) -> _Field:
    return _SCALES, _Plane(shift, bits, run)


_FIELDS: dict[str, tuple[_Field, ...]] = {
    "q4_0": (_D, _codes(0, 4, 16)),
    "q4_1": (_D, _M, _codes(0, 4, 16)),
    "q5_0": (_D, _codes(4, 1, 1), _codes(0, 4, 16)),
    "q5_1": (_D, _M, _codes(4, 1, 1), _codes(0, 4, 16)),
    "q8_0": (_D, _codes(0, 8, 32)),
    "iq4_nl": (_D, _codes(0, 4, 16)),
    "q2_k": (_scales(0, 4, 16), _codes(0, 2, 32), _D, _M),
    "q3_k": (_codes(2, 1, 32), _codes(0, 2, 32), _scales(0, 4, 8), _scales(4, 2, 4), _D),
    "q4_k": (_D, _M, _SIX_BIT_PAIRS, _codes(0, 4, 32)),
    "q5_k": (_D, _M, _SIX_BIT_PAIRS, _codes(4, 1, 32), _codes(0, 4, 32)),
    "q6_k": (_codes(0, 4, 64), _codes(4, 2, 32), _scales(0, 8, 16), _D),
}
_SIGNED_BYTES = {"q8_0": (_CODES,), "q6_k": (_SCALES,)}  # in two's complement; others count from the smallest


def pack(matrix: Blocked) -> Tensor:
    """The bytes of a matrix, uint8 [O, I / width * bytes of a block], row after row as ggml has them."""
    kind, blocks = matrix.type, matrix.d.numel()
    numbers = {_CODES: matrix.codes.reshape(blocks, -1), _SCALES: _joined_scales(matrix)}
    for name in _SIGNED_BYTES.get(kind.name, ()):
        numbers[name] = numbers[name] ^ 0x80
    parts = []
    for field in _FIELDS[kind.name]:
        if field == _D:
            parts.append(_half_bytes(matrix.d))
        elif field == _M:
            assert matrix.m is not None
            parts.append(_half_bytes(matrix.m))
        elif field == _SIX_BIT_PAIRS:
            parts.append(_pack_pairs(numbers[_SCALES]))
        else:
            parts.append(field[1].pack(numbers[field[0]]))  # type: ignore[union-attr]
    return torch.cat(parts, 1).view(len(matrix.codes), -1)


def unpack(packed: Tensor, kind: BlockType) -> Blocked:
    """The matrix of these bytes, uint8 [O, row bytes]; on any bytes, so that reading is total."""
    rows = len(packed)
    blocks = packed.reshape(-1, kind.bytes)
    found: dict[str, Tensor] = {}
    place = 0

    def take(count: int) -> Tensor:
        nonlocal place
        place += count
        return blocks[:, place - count : place]

    per_block = {_CODES: kind.width, _SCALES: kind.sub_blocks * (2 if kind.has_min else 1)}
    for field in _FIELDS[kind.name]:
        if isinstance(field, str):
            if field == _SIX_BIT_PAIRS:
                found[_SCALES] = _unpack_pairs(take(12))
            else:
                found[field] = take(2).contiguous().view(torch.float16).view(rows, -1)
            continue
        name, plane = field
        bits = plane.unpack(take(plane.bytes_of(per_block[name])))
        found[name] = found[name] | bits if name in found else bits
    assert place == kind.bytes
    for name in _SIGNED_BYTES.get(kind.name, ()):
        found[name] = found[name] ^ 0x80
    scales, mins = _split_scales(found.get(_SCALES), kind, rows)
    return Blocked(kind, found[_CODES].view(rows, -1), found[_D], found.get(_M), scales, mins)


def row_bytes(kind: BlockType, columns: int) -> int:
    """Bytes of a row of so many columns, which the block's width divides."""
    return columns // kind.width * kind.bytes


def _half_bytes(numbers: Tensor) -> Tensor:
    return numbers.flatten().view(torch.uint8).view(-1, 2)  # a column may have any stride


def _joined_scales(matrix: Blocked) -> Tensor:
    """Scales, then minima, of each block, counted from the smallest: uint8 [B, n]; empty without sub-blocks."""
    kind = matrix.type
    if matrix.scales is None or kind.scale_range is None:
        return matrix.codes.new_empty(0)
    parts: Sequence[Tensor] = [each for each in (matrix.scales, matrix.mins) if each is not None]
    return torch.cat([(each - kind.scale_range[0]).to(torch.uint8).view(-1, kind.sub_blocks) for each in parts], 1)


def _split_scales(joined: Tensor | None, kind: BlockType, rows: int) -> tuple[Tensor | None, Tensor | None]:
    if joined is None or kind.scale_range is None:
        return None, None
    numbers = joined.to(torch.int16) + kind.scale_range[0]
    scales = numbers[:, : kind.sub_blocks].reshape(rows, -1)
    return scales, numbers[:, kind.sub_blocks :].reshape(rows, -1) if kind.has_min else None


def _pack_pairs(numbers: Tensor) -> Tensor:
    """12 bytes of 8 scales and 8 minima of 6 bits, uint8 [B, 16]: the upper two bits of the last four ride along."""
    first, last = numbers.view(-1, 2, 2, 4).unbind(2)  # [B, 2, 4] of scales and of minima
    low = (first | last >> 4 << 6).flatten(1)
    return torch.cat([low, last[:, 0] & 15 | (last[:, 1] & 15) << 4], 1)


def _unpack_pairs(packed: Tensor) -> Tensor:
    low, mixed = packed[:, :8].reshape(-1, 2, 4), packed[:, 8:]
    nibbles = torch.stack([mixed & 15, mixed >> 4], 1)
    return torch.stack([low & 63, nibbles | low >> 6 << 4], 2).flatten(1)
