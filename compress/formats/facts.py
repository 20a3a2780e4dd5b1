"""What plans and reports need to know of the checkpoint formats: names, dtypes of scales, bytes on disk.

Never imports torch. A format has one name everywhere, the one that its own library gives it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED = "pack-quantized", "int-quantized", "float-quantized"
GPTQ, TORCHAO = "gptq", "torchao"


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


def bytes_on_disk(layout: str, matrix: Matrix, model: str = "BF16") -> int:
    """Bytes of the tensors that hold a quantized matrix in a format, for a model of this dtype."""
    rows, columns = matrix.shape
    scales, scale_bytes = matrix.scales, 4 if scale_dtype(layout, model) == "F32" else 2
    if layout == TORCHAO:
        return rows * columns + (scale_bytes + (matrix.bits == 4)) * scales
    if layout in (INT_QUANTIZED, FLOAT_QUANTIZED):
        return rows * columns + scale_bytes * (scales + (matrix.inputs != "dynamic"))
    if layout == GPTQ:
        return (rows * columns + scales) * matrix.bits // 8 + scale_bytes * scales + 4 * columns
    zeros = 0 if matrix.symmetric else 4 * matrix.groups * -(-rows * matrix.bits // 32)
    return 4 * rows * -(-columns * matrix.bits // 32) + scale_bytes * scales + zeros + 16


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
