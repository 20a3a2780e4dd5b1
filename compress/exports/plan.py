"""About how many bytes an export takes, from what is planned of the result alone. Never imports torch.

What its tokenizer and its graph take is not counted: a few MB, of SmolLM2-135M 2 to 3 in a hundred.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.exports.gguf.fits import WIDTH, block_of
from compress.formats.facts import Matrix
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.model.shapes import Shapes, find_modules, is_tied, model_dtype
from compress.recipe.export import ExportSpec

_ITEM = {"F32": 4, "F16": 2, "BF16": 2}
_OPENVINO_WIDTHS = (4, 8)  # of codes
_ONNX_WIDTHS, _ONNX_BLOCK = (2, 4, 8), 256  # of codes; most columns that share a scale


@dataclass(frozen=True)
class Foreseen:
    """What is known of a result before there is one.

    Args:
        shapes: of its tensors, matrices dense.
        layout: its format by its library's own name; None: dense.
        matrices: those that are quantized.
    """

    shapes: Shapes
    layout: str | None = None
    matrices: Sequence[Matrix] = ()


def export_bytes(spec: ExportSpec, result: Foreseen) -> int:
    """Of the files that an export leaves."""
    quantized = {matrix.name: matrix for matrix in result.matrices} if spec.type == "auto" else {}
    if spec.to == "onnx":  # whose embeddings are dense
        quantized.pop(find_modules(result.shapes).embeddings, None)
    own = "F32" if spec.to == "onnx" else model_dtype(result.shapes)
    dense = own if spec.type == "auto" else spec.type.upper()
    by = {"gguf": _in_gguf, "onnx": _in_onnx, "openvino": _in_openvino}[spec.to]
    return sum(by(quantized.get(name), shape, dense) for name, shape in _tensors(result))


def disk_bytes(spec: ExportSpec, result: Foreseen) -> int:
    """Free space that it wants in the work folder; the output has the same files by links."""
    written = export_bytes(spec, result)
    if spec.to == "openvino":  # the model before its codes are put in, and what is traced, unless those are links
        dense = export_bytes(spec, Foreseen(result.shapes))
        return written + (2 if result.matrices else 1) * dense
    return 2 * written if spec.to == "onnx" and result.matrices else written  # what the builder reads lies beside it


def _tensors(result: Foreseen) -> list[tuple[str, tuple[int, ...]]]:
    """Modules and shapes of all tensors; a head that is the embeddings comes once, unless it is quantized."""
    shapes = result.shapes
    modules = find_modules(shapes)
    skipped = f"{modules.head}.weight" if is_tied(shapes, modules) else ""
    found = [(name.removesuffix(".weight"), info.shape) for name, info in shapes.tensors.items() if name != skipped]
    apart = [each for each in result.matrices if each.name == modules.head and modules.head not in dict(found)]
    return [*found, *((each.name, each.shape) for each in apart)]


def _in_gguf(matrix: Matrix | None, shape: tuple[int, ...], dense: str) -> int:
    count = math.prod(shape)
    if len(shape) < 2:
        return 4 * count
    name = None if matrix is None else _block(matrix)
    if dense == "Q8_0":
        name = "q8_0" if shape[1] % WIDTH == 0 else None
    if name is None:
        return _ITEM.get(dense, 2) * count
    block = BLOCK_TYPES[name]
    return count // block.width * block.bytes


def _block(matrix: Matrix) -> str | None:
    columns = matrix.shape[1] if matrix.group_size == -1 else matrix.group_size
    return None if matrix.dtype == "fp" else block_of(matrix.bits, matrix.symmetric, columns)


def _in_onnx(matrix: Matrix | None, shape: tuple[int, ...], dense: str) -> int:
    if matrix is None or len(shape) < 2:
        return _ITEM[dense] * math.prod(shape)
    (rows, columns), bits = shape, next(each for each in _ONNX_WIDTHS if each >= matrix.bits)
    width = columns if matrix.group_size == -1 else matrix.group_size
    groups = columns // math.gcd(width, _ONNX_BLOCK)
    return rows * (columns * bits // 8 + 4 * groups + -(-groups * bits // 8))


def _in_openvino(matrix: Matrix | None, shape: tuple[int, ...], dense: str) -> int:
    if len(shape) < 2:
        return 4 * math.prod(shape)
    if matrix is None:
        return _ITEM[dense] * math.prod(shape)
    (rows, columns), bits = shape, next(each for each in _OPENVINO_WIDTHS if each >= matrix.bits)
    groups = 1 if matrix.group_size == -1 else columns // matrix.group_size
    return rows * columns * bits // 8 + rows * groups * 2 + (0 if matrix.symmetric else -(-rows * groups * bits // 8))
