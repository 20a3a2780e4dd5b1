"""Hugging Face checkpoint folders, read a few tensors at a time and written part by part.

Reading: only safetensors, headers checked when the folder is opened, tensors copied out of the mapped file so that
nothing stays mapped. Writing: parts (a decoder layer each) become shards by copying bytes, so memory does not grow with
the model. The format: https://github.com/huggingface/safetensors#format

Opening a folder never imports torch: `dscompress validate` reads headers too.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from compress.errors import ModelError
from compress.model.arch import depth_of
from compress.model.layout import MAX_SHARD_BYTES, METADATA, encoded
from compress.model.names import canonical_names, layers_beyond
from compress.model.numbers import check_numbers
from compress.system.files import link_or_copy, unwritable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BLOCK = 1 << 22
MAX_JSON_BYTES = 100_000_000  # of a config or an index; the largest models' have a tenth
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, its name there, dtype ("BF16", by safetensors), shape, bytes, where they start."""

    file: Path
    stored: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int


class Checkpoint:
    """A checkpoint folder, opened lazily.

    Args:
        folder: with config.json and one or more safetensors files.

    Attributes:
        folder: the folder.
        config: config.json as a dict.
        tensors: every tensor's place, by the name that it has in the model.
        left_out: tensors of the files that transformers does not load; they are not among `tensors`.
        remarks: what its user should hear of how it was read, a line each.

    Raises:
        ModelError: what is missing, truncated, pickled, ambiguous or outside the folder, in one line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.remarks: list[str] = []
        stored: dict[str, TensorInfo] = {}
        listed = self._listed_tensors()
        for file in sorted(set(listed.values())):
            stored.update(_read_header(folder / file))
        missing = sorted(set(listed) - set(stored))
        if missing and any(listed.values()):
            raise ModelError(f"{folder / INDEX}: {_some(missing)} not in the shards; download the model again")
        names = canonical_names(stored, self.config, folder)
        self.tensors = {names[name]: info for name, info in stored.items()}
        self.left_out: dict[str, TensorInfo] = {}
        self._equal: dict[tuple[str, str], bool] = {}
        beyond = layers_beyond(self.tensors, self.config)
        if beyond:
            self.remarks.append(self.leave_out(beyond, f"the depth in config.json is {depth_of(self.config)}"))

    def leave_out(self, names: Sequence[str], why: str) -> str:
        """Read the checkpoint as if it did not hold these tensors; returns what to tell its user."""
        self.left_out |= {name: self.tensors.pop(name) for name in names}
        size = sum(self.left_out[name].bytes for name in names)
        return (
            f"{self.folder}: {why}, and transformers does not load {_some(names)} ({size / 1e6:,.1f} MB): left out of "
            "the result, and not counted in its sizes"
        )

    def _listed_tensors(self) -> dict[str, str]:
        """Tensor names and the file of each, from the files that transformers would read: in its order."""
        folder = self.folder
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder}: holds an adapter (adapter_config.json), which transformers adds to the model where peft is "
                "installed; merge it (peft's merge_and_unload, then save_pretrained), or remove the adapter_* files"
            )
        chosen = self.config.pop("transformers_weights", None)  # names files that the result does not have
        if chosen is not None:
            return _named_by_config(folder, chosen)
        single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
        if single:
            if index:
                self.remarks.append(
                    f"{folder}: {SINGLE} is read, as transformers does; {INDEX} beside it and its shards are not"
                )
            return _read_names(folder / SINGLE)
        if index:
            return _read_index(folder / INDEX)
        others = sorted(file.name for file in folder.glob("*.safetensors"))
        if others:
            raise ModelError(
                f"{folder}: neither {SINGLE} nor {INDEX}, without which transformers opens none of {_some(others)}; "
                f"rename a file that holds the whole model to {SINGLE}, or download the index too"
            )
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder}: only pickle weights ({_some(pickles)}), which can run code when opened; "
                "convert them to safetensors with save_pretrained"
            )
        if files := sorted(file.name for file in folder.glob("*.gguf")):
            raise ModelError(
                f"{folder}: its weights are in {_some(files)}, for llama.cpp; this reads safetensors (eval and verify, "
                "and `model:` in a recipe, read both)"
            )
        raise ModelError(f"{folder}: no safetensors weights; give a folder that has them")

    @property
    def bytes(self) -> int:
        """Bytes of the safetensors files on disk, without what is left out."""
        unused = sum(info.bytes for info in self.left_out.values())
        return sum(file.stat().st_size for file in self.files) - unused

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for infos in (self.tensors, self.left_out) for info in infos.values()})

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors under a prefix that ends with a dot."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def load(self, names: Iterable[str], device: "torch.device | str" = "cpu") -> "dict[str, Tensor]":
        """Copy tensors out of their files.

        Raises:
            ModelError: a file that can't be read.
        """
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            info = self.tensors[name]
            by_file.setdefault(info.file, []).append((name, info.stored))
        loaded: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name, stored in wanted:
                        tensor = opened.get_tensor(stored)
                        loaded[name] = tensor.clone() if str(device) == "cpu" else tensor.to(device)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: cannot be read ({error}); download the file again") from error
        return loaded

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same bytes; reads them."""
        first, second = self.tensors[one], self.tensors[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        if (one, other) not in self._equal:
            with first.file.open("rb") as left, second.file.open("rb") as right:
                left.seek(first.start)
                right.seek(second.start)
                sizes = (min(_BLOCK, first.bytes - done) for done in range(0, first.bytes, _BLOCK))
                self._equal[one, other] = all(left.read(size) == right.read(size) for size in sizes)
        return self._equal[one, other]

    def fingerprint(self) -> list[Any]:
        """What identifies the contents without reading them: config, and each file's name, size, time and tensors."""
        rows: list[Any] = [self.config]
        for file in self.files:
            stat = file.stat()
            rows.append([file.name, stat.st_size, stat.st_mtime_ns])
        return rows


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not folder.exists():
        raise ModelError(f"{folder}: no such model folder; check the path")
    if not folder.is_dir():
        raise ModelError(f"{folder}: is a file; give the folder that has config.json and the weights")
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no Hugging Face model folder; give one that has it")
    try:
        config = _read_json(file)
    except (ValueError, OSError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}); download the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds no JSON object; download the model again")
    check_numbers(config, file)
    return config


def _read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ValueError: it holds no JSON, or more than such a file can mean.
        OSError: it can't be read.
    """
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise ValueError(f"{size:,} bytes")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _named_by_config(folder: Path, name: Any) -> dict[str, str]:
    """Tensors of the file that config.json's transformers_weights names."""
    kinds = (".safetensors", ".safetensors.index.json")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(kinds):
        raise ModelError(
            f"{folder}: config.json's transformers_weights {name!r} is no file or index of "
            "safetensors in the same folder; name one, or remove the key"
        )
    if not (folder / name).is_file():
        raise ModelError(
            f"{folder}: {name}, which config.json's transformers_weights names, is missing; download the model again"
        )
    return _read_index(folder / name) if name.endswith(kinds[1]) else _read_names(folder / name)


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor; all are there, in the index's own folder."""
    try:
        parsed = _read_json(index)
        listed = parsed["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{index}: not a valid index ({error!r}); download the model again") from error
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ModelError(f"{index}: its weight_map does not map tensors to files; download the model again")
    if "metadata" not in parsed:
        raise ModelError(
            f'{index}: has no "metadata", without which transformers does not open it; add "metadata": {{}}'
        )
    for name, file in listed.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{index}: {name} is said to be in {file!r}; only a .safetensors file of the same folder is read, "
                "download the model again"
            )
    missing = sorted({file for file in listed.values() if not (index.parent / file).is_file()})
    if missing:
        raise ModelError(f"{index.parent}: {_some(missing)} missing; download the model again")
    return listed


def _read_names(file: Path) -> dict[str, str]:
    return dict.fromkeys(_read_header(file), file.name)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    try:
        with safe_open(file, framework="np"):
            pass  # the library checks that the header is sound and the file as long as it says
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: truncated or corrupt ({error}); download the file again") from error
    header.pop("__metadata__", None)
    infos = {}
    for name, row in header.items():
        begin, end = row["data_offsets"]
        infos[name] = TensorInfo(file, name, row["dtype"], tuple(row["shape"]), end - begin, 8 + length + begin)
    return infos


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def write_part(file: Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> None:
    """Write one part so that it appears whole or not at all, even when the machine stops.

    Raises:
        OutputError: no space, or no right to write there.
    """
    from safetensors.torch import save_file

    temporary = file.with_suffix(".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {**METADATA, **metadata})
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    except (SafetensorError, OSError) as error:
        raise unwritable(file, error) from error


def read_part(file: Path) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors and the metadata that `write_part` was given."""
    with safe_open(file, framework="pt") as opened:
        names = opened.keys()
        return {name: opened.get_tensor(name).clone() for name in names}, opened.metadata() or {}


def merge_parts(
    parts: Sequence[Path],
    folder: Path,
    describe: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, str]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Make a checkpoint folder's weights of parts: one file, or where that is too large each part as a shard.

    Nothing is loaded. Shards are links to the parts where the disk allows, so that no byte is written twice.

    Args:
        parts: written by `write_part`.
        folder: where to.
        describe: metadata for every file, from the shapes of all tensors; shards that get some are no links.
        max_shard_bytes: of a single file.
    """
    metadata = describe({name: info.shape for part in parts for name, info in _read_header(part).items()})
    if sum(part.stat().st_size for part in parts) <= max_shard_bytes:
        _join(parts, folder / SINGLE, metadata)
        return
    placed: dict[str, str] = {}
    total = 0
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        if metadata:
            _join([part], folder / name, metadata)
        else:
            link_or_copy(part, folder / name)
        for tensor, info in _read_header(part).items():
            placed[tensor] = name
            total += info.bytes
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _join(parts: Sequence[Path], file: Path, metadata: Mapping[str, str]) -> None:
    """Concatenate the tensors of parts into one safetensors file, from file to file."""
    header: dict[str, Any] = {"__metadata__": {**METADATA, **metadata}}
    offset = 0
    starts: list[tuple[Path, int]] = []
    for part in parts:
        with part.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            rows = json.loads(raw.read(length))
        starts.append((part, 8 + length))
        rows.pop("__metadata__", None)
        for name, row in rows.items():
            begin, end = row["data_offsets"]
            header[name] = {**row, "data_offsets": [offset + begin, offset + end]}
        offset += max((row["data_offsets"][1] for row in rows.values()), default=0)
    with file.open("wb") as out:
        out.write(encoded(header))
        for part, start in starts:
            with part.open("rb") as raw:
                raw.seek(start)
                shutil.copyfileobj(raw, out, 1 << 24)
        out.flush()
        os.fsync(out.fileno())
