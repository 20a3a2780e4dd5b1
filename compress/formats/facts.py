"""What plans and reports need to know of the checkpoint formats: names, dtypes of scales, bytes on disk.

Never imports torch. A format has one name everywhere, the one that its own library gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from compress.model.gguf.block_types import BLOCK_TYPES
from compress.model.layout import Planned

PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED = "pack-quantized", "int-quantized", "float-quantized"
GPTQ, TORCHAO, GGUF = "gptq", "torchao", "gguf"


@dataclass(frozen=True)
class Facts:
    """A format, as far as the rest of the program treats it differently.

    Args:
        stock: why stock transformers is not asked about a checkpoint; None where it is.
        runs_on_cpu: whether stock transformers multiplies its whole numbers on a CPU, so that its speed is worth
            measuring there.
    """

    stock: str | None = None
    runs_on_cpu: bool = False


FACTS = {
    PACK_QUANTIZED: Facts(),
    INT_QUANTIZED: Facts(),
    FLOAT_QUANTIZED: Facts(),
    GPTQ: Facts(stock="transformers opens the gptq format with optimum and gptqmodel installed; not asked here"),
    TORCHAO: Facts(runs_on_cpu=True),
    GGUF: Facts(stock="transformers has no blocks of ggml; the .gguf file is for llama.cpp"),
}


def facts_of(config: Mapping[str, Any]) -> Facts:
    """The facts of a checkpoint's format, from its config.json; those of a dense one are the usual ones."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    return FACTS.get(str(method), Facts())


READABLE = "readable are compressed-tensors pack-quantized, int-quantized, float-quantized, gptq and torchao"


class Matrix(Protocol):
    """A matrix that a stage will quantize (compress/stages/quantize/plan.py)."""

    @property
    def name(self) -> str:
        """Of its module."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def bits(self) -> int:
        """Width of a code."""

    @property
    def group_size(self) -> int:
        """Columns that share a scale, -1 for the row."""

    @property
    def symmetric(self) -> bool:
        """Whether it has no zero points."""

    @property
    def rows(self) -> int:
        """Rows that share a scale beside the columns of a group; -1 means all of them."""

    @property
    def dtype(self) -> str:
        """Of the codes: int, or fp."""

    @property
    def inputs(self) -> str | None:
        """How its inputs are rounded."""

    @property
    def block(self) -> str | None:
        """Its block type of ggml."""

    @property
    def groups(self) -> int:
        """Scales in a row."""

    @property
    def scales(self) -> int:
        """Scales in all."""


class Stored(Protocol):
    """A tensor in a file (compress/model/checkpoint.py)."""

    @property
    def bytes(self) -> int:
        """On disk."""


def scale_dtype(layout: str, model: str) -> str:
    """In which dtype a format stores scales, in safetensors' spelling.

    Args:
        layout: name of the format.
        model: dtype in which the model runs by default (`compress.model.shapes.model_dtype`).

    compressed-tensors' loaders turn scales into the dtype in which the model is opened, whatever the file has. Codes
    belong to the scales that they were computed with, so those are 16 bits wide: bf16 is exact in bf16 and in float32,
    and a model of float32 is opened in either. A float16 model keeps float16, which is what it is opened in. torchao
    leaves scales as they are and runs 4-bit weights in their dtype, so that is the model's; gptq is always float16.
    """
    if layout == GPTQ:
        return "F16"
    return model if layout == TORCHAO or model == "F16" else "BF16"


def packed(layout: str, matrix: Matrix, model: str = "BF16") -> dict[str, Planned]:
    """The tensors that hold a quantized matrix in a format, by their names in the module, for a model of this dtype.

    A matrix whose inputs may come to have a static scale is taken to get one.
    """
    (rows, columns), groups, bits = matrix.shape, matrix.groups, matrix.bits
    if matrix.block is not None:
        kind = BLOCK_TYPES[matrix.block]
        return {"weight_blocks": Planned("U8", (rows, columns // kind.width * kind.bytes))}
    scales = scale_dtype(layout, model)
    if layout == TORCHAO:
        found = {"_weight_qdata": Planned("I8", (rows, columns)), "_weight_scale": Planned(scales, (rows, groups))}
        return found | ({"_weight_zero_point": Planned("I8", (rows, groups))} if bits == 4 else {})
    if layout in (INT_QUANTIZED, FLOAT_QUANTIZED):
        shape = (1,) if matrix.rows == -1 else (matrix.scales // groups, groups)
        found = {"weight": Planned("F8_E4M3" if matrix.dtype == "fp" else "I8", (rows, columns))}
        found["weight_scale"] = Planned(scales, shape)
        return found | ({} if matrix.inputs == "dynamic" else {"input_scale": Planned(scales, (1,))})
    if layout == GPTQ:
        return {
            "qweight": Planned("I32", (columns * bits // 32, rows)),
            "qzeros": Planned("I32", (groups, rows * bits // 32)),
            "scales": Planned(scales, (groups, rows)),
            "g_idx": Planned("I32", (columns,)),
        }
    found = {
        "weight_packed": Planned("I32", (rows, -(-columns * bits // 32))),
        "weight_scale": Planned(scales, (rows, groups)),
        "weight_shape": Planned("I64", (2,)),
    }
    return found | ({} if matrix.symmetric else {"weight_zero_point": Planned("I32", (-(-rows * bits // 32), groups))})


def bytes_on_disk(layout: str, matrix: Matrix, model: str = "BF16") -> int:
    """Bytes of the tensors that hold a quantized matrix in a format, for a model of this dtype."""
    return sum(tensor.bytes for tensor in packed(layout, matrix, model).values())


def measured_bits(tensors: Mapping[str, Stored], shapes: Mapping[str, tuple[int, int]]) -> float:
    """Bits per quantized weight, from the headers of a written checkpoint: all that it stores of them but biases.

    Args:
        tensors: of the checkpoint.
        shapes: (O, I) of the quantized matrices, by module.
    """
    stored = 0
    for name, info in tensors.items():
        module, _, part = name.rpartition(".")
        stored += info.bytes if module in shapes and part != "bias" else 0
    return 8 * stored / sum(rows * columns for rows, columns in shapes.values())
