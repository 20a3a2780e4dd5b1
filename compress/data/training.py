"""Text to train on: tokenized once, packed into full sequences on disk, read from there a few at a time.

Packing is that of calibration text (packing.py), and what a loss needs beside the tokens is kept with each: where a
document starts, and whether the token is one to be predicted. A plain text ends with the tokenizer's end-of-sequence
token, so that a model learns where texts end; a conversation ends as its template ends it.

On disk: shards of 4096 sequences (fewer where they are longer than 8192 tokens), `tokens` int32 and `flags` uint8, both
[n, S], and meta.json, which is written last. A folder without it is packed again from the start: what is left there of
a run that was stopped is never used, since reading the text again is most of the work.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.data.assistant import REMEDY, holds_any
from compress.data.documents import COLUMNS, Document, Renderer, select, shuffle
from compress.data.packing import _batches, text_prefix
from compress.data.sources import read_rows, source_identity
from compress.errors import CalibrationError
from compress.model.checkpoint import write_part
from compress.recipe.text import TrainingText
from compress.system.files import make_writable, write_text, writing
from compress.system.fingerprint import digests, fingerprint
from compress.system.locks import FileLock
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CODE_VERSION = 1  # raised when the same text gives other tokens
META = "meta.json"
SHARD_SEQUENCES, _SHARD_TOKENS = 4096, 1 << 25
_START, _SCORED = 1, 2  # flags of a token

_Ids: TypeAlias = NDArray[np.int64]
_Flags: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """Sequences to train on. B sequences, S tokens of each.

    Args:
        tokens: int64 [B, S].
        documents: int32 [B, S], which document of its sequence each token is of, counted from 0.
        scored: bool [B, S], whether a token is one to be predicted from those before it in its document. Never the
            first of a document in a sequence, nor what a tokenizer puts in front of a text.
    """

    tokens: Tensor
    documents: Tensor
    scored: Tensor

    @property
    def positions(self) -> Tensor:
        """int64 [B, S]: each token's place inside its document, from 0; what continues in a sequence starts anew."""
        places = torch.arange(self.tokens.shape[1], device=self.tokens.device).expand(self.tokens.shape)
        starts = torch.ones_like(self.scored)
        starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        return places - torch.where(starts, places, 0).cummax(dim=1).values


@dataclass(frozen=True)
class PackedText:
    """A packed text in its folder; sequences are read when they are asked for.

    Args:
        folder: of the shards.
        name: what reports call the text.
        source: hub dataset, file or folder that it came from.
        licence: the text's licence, where the spec states it.
        key: its fingerprint (`text_key`).
        sequences: how many there are.
        sequence_length: S, tokens of each.
        shard_sequences: sequences of each shard but the last.
        warnings: what the user should hear, a line each.
    """

    folder: Path
    name: str
    source: str
    licence: str | None
    key: str
    sequences: int
    sequence_length: int
    shard_sequences: int
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all, each counted once."""
        return self.sequences * self.sequence_length

    def read(self, indices: Sequence[int]) -> Batch:
        """Some of the sequences, in the order in which they are asked for.

        Raises:
            CalibrationError: a shard can't be read.
        """
        tokens = torch.empty(len(indices), self.sequence_length, dtype=torch.int64)
        flags = torch.empty(tokens.shape, dtype=torch.uint8)
        shards: dict[int, list[tuple[int, int]]] = {}
        for place, index in enumerate(indices):
            assert 0 <= index < self.sequences
            shards.setdefault(index // self.shard_sequences, []).append((place, index % self.shard_sequences))
        for number, rows in shards.items():
            file = _shard(self.folder, number)
            try:
                with safe_open(file, framework="pt") as opened:
                    kept_tokens, kept_flags = opened.get_slice("tokens"), opened.get_slice("flags")
                    for place, row in rows:
                        tokens[place], flags[place] = kept_tokens[row], kept_flags[row]
            except (SafetensorError, OSError) as error:
                raise CalibrationError(
                    f"{file}: cannot be read ({error}); delete {self.folder} and run the same command again"
                ) from error
        documents = (flags & _START).cumsum(dim=1, dtype=torch.int32) - 1
        return Batch(tokens, documents, (flags & _SCORED) != 0)


def text_key(
    text: TrainingText, tokenizer: "PreTrainedTokenizerBase", *, length: int, sequences: int, assistant_only: bool
) -> str:
    """A digest of all that decides the tokens of a packed text; reads local files through.

    A copy elsewhere is the same text, and a file with other content another. A hub dataset is known by its id, subset,
    split and revision alone.

    Raises:
        CalibrationError: a file that can't be read.
    """
    most = min(sequences, text.samples or sequences)
    return fingerprint(
        "text", CODE_VERSION, source_identity(text), text.field, text.seed, _identity(tokenizer), length, most,
        assistant_only,
    )  # fmt: skip


def _identity(tokenizer: "PreTrainedTokenizerBase") -> list[Any]:
    """What decides the tokens that a tokenizer makes of a text or a conversation."""
    rules: dict[str, Any]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {
            name: rule for name, rule in rules.items() if name not in ("truncation", "padding")
        }  # of its last call
    else:
        with TemporaryDirectory() as folder:
            tokenizer.save_vocabulary(folder)
            rules = {**digests(Path(folder)), "class": type(tokenizer).__name__}
    return [rules, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.get_added_vocab()]


def pack(
    text: TrainingText,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    sequences: int,
    assistant_only: bool,
    folder: Path,
    key: str,
    reporter: Reporter,
) -> PackedText:
    """A text as full sequences on disk, made unless the folder holds them already.

    Documents are taken in the order of the text's seed. Memory does not grow with the text.

    Args:
        text: says where it comes from.
        tokenizer: of the model that is trained.
        length: S, tokens of a sequence, whatever the text's own spec says.
        sequences: most to make; no more than the text's `samples`.
        assistant_only: score only what the assistant says in conversations; plain texts are scored whole.
        folder: of this text alone; another key's sequences in it are replaced.
        key: of `text_key`.
        reporter: shows the progress.

    Raises:
        CalibrationError: the source can't be read, holds fewer tokens than one sequence, or nothing to be scored.
        OutputError: no space, or no right to write there.
    """
    found = _packed(text, folder, key)
    if found is not None:
        return found
    with FileLock(folder.with_name(f"{folder.name}.lock")) as lock:
        name = _name(text)
        lock.acquire(exclusive=True, waiting=lambda holder: reporter.say(f"waiting for {holder}, which packs {name}"))
        found = _packed(text, folder, key)
        if found is None:
            renderer = Renderer(tokenizer, assistant_only=assistant_only)
            rows = read_rows(text, COLUMNS if text.field is None else (text.field,), shuffle_shards=True)
            documents = renderer.render(shuffle(select(rows, text.field), text.seed))
            packer = _Packer(length, _checked_prefix(tokenizer, length))
            most = min(sequences, text.samples or sequences)
            with reporter.task(f"packing {name}", most, "sequence") as advance:
                writer = _Writer(folder, length, most)
                encoded = _encoded(documents, tokenizer, packer.prefix)
                for tokens_S, flags_S in islice(packer.sequences(encoded), most):
                    writer.add(tokens_S, flags_S)
                    advance()
            _check_enough(text, writer, packer, renderer.warnings)
            writer.finish(key, renderer.warnings)
            found = _packed(text, folder, key)
    assert found is not None
    return found


def _packed(text: TrainingText, folder: Path, key: str) -> PackedText | None:
    """The packed text of a folder, if it is this one and whole."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sizes = [_shard(folder, number).stat().st_size for number in range(len(meta["bytes"]))]
        if meta["key"] == key and sizes == meta["bytes"]:
            return PackedText(
                folder, _name(text), text.source, text.licence or text.license, key, meta["sequences"],
                meta["sequence_length"], meta["shard_sequences"], tuple(meta["warnings"]),
            )  # fmt: skip
    return None


def _name(text: TrainingText) -> str:
    return text.name or Path(text.source).name


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _checked_prefix(tokenizer: "PreTrainedTokenizerBase", length: int) -> list[int]:
    """What the tokenizer puts in front of a text, if that leaves room in a sequence."""
    prefix = text_prefix(tokenizer)
    if length <= len(prefix):
        names = " ".join(tokenizer.convert_ids_to_tokens(prefix))
        raise CalibrationError(
            f"sequence_length: {length} has no room for text behind the {names} that the tokenizer puts in front of "
            f"it; use {len(prefix) + 1} or more"
        )
    return prefix


def _check_enough(text: TrainingText, writer: "_Writer", packer: "_Packer", warnings: Sequence[str]) -> None:
    reason = "".join(f"; {warning}" for warning in warnings)
    if not writer.count:
        count = len(packer.tokens)
        if count < 2:
            raise CalibrationError(f"{text.source}: holds no text; name a source with more of it{reason}")
        raise CalibrationError(
            f"{text.source}: {count} tokens are fewer than one sequence of {packer.length}; "
            f"add text or use sequence_length: {1 << (count.bit_length() - 1)}{reason}"
        )
    if not writer.scored:
        raise CalibrationError(
            f"{text.source}: no assistant says anything in it; name conversations with answers, or {REMEDY}{reason}"
        )


def _encoded(
    documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", prefix: Sequence[int]
) -> Iterator[tuple[list[int], _Flags]]:
    """Tokens and flags of each document, its end included."""
    end = tokenizer.eos_token_id
    for batch in _batches(documents):
        spans = any(document.assistant is not None for document in batch)
        if spans and not tokenizer.is_fast:
            raise CalibrationError(f"the tokenizer does not say where its tokens lie in a text; {REMEDY}")
        texts = [document.text for document in batch]
        encoded = tokenizer(
            texts, add_special_tokens=batch[0].add_special_tokens, return_offsets_mapping=spans, verbose=False
        )
        for number, document in enumerate(batch):
            ids = list(encoded["input_ids"][number])
            if not ids:
                continue
            if document.add_special_tokens and end is not None and ids[-1] != end:
                ids.append(end)
            flags = np.full(len(ids), _SCORED, np.uint8)
            if document.assistant is not None:
                flags *= holds_any(encoded["offset_mapping"][number], document.assistant)
            if document.add_special_tokens:
                flags[: len(prefix)] = 0
            flags[0] = _START
            yield ids, flags


class _Packer:
    """Cuts documents into sequences, as `packing.cut_sequences` does with all of their tokens at once.

    Args:
        length: S, tokens of a sequence.
        prefix: put in front of a sequence whose tokens do not start with it themselves.

    Attributes:
        tokens: those of the documents so far that are in no sequence yet.
    """

    def __init__(self, length: int, prefix: list[int]) -> None:
        self.length = length
        self.prefix = prefix
        self.tokens: _Ids = np.empty(0, np.int64)
        self._flags: _Flags = np.empty(0, np.uint8)

    def sequences(self, documents: Iterable[tuple[list[int], _Flags]]) -> Iterator[tuple[_Ids, _Flags]]:
        """Tokens and flags [S] of each sequence; reads documents as they are needed."""
        waiting: list[tuple[list[int], _Flags]] = []
        size = 0
        for document in documents:
            waiting.append(document)
            size += len(document[0])
            if len(self.tokens) + size >= self.length:
                yield from self._cut(waiting, last=False)
                waiting, size = [], 0
        yield from self._cut(waiting, last=True)

    def _cut(self, documents: list[tuple[list[int], _Flags]], last: bool) -> Iterator[tuple[_Ids, _Flags]]:
        """The sequences that are full; before the last documents, only where it is sure how they start."""
        tokens = np.concatenate([self.tokens, *(np.asarray(ids, np.int64) for ids, _ in documents)])
        flags = np.concatenate([self._flags, *(flags for _, flags in documents)])
        front = len(self.prefix)
        start = 0
        while True:
            there = np.array_equal(tokens[start : start + front], self.prefix)
            taken = self.length - (0 if there else front)
            if len(tokens) - start < (taken if last else self.length):
                break
            inside = slice(start, start + taken)
            row = np.concatenate([self.prefix[: self.length - taken], tokens[inside]]).astype(np.int64)
            marks = np.concatenate([np.zeros(self.length - taken, np.uint8), flags[inside]])
            if not there:
                marks[front] &= _SCORED  # a document that starts here starts with what was put in front of it
            marks[: max(front, 1)] &= _START
            marks[0] = _START
            yield row, marks
            start += taken
        self.tokens, self._flags = tokens[start:], flags[start:]


class _Writer:
    """Writes sequences as shards, and meta.json when all are there.

    Args:
        folder: made where it is not there; shards in it go.
        length: S, tokens of a sequence.
        most: sequences that will come.
    """

    def __init__(self, folder: Path, length: int, most: int) -> None:
        make_writable(folder)
        with writing(folder):
            for file in [folder / META, *folder.glob("shard-*")]:  # meta.json first: shards without it are nobody's
                file.unlink(missing_ok=True)
        self.folder = folder
        self.rows = min(SHARD_SEQUENCES, max(1, _SHARD_TOKENS // length))
        self.count = self.scored = 0
        self._sizes: list[int] = []
        self._tokens = np.empty((min(self.rows, most), length), np.int32)
        self._flags = np.empty(self._tokens.shape, np.uint8)

    def add(self, tokens_S: _Ids, flags_S: _Flags) -> None:
        """The next sequence."""
        row = self.count % self.rows
        self._tokens[row], self._flags[row] = tokens_S, flags_S
        self.count += 1
        self.scored += int(np.count_nonzero(flags_S & _SCORED))
        if row == self.rows - 1:
            self._write(self.rows)

    def _write(self, rows: int) -> None:
        file = _shard(self.folder, len(self._sizes))
        kept = {"tokens": torch.from_numpy(self._tokens[:rows]), "flags": torch.from_numpy(self._flags[:rows])}
        write_part(file, kept, {})
        self._sizes.append(file.stat().st_size)

    def finish(self, key: str, warnings: Sequence[str]) -> None:
        """Write what is left, and meta.json."""
        if self.count % self.rows:
            self._write(self.count % self.rows)
        meta = {
            "key": key, "sequences": self.count, "sequence_length": self._tokens.shape[1],
            "shard_sequences": self.rows, "bytes": self._sizes, "warnings": list(warnings),
        }  # fmt: skip
        with writing(self.folder):
            write_text(self.folder / META, json.dumps(meta))
