"""llama.cpp's own quantizer, from the library inside the package xllamacpp, by ctypes."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.formats.ggml import row_bytes, unpack
from compress.model.gguf.block_types import BlockType
from compress.quant.blocks import Blocked


def library() -> Path | None:
    """Where it lies; None where the package is not installed."""
    spec = find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("xllamacpp*.so"), None)


@cache
def _ggml() -> ctypes.CDLL:
    ggml = ctypes.CDLL(str(library()))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return ggml


def quantized_by_llama(weight: Tensor, kind: BlockType, importance: Tensor | None) -> Blocked:
    """What `ggml_quantize_chunk` makes of a matrix [O, I], given the mean square of each input [I] or not."""
    rows, columns = weight.shape
    source = weight.float().contiguous().numpy()
    written = np.zeros((rows, row_bytes(kind, columns)), np.uint8)
    weights = None if importance is None else importance.float().contiguous().numpy()
    pointer = None if weights is None else weights.ctypes.data
    size = _ggml().ggml_quantize_chunk(kind.number, source.ctypes.data, written.ctypes.data, 0, rows, columns, pointer)
    assert size == written.nbytes
    return unpack(torch.from_numpy(written), kind)
