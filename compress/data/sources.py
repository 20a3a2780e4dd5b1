"""Rows of text from wherever a spec points: a local file, a folder of them, or a dataset of the Hugging Face hub.

Every source is read as a stream, so a 10 GB file needs no more memory than a small one. The exceptions, read
whole, are an array in a .json file and a .parquet.gz (parquet needs random access).

Left out on purpose: csv and tsv (no text corpus ships in them), zstd (one more dependency), globs of files, and folders
to calibrate on (a hub dataset or one file is what a report can name and a checksum can pin).
"""

import difflib
import gzip
import io
import json
import random
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from compress.errors import CalibrationError
from compress.recipe.text import LOCAL_SUFFIXES, SourceSpec, TrainingText, is_local_source
from compress.system.fingerprint import content_digest, sha256

ALLOWED = f"{', '.join(LOCAL_SUFFIXES)}, each also .gz"
BLOCK_CHARACTERS = 8_192  # a .txt is cut after the first blank line past so many characters,
LONGEST_BLOCK = 65_536  # or after the first line past so many


class Row(NamedTuple):
    """One record of a source.

    Args:
        where: the place that an error names, such as `corpus.jsonl:12`.
        value: a mapping of fields, or the text itself; anything else is for the reader of rows to refuse.
    """

    where: str
    value: object


def read_rows(spec: SourceSpec, fields: Sequence[str], *, shuffle_shards: bool) -> Iterator[Row]:
    """The rows of a spec's source, in the order of the file; of a folder, file by file in the order of their names.

    Args:
        spec: names the source; `sha256` is checked before anything is read.
        fields: columns that matter; a parquet file's others are not read.
        shuffle_shards: visit the shards of a hub dataset, or a folder's files, in an order drawn from `spec.seed`.

    Raises:
        CalibrationError: while iterating, at the first row that can't be read.
    """
    files = source_files(spec)
    if files is None:
        yield from _hub_rows(spec, shuffle_shards=shuffle_shards)
        return
    if shuffle_shards:
        random.Random(spec.seed).shuffle(files)
    for file in files:
        kind = _check_file(file)
        if spec.sha256 is not None:
            _check_sha256(file, spec.sha256)
        yield from _file_rows(file, kind, fields)


def source_files(spec: SourceSpec) -> list[Path] | None:
    """The local files of a source, by name; None for a hub dataset. Only a training text may be a folder of several.

    Raises:
        CalibrationError: a folder without any, or one with a checksum, which is of one file.
    """
    path = Path(spec.source).expanduser()
    if not (is_local_source(spec.source) or path.exists()):
        return None
    if not (isinstance(spec, TrainingText) and path.is_dir()):
        return [path]
    if spec.sha256 is not None:
        raise CalibrationError(f"{path}: is a folder, and sha256 is of one file; remove sha256")
    with _reading(path):
        found = sorted(file for file in path.iterdir() if _is_text(file))
    if not found:
        raise CalibrationError(f"{path}: holds no text; put files into it ({ALLOWED})")
    return found


def source_identity(spec: SourceSpec) -> list[Any]:
    """What tells a source from another: type and content of its files, wherever they lie, or the dataset's id.

    Raises:
        CalibrationError: a file that can't be read.
    """
    files = source_files(spec)
    if files is None:
        return [spec.source, spec.subset, spec.split, spec.revision]
    identity = []
    for file in files:
        kind = _check_file(file)
        with _reading(file):
            identity.append([kind, file.suffix.lower() == ".gz", content_digest(file)])
    return identity


def _is_text(file: Path) -> bool:
    """Whether a file of a folder is part of its text: of a type that is read, and neither hidden nor empty."""
    name = file.name.lower().removesuffix(".gz")
    return name.endswith(LOCAL_SUFFIXES) and not name.startswith(".") and file.is_file() and file.stat().st_size > 0


def _file_rows(path: Path, kind: str, fields: Sequence[str]) -> Iterator[Row]:
    if kind == ".parquet":
        yield from _parquet_rows(path, fields)
    elif kind == ".txt":
        yield from _text_rows(path)
    elif kind == ".jsonl":
        yield from _json_lines(path, _lines(path))
    else:
        yield from _json_rows(path)


def is_plain_text(source: str) -> bool:
    """Whether a source is one running text, whose rows join to exactly the file, rather than separate documents."""
    return source.removesuffix(".gz").endswith(".txt")


def _check_file(path: Path) -> str:
    """The format's suffix, without .gz."""
    name = path.name.lower()
    kind = Path(name.removesuffix(".gz")).suffix
    if path.is_dir():
        raise CalibrationError(f"{path}: is a folder; name one file in it ({ALLOWED})")
    if kind not in LOCAL_SUFFIXES:
        shown = kind + ".gz" * name.endswith(".gz") or "none"
        raise CalibrationError(f"{path}: unknown suffix {shown}; allowed: {ALLOWED}")
    if not path.parent.is_dir():
        raise CalibrationError(f"{path}: no such file; there is no folder {path.parent}")
    if not path.exists():
        names = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
        near = difflib.get_close_matches(path.name, names)
        remedy = f"did you mean {' or '.join(near)}?" if near else "correct the path (relative ones start at the spec)"
        raise CalibrationError(f"{path}: no such file; {remedy}")
    if path.stat().st_size == 0:
        raise CalibrationError(f"{path}: is empty; put text into it or name another file")
    return kind


def _check_sha256(path: Path, expected: str) -> None:
    with _reading(path):
        found = sha256(path)
    if found != expected:
        raise CalibrationError(
            f"{path}: sha256 is {found} and should be {expected}; "
            "get the original file again, or correct sha256 if the change is meant"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what can go wrong below the text (disk, permission, gzip) into one line."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path}: not a whole gzip file ({error}); download or pack it again") from error
    except OSError as error:
        raise CalibrationError(f"{path}: can't be read ({error.strerror or _first_line(error)})") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines and their numbers from 1, decoded as UTF-8, with any line ending turned into a newline."""
    offset = 0
    with _reading(path), _open(path) as stream:
        for number, raw in enumerate(stream, 1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                place = f"byte {offset + error.start}" + (" of its content" if path.suffix.lower() == ".gz" else "")
                raise CalibrationError(
                    f"{path}: not UTF-8 at {place} (0x{raw[error.start]:02x}); save the file as UTF-8"
                ) from error
            offset += len(raw)
            if number == 1:
                line = line.removeprefix("\ufeff")
            yield number, line.replace("\r\n", "\n").replace("\r", "\n")


def _text_rows(path: Path) -> Iterator[Row]:
    """Passages of a running text, each ending at a blank line where there is one; joined they are the file."""
    first, block, size, after_blank = 1, list[str](), 0, False
    for number, line in _lines(path):
        blank = not line.strip()
        if not blank and size >= (BLOCK_CHARACTERS if after_blank else LONGEST_BLOCK):
            yield Row(f"{path}:{first}", "".join(block))
            first, block, size = number, [], 0
        block.append(line)
        size += len(line)
        after_blank = blank
    if block:
        yield Row(f"{path}:{first}", "".join(block))


def _json_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[Row]:
    for number, line in lines:
        if line.strip():
            try:
                yield Row(f"{path}:{number}", json.loads(line.rstrip()))
            except json.JSONDecodeError as error:
                raise CalibrationError(
                    f"{path}:{number}: invalid JSON ({error.msg} at column {error.colno}); write one object per line"
                ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    """A .json file holds an array of rows, or one row per line as .jsonl does."""
    lines = _lines(path)
    start = next(((number, line) for number, line in lines if line.strip()), None)
    if start is None:
        return
    if not start[1].lstrip().startswith("["):
        yield from _json_lines(path, chain([start], lines))
        return
    try:
        rows = json.loads("".join(line for _, line in chain([start], lines)))
    except json.JSONDecodeError as error:
        line = start[0] + error.lineno - 1
        raise CalibrationError(
            f"{path}:{line}: invalid JSON ({error.msg} at column {error.colno}); write an array of objects"
        ) from error
    for number, row in enumerate(rows, 1):
        yield Row(f"{path} item {number}", row)


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    import pyarrow  # slow to import, and few sources are parquet
    from pyarrow import parquet

    number = 0
    with _reading(path), _open(path) as stream:
        source: Any = io.BytesIO(stream.read()) if path.suffix.lower() == ".gz" else stream
        try:
            table = parquet.ParquetFile(source)
            columns = [name for name in table.schema_arrow.names if name in fields] or None
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path} row {number}", value)
        except pyarrow.ArrowException as error:
            raise CalibrationError(
                f"{path}: not a readable parquet file ({_first_line(error)}); download or write it again"
            ) from error


def _hub_rows(spec: SourceSpec, *, shuffle_shards: bool) -> Iterator[Row]:
    from datasets import load_dataset  # takes a second to import, and local files don't need it
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(spec.source, spec.subset, split=spec.split, revision=spec.revision, streaming=True)
        if shuffle_shards:  # rows are shuffled by our own buffer: datasets' is bounded in rows only, not in memory
            dataset = dataset.shuffle(seed=spec.seed, buffer_size=1)
        for value in dataset:
            yield Row(spec.source, value)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise CalibrationError(
            f"{spec.source}: can't be read from the hub ({_first_line(error)}); "
            f"check the dataset's id, subset, split and the connection, or use a local file ({ALLOWED})"
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
