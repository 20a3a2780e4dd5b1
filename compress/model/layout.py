"""How tensors lie in safetensors files, so that a checkpoint's bytes are known before any is written. Never torch.

A file is 8 bytes (the header's length), the header (JSON, filled up with blanks to a multiple of 8) and the tensors one
after the other. The library that writes parts sorts tensors by the width of their dtypes and then by name. The format:
https://github.com/huggingface/safetensors#format
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MAX_SHARD_BYTES = 2_000_000_000
METADATA = {"format": "pt"}  # of every file
# In the order in which safetensors' writer puts them.
_WIDTHS = {
    "U64": 8, "I64": 8, "F64": 8, "F32": 4, "U32": 4, "I32": 4, "BF16": 2, "F16": 2, "U16": 2, "I16": 2, "F8_E4M3": 1,
    "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
_PLACES = {dtype: place for place, dtype in enumerate(_WIDTHS)}


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> str:
        """In safetensors' spelling."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""

    @property
    def bytes(self) -> int:
        """On disk."""


@dataclass(frozen=True)
class Planned:
    """A tensor that will be in a file: its dtype ("BF16") and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """On disk."""
        return _WIDTHS[self.dtype] * math.prod(self.shape)


Tensors = Mapping[str, Stored]


def encoded(header: Mapping[str, Any]) -> bytes:
    """What stands in front of a file's tensors: the header's length, and the header."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def merged_bytes(parts: Sequence[Tensors], metadata: Mapping[str, str], max_shard_bytes: int = MAX_SHARD_BYTES) -> int:
    """Bytes of the files that `compress.model.checkpoint.merge_parts` makes of parts.

    Args:
        parts: the tensors of each, by name.
        metadata: what every file says beside `METADATA`.
        max_shard_bytes: of a single file.
    """
    each = [_file_bytes([part], {}) for part in parts]
    if sum(each) <= max_shard_bytes:
        return _file_bytes(parts, metadata)
    return sum(_file_bytes([part], metadata) for part in parts) if metadata else sum(each)


def by_layer(tensors: Tensors, layers: str) -> list[Tensors]:
    """Tensors as the layer loop writes them: what lies outside the layers, then a part for each layer.

    Args:
        tensors: of a whole model, by name.
        layers: what the layers' names start with, such as "model.layers".
    """
    outside: dict[str, Stored] = {}
    inside: dict[int, dict[str, Stored]] = {}
    for name, info in tensors.items():
        rest = name.removeprefix(layers + ".")
        index = rest.partition(".")[0]
        if rest != name and index.isdecimal():
            inside.setdefault(int(index), {})[name] = info
        else:
            outside[name] = info
    return [outside, *(inside[index] for index in sorted(inside))]


def _file_bytes(parts: Sequence[Tensors], metadata: Mapping[str, str]) -> int:
    header: dict[str, Any] = {"__metadata__": {**METADATA, **metadata}}
    offset = 0
    for part in parts:
        for name, info in sorted(part.items(), key=lambda each: (_PLACES.get(each[1].dtype, len(_PLACES)), each[0])):
            end = offset + info.bytes
            header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [offset, end]}
            offset = end
    return len(encoded(header)) + offset
