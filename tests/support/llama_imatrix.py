"""An importance matrix as llama.cpp's quantizer reads it: by the functions of the library inside xllamacpp, by ctypes.

The steps are those of `load_imatrix` in llama.cpp's tools/quantize/quantize.cpp, which is in no library.
"""

import ctypes
from pathlib import Path
from typing import NamedTuple

import numpy as np
from llama_quantizer import library
from numpy.typing import NDArray

_P, _I, _S = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
_TYPES = {
    "gguf_init_from_file": (_P, None), "gguf_find_key": (_I, [_P, _S]), "gguf_get_val_u32": (ctypes.c_uint32, [_P, _I]),
    "gguf_get_val_str": (_S, [_P, _I]), "gguf_get_arr_n": (ctypes.c_size_t, [_P, _I]),
    "gguf_get_arr_str": (_S, [_P, _I, ctypes.c_size_t]), "gguf_get_n_tensors": (_I, [_P]),
    "gguf_get_tensor_name": (_S, [_P, _I]), "ggml_get_tensor": (_P, [_P, _S]), "ggml_get_data_f32": (_P, [_P]),
    "ggml_nelements": (_I, [_P]), "gguf_free": (None, [_P]), "ggml_free": (None, [_P]),
}  # fmt: skip


class _Parameters(ctypes.Structure):
    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(ctypes.c_void_p))]


class Imatrix(NamedTuple):
    """Its keys, and the mean square of each input of each tensor, by the tensor's name."""

    datasets: list[str]
    chunks: int
    chunk_size: int
    means: dict[str, NDArray[np.float32]]


def read_by_llama(file: Path) -> Imatrix:
    ggml = ctypes.CDLL(str(library()))
    for name, (result, arguments) in _TYPES.items():
        getattr(ggml, name).restype = result
        if arguments is not None:
            getattr(ggml, name).argtypes = arguments
    tensors = ctypes.c_void_p()
    ggml.gguf_init_from_file.argtypes = [_S, _Parameters]
    opened = ggml.gguf_init_from_file(str(file).encode(), _Parameters(False, ctypes.pointer(tensors)))
    assert opened, "llama.cpp reads no GGUF file"
    names = ("imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size")
    keys = [ggml.gguf_find_key(opened, name.encode()) for name in names]
    assert min(keys) >= 0 and ggml.gguf_get_val_str(opened, ggml.gguf_find_key(opened, b"general.type")) == b"imatrix"

    def values(name: str) -> NDArray[np.float32]:
        tensor = ggml.ggml_get_tensor(tensors, name.encode())
        count = ggml.ggml_nelements(tensor)
        array = ctypes.cast(ggml.ggml_get_data_f32(tensor), ctypes.POINTER(ctypes.c_float * count))
        return np.array(array.contents, np.float32)

    there = [ggml.gguf_get_tensor_name(opened, place).decode() for place in range(ggml.gguf_get_n_tensors(opened))]
    sums = [name.removesuffix(".in_sum2") for name in there if name.endswith(".in_sum2")]
    assert sorted(there) == sorted(name + end for name in sums for end in (".in_sum2", ".counts"))
    found = Imatrix(
        [ggml.gguf_get_arr_str(opened, keys[0], n).decode() for n in range(ggml.gguf_get_arr_n(opened, keys[0]))],
        ggml.gguf_get_val_u32(opened, keys[1]),
        ggml.gguf_get_val_u32(opened, keys[2]),
        {name: values(f"{name}.in_sum2") / values(f"{name}.counts")[0] for name in sums},
    )
    ggml.gguf_free(opened)
    ggml.ggml_free(tensors)
    return found
