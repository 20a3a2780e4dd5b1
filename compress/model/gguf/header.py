"""Headers of GGUF files: keys, and where each tensor lies. Never imports torch.

Read here and not with gguf's GGUFReader, which takes 20 us for each token of a vocabulary and answers a damaged file
with whatever numpy says of it. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import glob
import mmap
import re
import struct
from array import array
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compress.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.[^.]*)?")


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file.

    Args:
        file: that holds it.
        type: ggml's number of its storage type.
        shape: with the dimension that moves fastest last, as torch has it.
        offset: of its first byte in the file.
        bytes: it takes there.
    """

    file: Path
    type: int
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class Gguf:
    """A GGUF file, or all parts of one that was split.

    Args:
        parts: the files, in order.
        keys: of the header: numbers, booleans, strings and lists of them.
        tensors: of all parts, by name.
    """

    parts: tuple[Path, ...]
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Name of the architecture, in llama.cpp's spelling."""
        return str(self.keys.get("general.architecture"))

    def error(self, reason: str) -> ModelError:
        """An error about this model."""
        return ModelError(f"model: {self.parts[0]}: {reason}")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its first bytes.

    Raises:
        ModelError: a file that can't be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read ({error.strerror}); make it readable") from error


def parts_of(file: Path) -> list[Path]:
    """The files of a model that was split, those that are there, by the name of one of them; of another, itself."""
    if (named := _PART.fullmatch(file.name)) is None:
        return [file]
    stem, ending = glob.escape(named[1]), glob.escape(named[4] or "")
    return sorted(file.parent.glob(f"{stem}-[0-9][0-9][0-9][0-9][0-9]-of-{named[3]}{ending}"))


def open_gguf(path: Path) -> Gguf:
    """Read the header of a GGUF file, and of the other parts if it is one of a split set.

    Args:
        path: the file; any part will do.

    Raises:
        ModelError: cut short, damaged, big-endian, of an old version, or without all of its parts.
    """
    given = _read(path)
    count = given.keys.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return given
    named = _PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise given.error(
            f"is one of the {count} parts of a split model, but its name does not say where the others are; name them "
            f"NAME-00001-of-{count:05d}.gguf and so on, or join them with llama-gguf-split --merge"
        )
    files = [path.with_name(f"{named[1]}-{no:05d}-of-{named[3]}{named[4] or ''}") for no in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise given.error(
            f"is one of the {count} parts of a split model; {', '.join(missing)} missing, put all parts in one folder"
        )
    return _join([_read(file) for file in files])


def _join(parts: list[Gguf]) -> Gguf:
    tensors: dict[str, GgufTensor] = {}
    for no, part in enumerate(parts):
        if part.keys.get("split.no") != no or part.keys.get("split.count") != len(parts):
            raise part.error(
                f"says that it is part {part.keys.get('split.no', '?')} (from 0) of {part.keys.get('split.count', '?')}"
                f", its name says {no} of {len(parts)}; download the parts again"
            )
        twice = tensors.keys() & part.tensors.keys()
        if twice:
            raise part.error(f"{min(twice)} is in an earlier part too; download the parts again")
        tensors |= part.tensors
    whole = Gguf(tuple(path for part in parts for path in part.parts), parts[0].keys, tensors)
    said = parts[0].keys.get("split.tensors.count", len(tensors))
    if said != len(tensors):
        raise whole.error(f"its parts hold {len(tensors)} tensors, its header says {said}; download the parts again")
    return whole


def _read(path: Path) -> Gguf:
    if not is_gguf(path):
        raise ModelError(f"model: {path} is no GGUF file, whatever its name says; download it again")
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _Reader(path, data).header()
    except _CutError as error:
        raise ModelError(f"model: {path} is cut short in its header; download it again") from error
    except (ValueError, OverflowError) as error:
        raise ModelError(f"model: {path} has a damaged header ({error}); download it again") from error


class _CutError(Exception):
    """The file ends before what its header says."""


class _Reader:
    """Walks a header from its front."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, len(MAGIC)

    def header(self) -> Gguf:
        version = self.unpack("I")[0]
        if version & 0xFFFF == 0:
            raise ModelError(
                f"model: {self.path} is big-endian; turn a copy of it with: gguf-convert-endian COPY.gguf little"
            )
        if version not in _VERSIONS:
            raise ModelError(
                f"model: {self.path} is of GGUF version {version}, read are {_VERSIONS[0]} and {_VERSIONS[1]}; "
                "convert the model again with a current llama.cpp"
            )
        tensor_count, key_count = self.unpack("QQ")
        keys: dict[str, Any] = {}
        for _ in range(key_count):
            name = self.string()
            if name in keys:
                raise ValueError(f"{name!r} twice")
            keys[name] = self.value(self.unpack("I")[0])
        return Gguf((self.path,), keys, self.tensors(tensor_count, keys.get("general.alignment", 32)))

    def tensors(self, count: int, alignment: Any) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES

        rows: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = self.string()
            if name in rows:
                raise ValueError(f"tensor {name!r} twice")
            dimensions = self.unpack("I")[0]
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"{name} of {dimensions} dimensions")
            shape = self.unpack("Q" * dimensions)
            kind, offset = self.unpack("IQ")
            rows[name] = kind, tuple(reversed(shape)), offset
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment {alignment!r}")
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        start = -(-self.at // alignment) * alignment
        found = {}
        for name, (kind, shape, offset) in rows.items():
            if kind not in sizes:
                raise ModelError(
                    f"model: {self.path}: {name} is of storage type {kind}, which the gguf package does not know; "
                    "run: pip install -U gguf"
                )
            block, taken = sizes[kind]
            length = prod(shape) // block * taken
            if start + offset + length > len(self.data):
                raise ModelError(
                    f"model: {self.path} is cut short: it has {len(self.data)} bytes, {name} ends at "
                    f"{start + offset + length}; download it again"
                )
            found[name] = GgufTensor(self.path, kind, shape, start + offset, length)
        return found

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        inner, count = self.unpack("IQ")
        if inner == _STRING:
            return [self.string() for _ in range(count)]
        if inner not in _SCALARS:
            raise ValueError(f"a list of type {inner}")
        return list(self.unpack(_SCALARS[inner], count))

    def string(self) -> str:
        length = self.unpack("Q")[0]
        return self.take(length).decode()

    def unpack(self, codes: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{codes}") * count
        return struct.unpack(f"<{count}{codes}" if count != 1 else f"<{codes}", self.take(size))

    def take(self, size: int) -> bytes:
        if self.at + size > len(self.data):
            raise _CutError
        self.at += size
        return self.data[self.at - size : self.at]


def read_floats(tensor: GgufTensor) -> list[float] | None:
    """The values of a float32 tensor; None for another type."""
    if tensor.type != 0:
        return None
    values = array("f")
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        values.fromfile(file, prod(tensor.shape))
    return values.tolist()
