"""A teacher's targets on disk, so that it is asked once for passes and runs without number.

A token's targets are the `draws` of its prediction with repeats counted, about 100 bytes: in float16 a whole prediction
over 128k tokens has 256 kB. The exact entropy of the prediction is kept as well, with which
-sum_k share_k ln q(id_k) - entropy is an unbiased estimate of KL(teacher || student), and not only of its gradient.

A folder holds shards: safetensors files of many sequences each, written whole under names of their own, so that a
process that is killed loses the shard under way, and several processes can fill one folder. Sequences are read one by
one wherever they lie; nothing stays open or mapped, for a large folder has more shards than a process may hold.

Left out: what other losses than forward KL need of a teacher, which draws from its prediction do not give.

Shapes: N rows (tokens with a loss), V vocabulary, D width.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import NumericalError, OutputError
from compress.model.checkpoint import write_part
from compress.system.files import make_writable
from compress.train.losses.inputs import Head, Sampled
from compress.train.teacher.draws import MOST_DRAWS, Draws, draw, offsets

SequenceName: TypeAlias = tuple[str, int]
"""A sequence of tokens: key of its source, index there."""

RowsOf: TypeAlias = Callable[[list[SequenceName]], tuple[Tensor, Head, list[int]]]
"""Asks a teacher about sequences: last hidden states of their rows [N, D], its head, and how many rows each has."""

_CONTENT = "teacher targets 1"  # the number is of the layout
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "I32": np.int32, "I64": np.int64, "F32": np.float32}
_SHARD_BYTES, _SHARD_SECONDS = 32 * 2**20, 60.0  # a shard is written when it has the one or took the other
_CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**30}  # for the logits of some rows, and for drawing from them
_LOGIT_BYTES = 28  # of a logit: float32, and what `draw` takes
_BLOCK = 2**24  # numbers of the head that are widened at once


@dataclass(frozen=True)
class _Shard:
    """Where things lie in a file: tensors by name (dtype, first byte), and the first row and id of each sequence."""

    file: Path
    sequences: list[SequenceName]
    tensors: Mapping[str, tuple[str, int]]
    first_row: NDArray[np.int64]
    first_id: NDArray[np.int64]
    bytes: int


class TeacherCache:
    """Targets of sequences in a folder.

    Args:
        folder: made by the first `write`. Only its .safetensors files count.
        draws: of each row, 1 to MOST_DRAWS.
        key: fingerprint of all that the targets hang on: teacher, packing, what has a loss, template, seed.

    Attributes:
        torn: shards that are cut off, by a disk or a copy; their sequences are missing.

    Raises:
        OutputError: a file there holds something else, or targets of another key or number of draws.
    """

    def __init__(self, folder: Path, draws: int, key: str) -> None:
        assert 1 <= draws <= MOST_DRAWS
        self.folder, self.draws, self.key = folder, draws, key
        self.torn: list[Path] = []
        self._shards: dict[Path, _Shard] = {}
        self._places: dict[SequenceName, tuple[_Shard, int]] = {}
        self._scan()

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes on disk for a token with a loss; None where there is none."""
        rows = sum(int(shard.first_row[-1]) for shard in self._shards.values())
        return sum(shard.bytes for shard in self._shards.values()) / rows if rows else None

    def missing(self, sequences: Sequence[SequenceName]) -> list[SequenceName]:
        """Those that are not there yet, in order and each once. Other processes' shards are seen.

        Raises:
            OutputError: as the class.
        """
        self._scan()
        return [name for name in dict.fromkeys(sequences) if name not in self._places]

    def write(self, sequences: Sequence[SequenceName], targets: Sequence[Draws]) -> None:
        """Write one shard, which appears whole or not at all; a sequence that is there already does no harm.

        Raises:
            OutputError: no space, or no right to write there.
        """
        assert len(sequences) == len(targets)
        together = Draws.cat(targets)
        narrow = torch.int32 if bool((together.ids >= 2**16).any()) else torch.uint16
        tensors = {
            "ids": together.ids.cpu().to(narrow),
            "counts": together.counts.cpu(),
            "numbers": together.numbers.cpu(),
            "entropy": together.entropy.cpu(),
            "rows_of_sequence": torch.tensor([len(part.numbers) for part in targets], dtype=torch.int32),
            "ids_of_sequence": torch.tensor([len(part.ids) for part in targets], dtype=torch.int64),
        }
        named = json.dumps(list(sequences), separators=(",", ":"))
        metadata = {"content": _CONTENT, "key": self.key, "draws": str(self.draws), "sequences": named}
        make_writable(self.folder)
        file = self.folder / f"targets-{uuid4().hex}.safetensors"
        try:
            write_part(file, tensors, metadata)
        except OutputError:  # the disk may be full, and no later attempt takes this name
            file.with_suffix(".tmp").unlink(missing_ok=True)
            raise
        self._add(file)

    def read(self, sequences: Sequence[SequenceName]) -> Sampled:
        """Targets of the rows of all sequences (one at least), in order, on the CPU.

        Raises:
            OutputError: there are none of a sequence, or no longer; or as the class.
        """
        if any(name not in self._places for name in sequences):
            self._scan()
        return Draws.cat([self._read(name) for name in sequences]).sampled()

    def _read(self, name: SequenceName) -> Draws:
        try:
            shard, nth = self._places[name]
            rows = shard.first_row[nth : nth + 2].tolist()
            ids = shard.first_id[nth : nth + 2].tolist()
            with shard.file.open("rb") as raw:
                columns = [
                    _part(raw, shard.tensors[column], *between)
                    for column, between in (("ids", ids), ("counts", ids), ("numbers", rows), ("entropy", rows))
                ]
        except (KeyError, FileNotFoundError):
            raise OutputError(
                f"{self.folder}: has no targets of sequence {name[1]} of {name[0]}; run the same command again to ask "
                "the teacher for them"
            ) from None
        return Draws(torch.from_numpy(columns[0].astype(np.int32)), *map(torch.from_numpy, columns[1:]))

    def _scan(self) -> None:
        """Learn of shards that came or went."""
        there = set(self.folder.glob("*.safetensors"))
        gone = self._shards.keys() - there
        if gone:
            self._shards = {file: shard for file, shard in self._shards.items() if file in there}
            self._places = {}
            for shard in self._shards.values():
                self._place(shard)
        self.torn = []
        for file in sorted(there - self._shards.keys()):
            self._add(file)

    def _add(self, file: Path) -> None:
        try:
            with safe_open(file, framework="np") as opened:  # checks that the file is as long as its header says
                metadata = opened.metadata() or {}
        except FileNotFoundError:
            return
        except SafetensorError:
            self.torn.append(file)
            return
        self._check(file, metadata)
        self._shards[file] = _shard(file, metadata)
        self._place(self._shards[file])

    def _place(self, shard: _Shard) -> None:
        for nth, name in enumerate(shard.sequences):
            self._places.setdefault(name, (shard, nth))

    def _check(self, file: Path, metadata: Mapping[str, str]) -> None:
        if metadata.get("content") != _CONTENT:
            raise OutputError(f"{file}: is no shard of teacher targets; move it away, or choose another --work-dir")
        if metadata["key"] != self.key:
            raise OutputError(
                f"{file}: holds targets of another teacher or text ({metadata['key']}, and not {self.key}); "
                "remove the folder, or choose another --work-dir"
            )
        if metadata["draws"] != str(self.draws):
            raise OutputError(
                f"{file}: holds {metadata['draws']} draws for each token, and not {self.draws}; set draws to "
                f"{metadata['draws']}, remove the folder, or choose another --work-dir"
            )


def _shard(file: Path, metadata: Mapping[str, str]) -> _Shard:
    with file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
        header.pop("__metadata__")
        tensors = {name: (row["dtype"], 8 + length + row["data_offsets"][0]) for name, row in header.items()}
        sequences = [(source, index) for source, index in json.loads(metadata["sequences"])]
        first_row, first_id = (
            np.cumsum([0, *_part(raw, tensors[name], 0, len(sequences))], dtype=np.int64)
            for name in ("rows_of_sequence", "ids_of_sequence")
        )
    return _Shard(file, sequences, tensors, first_row, first_id, file.stat().st_size)


def _part(raw: BinaryIO, tensor: tuple[str, int], start: int, stop: int) -> NDArray[Any]:
    """Numbers start .. stop - 1 of a tensor of one dimension."""
    dtype = np.dtype(_DTYPES[tensor[0]])
    raw.seek(tensor[1] + start * dtype.itemsize)
    return np.fromfile(raw, dtype, stop - start)


@torch.no_grad()
def fill(
    cache: TeacherCache,
    sequences: Sequence[SequenceName],
    rows_of: RowsOf,
    *,
    vocabulary: int,
    seed: int,
    at_once: int,
    advance: Callable[[], None],
) -> None:
    """Ask the teacher. Killed and called again for what is missing, it asks about the same sequences together.

    Args:
        cache: where to.
        sequences: that are missing; of several processes that share a teacher, each asks about as many.
        rows_of: the teacher.
        vocabulary: how many logits count, the first ones; a head may have more, for padding.
        seed: of the draws.
        at_once: sequences that the teacher is asked about together.
        advance: called once for each sequence.

    Raises:
        NumericalError: the teacher's logits are NaN or inf.
        OutputError: as `TeacherCache`.
    """
    found: dict[SequenceName, Draws] = {}
    size, started = 0, time.monotonic()
    try:
        for first in range(0, len(sequences), at_once):
            asked = list(sequences[first : first + at_once])
            hidden_ND, head, rows = rows_of(asked)
            pieces = hidden_ND.split(rows)
            group = [_targets(*each, head, cache.draws, vocabulary, seed) for each in zip(asked, pieces, strict=True)]
            found.update(zip(asked, group, strict=True))  # a group is kept as a whole, or asked again as a whole
            size += sum(_bytes(targets) for targets in group)
            if size >= _SHARD_BYTES or time.monotonic() - started >= _SHARD_SECONDS:
                cache.write(list(found), list(found.values()))
                found, size, started = {}, 0, time.monotonic()
            for _ in asked:
                advance()
    finally:
        if found:
            cache.write(list(found), list(found.values()))


def _bytes(targets: Draws) -> int:
    """About what targets take on disk."""
    return 4 * len(targets.ids) + 5 * len(targets.numbers)


def _targets(name: SequenceName, hidden_ND: Tensor, head: Head, draws: int, vocabulary: int, seed: int) -> Draws:
    """Targets of one sequence, on the CPU. Alone, so that they don't hang on what it is asked together with."""
    at_once = max(1, _CHUNK_BYTES[hidden_ND.device.type] // (_LOGIT_BYTES * vocabulary))
    uniform = offsets(seed, name, len(hidden_ND)).to(hidden_ND.device)
    try:
        parts = [
            draw(_logits(some_nD, head, vocabulary), some_n, draws)
            for some_nD, some_n in zip(hidden_ND.split(at_once), uniform.split(at_once), strict=True)
        ]
    except NumericalError as error:
        raise NumericalError(f"sequence {name[1]} of {name[0]}: {error}") from error
    return Draws.cat(parts).cpu()


def _logits(hidden_nD: Tensor, head: Head, vocabulary: int) -> Tensor:
    """The first logits of rows, float32 [n, vocabulary]; 16-bit factors are not rounded further."""
    weight_VD = head.weight[:vocabulary]
    if hidden_nD.is_cuda and hidden_nD.dtype == weight_VD.dtype in (torch.bfloat16, torch.float16):
        logits = torch.mm(hidden_nD, weight_VD.t(), out_dtype=torch.float32)
    else:
        block = max(1, _BLOCK // weight_VD.shape[1])
        wide_nD = hidden_nD.float()
        logits = torch.cat([wide_nD @ some_vD.float().t() for some_vD in weight_VD.split(block)], dim=1)
    if head.bias is not None:
        logits += head.bias[:vocabulary]
    logits *= head.scale
    return logits if head.softcap is None else logits.div_(head.softcap).tanh_().mul_(head.softcap)
