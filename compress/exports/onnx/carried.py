"""Which codes of a checkpoint go into an ONNX file as they are, and what ONNX Runtime GenAI's builder can't have."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from compress.errors import ModelError
from compress.exports.onnx.codes import grid_of
from compress.exports.onnx.config import Target
from compress.formats.base import AnyGrid
from compress.formats.patterns import has_number
from compress.model.gguf.block_types import BlockType
from compress.quant.grid import Grid

HEAD = "lm_head"


@dataclass(frozen=True)
class Asked:
    """How a checkpoint is to be written.

    Args:
        kind: of matrices, "auto" or "f32".
        int8_inputs: whether the inputs of linears are rounded to 8 bits as it runs.
    """

    kind: str = "auto"
    int8_inputs: bool = False


def carried_grids(
    name: object,
    grids: Mapping[str, AnyGrid],
    columns: Callable[[str], int],
    linears: Collection[str],
    target: Target,
    asked: Asked,
) -> dict[str, Grid]:
    """Grids in ONNX of all linears; none of a dense checkpoint.

    Args:
        name: of the checkpoint, for messages.
        grids: of its quantized modules.
        columns: how many one of them has.
        linears: all of the layers.
        target: how the builder knows its family.
        asked: how it is to be written.

    Raises:
        ModelError: codes that the builder can't have, by name.
    """
    found = {} if asked.kind == "f32" else _grids(name, grids, columns)
    kept = [module for module in linears if module not in found]
    if found and not target.codes:
        raise ModelError(
            f"{name}: ONNX Runtime GenAI's builder misreads codes of a {target.architecture}; use --type f32 or "
            "--to gguf"
        )
    if found and kept:
        more = f" and {len(kept) - 1} more linears" if len(kept) > 1 else ""
        raise ModelError(
            f"{name}: {kept[0]}{more} kept their weights, and ONNX Runtime GenAI's builder takes all linears of the "
            "layers as codes or none; quantize them too (8 bits are kept as they are), or use --type f32"
        )
    if asked.int8_inputs and not found:
        raise ModelError(
            f"{name}: has no codes here, and ONNX Runtime rounds inputs only of linears that do; leave out "
            "--int8-inputs"
        )
    return found


def _grids(name: object, grids: Mapping[str, AnyGrid], columns: Callable[[str], int]) -> dict[str, Grid]:
    found: dict[str, Grid] = {}
    for module, grid in grids.items():
        if not has_number(module) and module != HEAD:
            continue  # embeddings, which become dense
        if isinstance(grid, BlockType):
            raise ModelError(f"{name}: {module} has codes on a grid of llama.cpp; use --to gguf, or --type f32")
        laid = grid_of(grid, columns(module) if grid.group_size == -1 else grid.group_size)
        if isinstance(laid, str):
            raise ModelError(f"{name}: {module} {laid}; use --type f32, or quantize it otherwise")
        found[module] = laid
    return found
