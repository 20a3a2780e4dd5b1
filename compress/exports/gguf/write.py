"""A checkpoint as a GGUF file, written tensor by tensor: memory holds one of them, whatever the model.

The header and all sizes come first, then the data. The file appears under its name when it is whole, in place of what
had the name: a program that has the old one mapped keeps it.
"""

import errno
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

from compress import __version__
from compress.errors import ModelError, OutputError
from compress.exports.gguf.config import Header, header_of
from compress.exports.gguf.tensors import Entry, Tensors
from compress.exports.gguf.tokenizer import tokenizer_keys
from compress.formats.ggml_mixes import MIXES
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.header import is_gguf, open_gguf
from compress.model.shapes import Shapes, model_dtype
from compress.system.files import beside, make_writable, writing
from compress.system.progress import Advance, Reporter
from compress.system.units import size

CODE_VERSION = 2  # raised when the same checkpoint gives another file
_MARK = "dscompress.version"  # a file with this key is ours, and may be replaced
_FILE_TYPES = {
    "F32": LlamaFileType.ALL_F32, "F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0, "Q4_0": LlamaFileType.MOSTLY_Q4_0, "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0, "Q5_1": LlamaFileType.MOSTLY_Q5_1,
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A model in GGUF files.

    Args:
        files: in order.
        bytes: of all.
        types: how many tensors are stored in which type, ggml's names.
        matrices: types of those with two dimensions.
        carried: how many of them have the checkpoint's own codes.
        remarks: what its user should hear, a line each.
    """

    files: list[Path]
    bytes: int
    types: dict[str, int]
    matrices: list[str]
    carried: int = 0
    remarks: list[str] = field(default_factory=list)

    def facts(self) -> list[tuple[str, str]]:
        """What was written, a word and what it says, for people."""
        rows = [("file", str(file)) for file in self.files]
        rows.append(("size", f"{size(self.bytes)} ({self.bytes:,} bytes)"))
        rows.append(("tensors", ", ".join(f"{count} {name}" for name, count in sorted(self.types.items()))))
        if self.carried:
            rows.append(("codes", f"{self.carried} matrices have the checkpoint's own codes, unchanged"))
        return rows


def export_gguf(
    folder: Path,
    file: Path,
    kind: str = "auto",
    split_bytes: int | None = None,
    reporter: Reporter | None = None,
    name: str | None = None,
) -> Written:
    """Write a checkpoint as a GGUF file.

    Args:
        folder: the checkpoint, dense or quantized.
        file: to write; parts of it get "-00001-of-00003" into their names.
        kind: type of matrices. "auto": codes that lie on a grid of ggml as they are, other matrices in the
            checkpoint's own dtype.
        split_bytes: of tensors in a part, at most; None writes one file.
        reporter: told what happens.
        name: what programs call the model; None is the checkpoint's folder.

    Raises:
        ModelError: what llama.cpp can't have, by name.
        OutputError: a file of another program has the name, or the disk is full.
    """
    reporter = reporter or Reporter()
    checkpoint = Checkpoint(folder)
    check_replaceable(file)
    header = header_of(folder, str(checkpoint.config.get("model_type")))
    words = tokenizer_keys(folder, header.config.vocab_size, name=name)
    dtype = own_type(checkpoint)
    tensors = Tensors(checkpoint, header, dtype if kind == "auto" else kind.upper(), kind == "auto")
    types = Counter(entry.type.name for entry in tensors.entries)
    matrices = Counter(entry.type.name for entry in tensors.entries if len(entry.shape) > 1)
    wanted = kind.upper() if kind != "auto" else max(matrices, key=lambda name: (name[0] == "Q", matrices[name]))
    mix = str((checkpoint.config.get("quantization_config") or {}).get("mix"))
    known = kind == "auto" and mix in MIXES
    number = MIXES[mix].number if known else int(_FILE_TYPES.get(wanted, LlamaFileType.GUESSED))
    keys = keys_of(folder, header, words, number)
    files = _write(tensors, keys, file, split_bytes, reporter)
    carried = sum(entry.carried is not None for entry in tensors.entries)
    total = sum(each.stat().st_size for each in files)
    remarks = [*header.remarks, *_losses(tensors, carried, kind, dtype, total)]
    return Written(files, total, dict(types), sorted(matrices), carried, remarks)


def own_type(checkpoint: Shapes) -> str:
    """The type of a checkpoint's own dtype."""
    if not checkpoint.config.get("quantization_config"):
        return model_dtype(checkpoint)
    said = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return {"torch.float16": "F16", "float16": "F16", "float32": "F32"}.get(said, "BF16")


def _losses(tensors: Tensors, carried: int, kind: str, dtype: str, total: int) -> list[str]:
    """What of a quantized checkpoint is not in the file."""
    view, lines = tensors.view, []
    if kind == "auto" and (rest := len(view.grids) - carried):
        lines.append(
            f"{rest} of {len(view.grids)} quantized matrices lie on no grid of ggml and are written as {dtype}: "
            f"{size(total)} in all"
        )
    elif kind != "auto" and view.grids:
        lines.append(f"{len(view.grids)} quantized matrices are written as {kind.upper()}: {size(total)} in all")
    if view.inputs:
        lines.append(
            "the checkpoint rounds the inputs of linears to 8 bits by its own scales; llama.cpp has its own ways"
        )
    if view.caches:
        lines.append("the checkpoint has scales for an 8-bit cache; llama.cpp has its own (--cache-type-k)")
    return lines


def keys_of(folder: Path, header: Header, words: Mapping[str, Any], file_type: int) -> dict[str, Any]:
    """All keys of a header, in their order.

    Args:
        folder: the checkpoint.
        header: what follows from its config.
        words: of its tokenizer.
        file_type: llama.cpp's number of a mix.
    """
    keys = {
        "general.type": "model",
        "general.file_type": file_type,
        "general.quantization_version": GGML_QUANT_VERSION,
        _MARK: __version__,
    }
    if licence := _licence(folder):
        keys["general.license"] = licence
    own = {f"{header.target.architecture}.{name}": value for name, value in header.keys.items()}
    return {**keys, **words, **own}


def _licence(folder: Path) -> str | None:
    """By the model card's front matter."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return None
    front = lines[1 : lines.index("---", 1)]
    return next((row.partition(":")[2].strip().strip("\"'") for row in front if row.startswith("license:")), None)


def check_replaceable(file: Path) -> None:
    """Refuse to write over what is not ours.

    Raises:
        OutputError: naming the file.
    """
    if not file.exists():
        return
    try:
        if is_gguf(file) and _MARK in open_gguf(file).keys:
            return
    except ModelError:
        pass
    raise OutputError(f"{file}: exists, and was not written by dscompress; name another file, or remove it")


def _write(
    tensors: Tensors, keys: Mapping[str, Any], file: Path, split_bytes: int | None, reporter: Reporter
) -> list[Path]:
    """Write beside the place, then give the files their names."""
    make_writable(file.parent)
    with writing(file.parent), beside(file) as scratch:
        writer = GGUFWriter(scratch / file.name, tensors.header.target.architecture, split_max_size=split_bytes or 0)
        try:
            lay_out(writer, keys, tensors.entries)
            names = writer.format_shard_names(file)
            for each in names:
                check_replaceable(each)
            with _full_disk():
                _stream(writer, tensors, reporter.task(f"writing {file.name}", len(tensors.entries), "tensor"))
        finally:
            writer.close()
        return [(scratch / each.name).replace(each) for each in names]


def lay_out(writer: GGUFWriter, keys: Mapping[str, Any], entries: Sequence[Entry]) -> None:
    """Tell a writer what there will be, by which it knows how many files that makes."""
    for name, value in keys.items():
        _add(writer, name, value)
    for entry in entries:
        shape = entry.byte_shape
        writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), math.prod(shape), raw_dtype=entry.type)


def write_headers(writer: GGUFWriter) -> None:
    """All that goes before the tensors, of each file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _stream(writer: GGUFWriter, tensors: Tensors, task: AbstractContextManager[Advance]) -> None:
    """The header, then one tensor after the other, down to the disk."""
    write_headers(writer)
    with task as advance:
        for entry in tensors.entries:
            writer.write_tensor_data(tensors.load(entry))
            advance()
    for opened in writer.fout or []:
        opened.flush()
        os.fsync(opened.fileno())


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)


@contextmanager
def _full_disk() -> Iterator[None]:
    """Give numpy's words for a full disk the system's number."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
