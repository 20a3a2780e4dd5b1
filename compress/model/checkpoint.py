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
from compress.model.numbers import check_numbers
from compress.system.files import link_or_copy, unwritable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_SHARD_BYTES = 2_000_000_000
MAX_JSON_BYTES = 100_000_000  # of a config or an index; the largest models' have a tenth
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its file, dtype in safetensors' spelling ("BF16"), shape and bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int


class Checkpoint:
    """A checkpoint folder, opened lazily.

    Args:
        folder: with config.json and one or more safetensors files.

    Attributes:
        folder: the folder.
        config: config.json as a dict.
        tensors: every tensor's name and place.

    Raises:
        ModelError: what is missing, truncated, pickled or outside the folder, in one line.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.tensors: dict[str, TensorInfo] = {}
        listed = _listed_tensors(folder)
        for file in sorted(set(listed.values())):
            self.tensors.update(_read_header(folder / file))
        missing = sorted(set(listed) - set(self.tensors))
        if missing and any(listed.values()):
            raise ModelError(f"{folder / INDEX}: {_some(missing)} not in the shards; download the model again")

    @property
    def bytes(self) -> int:
        """Bytes of the safetensors files on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    def names(self, prefix: str) -> list[str]:
        """Names of the tensors under a prefix that ends with a dot."""
        return [name for name in self.tensors if name.startswith(prefix)]

    def load(self, names: Iterable[str], device: "torch.device | str" = "cpu") -> "dict[str, Tensor]":
        """Copy tensors out of their files.

        Raises:
            ModelError: a file that can't be read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        loaded: dict[str, Tensor] = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in wanted:
                        tensor = opened.get_tensor(name)
                        loaded[name] = tensor.clone() if str(device) == "cpu" else tensor.to(device)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file}: cannot be read ({error}); download the file again") from error
        return loaded

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


def _listed_tensors(folder: Path) -> dict[str, str]:
    """Tensor names and the file of each, from the index; for a folder without one, file names alone (name "" each)."""
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    if (folder / SINGLE).is_file():
        return _read_names(folder / SINGLE)
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return {name: shard.name for shard in shards for name in _read_names(shard)}
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: only pickle weights ({_some(pickles)}), which can run code when opened; "
            "convert them to safetensors with save_pretrained"
        )
    raise ModelError(f"{folder}: no safetensors weights; give a folder that has them")


def _read_index(index: Path) -> dict[str, str]:
    """The file of each tensor; all are there, in the index's own folder."""
    try:
        listed = _read_json(index)["weight_map"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ModelError(f"{index}: not a valid index ({error!r}); download the model again") from error
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ModelError(f"{index}: its weight_map does not map tensors to files; download the model again")
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
            header = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{file}: truncated or corrupt ({error}); download the file again") from error
    return {
        name: TensorInfo(file, row["dtype"], tuple(row["shape"]), row["data_offsets"][1] - row["data_offsets"][0])
        for name, row in header.items()
        if name != "__metadata__"
    }


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
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"format": "pt", **metadata}
        )
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
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for part, start in starts:
            with part.open("rb") as raw:
                raw.seek(start)
                shutil.copyfileobj(raw, out, 1 << 24)
        out.flush()
        os.fsync(out.fileno())
