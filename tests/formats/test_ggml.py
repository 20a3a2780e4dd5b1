"""Bytes of ggml's blocks, against the gguf package: what it reads in them, and what it says of their sizes."""

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from compress.formats.ggml import pack, row_bytes, unpack
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant.blocks import Blocked

TYPES = list(BLOCK_TYPES.values())
each_type = pytest.mark.parametrize("kind", TYPES, ids=BLOCK_TYPES)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two float tensors agree in every bit, and in which of their numbers are none."""
    none = left.isnan()
    equal = left.view(torch.int32) == right.view(torch.int32)
    return left.shape == right.shape and torch.equal(none, right.isnan()) and bool((equal | none).all())


def read_by_gguf(packed: Tensor, kind: BlockType) -> Tensor:
    with np.errstate(all="ignore"):
        return torch.from_numpy(dequantize(packed.numpy(), GGMLQuantizationType(kind.number)))


def random_matrix(kind: BlockType, rows: int, blocks: int, seed: int) -> Blocked:
    made = torch.Generator().manual_seed(seed)
    whole = {"generator": made, "dtype": torch.int16}
    scales = mins = None
    if kind.scale_range is not None:
        low, high = kind.scale_range
        scales = torch.randint(low, high + 1, (rows, blocks * kind.sub_blocks), **whole)
        mins = torch.randint(low, high + 1, scales.shape, **whole) if kind.has_min else None
    d, m = torch.randn(2, rows, blocks, generator=made).to(torch.float16)
    codes = torch.randint(len(kind.levels), (rows, blocks * kind.width), generator=made, dtype=torch.uint8)
    return Blocked(kind, codes, d, m if kind.has_min else None, scales, mins)


@each_type
def test_rows_of_data_agree_with_gguf(kind: BlockType) -> None:
    known = GGMLQuantizationType(kind.number)
    assert known.name.lower() == kind.name
    assert GGML_QUANT_SIZES[known] == (kind.width, kind.bytes)
    assert row_bytes(kind, 3 * kind.width) == 3 * kind.bytes


@each_type
@pytest.mark.parametrize("rows, blocks", [(1, 1), (3, 5), (17, 2)])
def test_packed_matrix_is_what_gguf_reads(kind: BlockType, rows: int, blocks: int) -> None:
    matrix = random_matrix(kind, rows, blocks, seed=rows)
    packed = pack(matrix)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, row_bytes(kind, blocks * kind.width))
    assert same_bits(matrix.dequantize(), read_by_gguf(packed, kind))


@each_type
def test_unpacked_matrix_is_the_packed_one(kind: BlockType) -> None:
    matrix = random_matrix(kind, 5, 3, seed=0)
    found = unpack(pack(matrix), kind)
    for name in ("codes", "d", "m", "scales", "mins"):
        was, is_now = getattr(matrix, name), getattr(found, name)
        assert (was is None) == (is_now is None), name
        assert was is None or (was.dtype == is_now.dtype and torch.equal(was, is_now)), name


@each_type
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_bytes_are_read_as_gguf_reads_them(kind: BlockType, data: st.DataObject) -> None:
    packed = torch.from_numpy(data.draw(arrays(np.uint8, (2, 2 * kind.bytes), elements=st.integers(0, 255))))
    matrix = unpack(packed, kind)
    assert same_bits(matrix.dequantize(), read_by_gguf(packed, kind))
    assert torch.equal(pack(matrix), packed)


@each_type
@pytest.mark.parametrize("byte", [0, 0x80, 0xFF], ids=hex)
@pytest.mark.parametrize("scale", [0.0, 6e-8, 65504.0, -65504.0])
def test_extremes(kind: BlockType, byte: int, scale: float) -> None:
    matrix = unpack(torch.full((1, kind.bytes), byte, dtype=torch.uint8), kind)
    half = torch.full((1, 1), scale, dtype=torch.float16)
    matrix = Blocked(kind, matrix.codes, half, half if kind.has_min else None, matrix.scales, matrix.mins)
    assert same_bits(matrix.dequantize(), read_by_gguf(pack(matrix), kind))
