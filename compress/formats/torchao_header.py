"""What torchao says of tensors in the headers of safetensors files, told without it: so long are those headers.

torchao's own `flatten_tensor_state_dict` writes the files (compress/formats/torchao.py); the tests hold that it says
the same. Never imports torch.
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from compress.formats.facts import TORCHAO, Matrix, scale_dtype
from compress.model.shapes import DTYPE_NAMES


def metadata(matrices: Sequence[Matrix], others: Iterable[str], model: str) -> dict[str, str]:
    """What every file's header says of all tensors.

    Args:
        matrices: that are quantized.
        others: names of the other tensors.
        model: dtype in which the model runs by default ("BF16").
    """
    found = {f"{matrix.name}.weight": _described(matrix, model) for matrix in matrices}
    found |= {name: {"_type": "Tensor"} for name in others}
    return {name: json.dumps(said) for name, said in found.items()} | {"tensor_names": json.dumps(list(found))}


def _described(matrix: Matrix, model: str) -> dict[str, Any]:
    block = {"block_size": [1, matrix.shape[1] // matrix.groups]}
    dtype = {"dtype": _tagged("torch.dtype", DTYPE_NAMES[scale_dtype(TORCHAO, model)])}
    if matrix.bits == 8:
        rounding = {
            "granularity": _tagged("PerRow", {"dim": -1}),
            "mapping_type": _tagged("MappingType", "SYMMETRIC"),
            "reduce_range": False,
        }
        inputs = {"act_quant_kwargs": _tagged("QuantizeTensorToInt8Kwargs", rounding), "reduce_range": False}
        return _tagged("Int8Tensor", inputs | block | dtype) | {"_tensor_data_names": ["qdata", "scale"]}
    data = {"target_dtype": _tagged("torch.dtype", "int4")} | block | dtype
    named = {"activation_quantization": "int8_asym_per_token"}
    return _tagged("IntxUnpackedToInt8Tensor", data | named) | {"_tensor_data_names": ["qdata", "scale", "zero_point"]}


def _tagged(kind: str, data: Any) -> dict[str, Any]:
    return {"_type": kind, "_data": data}
