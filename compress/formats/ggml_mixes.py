"""Which tensor of a model gets which block type in a file of a mix such as q4_k_m: llama.cpp's choice. Never torch.

The rules are those of `llama_tensor_get_type` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
for models without experts, as its quantizer applies them without an importance matrix (given one, its q4_0 and q5_0
store the first layers' down projections with minima). Left out: types without a row in `BLOCK_TYPES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from compress.model.gguf.block_types import BLOCK_TYPES

Role = Literal["embeddings", "head", "q", "k", "v", "qkv", "o", "gate", "up", "down"]

F16 = "f16"
_FALLBACKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_LAYERS_OF_70B = 80  # a size that llama.cpp tells by its layers, and whose few value heads it stores finer


@dataclass(frozen=True)
class Model:
    """What the choice depends on.

    Args:
        layers: number of decoder layers.
        heads: of queries.
        key_value_heads: of keys and values.
        tied: whether the head is the embeddings' matrix.
    """

    layers: int
    heads: int
    key_value_heads: int
    tied: bool

    @property
    def sharing(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads // self.key_value_heads


@dataclass(frozen=True)
class Mix:
    """What a file's types are, beside the usual one.

    Args:
        usual: type of all that nothing else is said of.
        v: of the value projections (or of fused query, key and value projections).
        o: of the output projections.
        down: of the down projections.
        more: type of the value and down projections of layers that are worth more bits: see `_worth_more`.
        v_first: type of the value projections of the first layers, and how many these are.
        down_first: type of the down projections of the first layers, and of how many there is one.
        v_shared: type of the value projections where at least four query heads share one.
    """

    usual: str
    v: str | None = None
    o: str | None = None
    down: str | None = None
    more: str | None = None
    v_first: tuple[str, int] | None = None
    down_first: tuple[str, int] | None = None
    v_shared: str | None = None
    number: int = field(kw_only=True)  # llama.cpp's `llama_ftype`, general.file_type in the file


MIXES: Mapping[str, Mix] = {
    "q4_0": Mix("q4_0", number=2),
    "q4_1": Mix("q4_1", number=3),
    "q8_0": Mix("q8_0", number=7),
    "q5_0": Mix("q5_0", number=8),
    "q5_1": Mix("q5_1", number=9),
    "q2_k": Mix("q2_k", v="q3_k", o="q3_k", down="q3_k", v_shared="q4_k", number=10),
    "q3_k_s": Mix("q3_k", number=11),
    "q3_k_m": Mix("q3_k", v="q4_k", o="q4_k", down="q4_k", v_first=("q5_k", 2), down_first=("q5_k", 16), number=12),
    "q3_k_l": Mix("q3_k", v="q5_k", o="q5_k", down="q5_k", number=13),
    "q4_k_s": Mix("q4_k", v_first=("q5_k", 4), down_first=("q5_k", 8), number=14),
    "q4_k_m": Mix("q4_k", more="q6_k", number=15),
    "q5_k_s": Mix("q5_k", number=16),
    "q5_k_m": Mix("q5_k", more="q6_k", number=17),
    "q6_k": Mix("q6_k", number=18),
    "iq4_nl": Mix("iq4_nl", v_shared="q5_k", down_first=("q5_k", 8), number=25),
}


def tensor_type(mix: str, role: Role, columns: int, model: Model, layer: int = 0) -> tuple[str, bool]:
    """The type of a matrix in a file, and whether it is not the mix's because of its width.

    Args:
        mix: a key of `MIXES`.
        role: what the matrix does in the model.
        columns: its inputs.
        model: that it belongs to.
        layer: its layer, from 0; of no matter for embeddings and head.

    Returns:
        A key of `BLOCK_TYPES`, or "f16".
    """
    row = MIXES[mix]
    if role == "head" or (role == "embeddings" and model.tied):
        fits = columns % BLOCK_TYPES[row.usual].width == 0
        wanted = "q8_0" if row.usual == "q8_0" or not fits else "q6_k"
        found = fitting(wanted, columns)
        return found, not fits or found != wanted
    wanted = _wanted(row, role, model, layer)
    found = fitting(wanted, columns)
    return found, found != wanted


def _wanted(row: Mix, role: Role, model: Model, layer: int) -> str:
    if role in ("v", "qkv"):
        found = row.v or row.usual
        if row.v_shared is not None and model.sharing >= 4:
            found = row.v_shared
        elif row.more is not None and _worth_more(layer, model.layers):
            found = row.more
        elif row.v_first is not None and layer < row.v_first[1]:
            found = row.v_first[0]
        few_heads = model.layers == _LAYERS_OF_70B and model.sharing > 1
        return "q5_k" if few_heads and found in ("q3_k", "q4_k") else found
    if role == "down":
        if row.more is not None and _worth_more(layer, model.layers):
            return row.more
        if row.down_first is not None and layer < model.layers // row.down_first[1]:
            return row.down_first[0]
        return row.down or row.usual
    return row.o or row.usual if role == "o" else row.usual


def _worth_more(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third one between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def fitting(wanted: str, columns: int) -> str:
    """The type itself where its blocks fill a row, else the one that stands in for it."""
    if columns % BLOCK_TYPES[wanted].width == 0:
        return wanted
    found = _FALLBACKS.get(wanted, F16)
    return found if found == F16 or columns % BLOCK_TYPES[found].width == 0 else F16
