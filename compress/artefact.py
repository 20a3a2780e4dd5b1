"""Artefacts: folders that are whole checkpoints plus a record of how they came to be; fingerprints and the lock.

A work folder holds everything that makes a run repeatable and resumable:

    .dscompress/
      lock                        one run at a time
      base/<fingerprint>/         a GGUF file as a checkpoint
      stages/<fingerprint>/       a finished stage: a checkpoint with dscompress.json
      stages/<fingerprint>.part/  one under way: a file for each finished layer
      evaluations/<fingerprint>*  figures, and the base model's last hidden states

A folder gets its final name by one rename, when it is whole. Never imports torch.
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from compress.errors import OutputError
from compress.report.schema import Stage

RECORD = "dscompress.json"
_PACKAGES = ("dscompress", "torch", "transformers", "compressed-tensors", "torchao", "safetensors", "accelerate")


class Probe(BaseModel):
    """What the model in memory said to a few tokens, so that the checkpoint can be asked the same anywhere.

    Args:
        tokens: token ids, one sequence.
        best: the most likely next token at every position.
        logit: its logit.
        dtype: in what precision.
    """

    model_config = ConfigDict(extra="forbid")
    tokens: list[int]
    best: list[int]
    logit: list[float]
    dtype: str


class Record(BaseModel):
    """dscompress.json: how a checkpoint came to be; `files` has the SHA-256 of each of its other files, by name."""

    model_config = ConfigDict(extra="forbid")
    fingerprint: str
    parent: str
    base: str
    stage: Stage
    probe: Probe
    files: dict[str, str]
    created: str
    versions: dict[str, str]


def fingerprint(*parts: Any) -> str:
    """A short digest of anything that JSON can hold; equal parts give equal digests in every process."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digests(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files, by their names."""
    with ThreadPoolExecutor() as pool:
        return dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_record(folder: Path) -> Record | None:
    """The record of an artefact, or None where there is none that this version can read."""
    try:
        return Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_text(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


def work_folder(output: Path, work_dir: Path | None) -> Path:
    """Where intermediate artefacts lie: what `--work-dir` says, else beside the output."""
    return work_dir or output.parent / ".dscompress"


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something else than an earlier result.

    Raises:
        OutputError: with what to do.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file()):
        raise OutputError(f"{output}: exists and was not written by dscompress; choose another --output or remove it")


def make_writable(folder: Path) -> None:
    """Make a folder where there is none, and try whether a file can be written in it.

    Raises:
        OutputError: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise unwritable(folder, error) from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn what the system says against writing into one line, about the file that it names or else the folder.

    Raises:
        OutputError: no space, or no right to write there.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(Path(error.filename or folder), error) from error


def unwritable(path: Path, error: Exception) -> OutputError:
    """The error for a path that could not be written, with what to do about it."""
    reason = getattr(error, "strerror", None) or str(error)
    if isinstance(error, FileExistsError | NotADirectoryError):
        return OutputError(f"{path}: a file is where a folder should be; choose another --output or --work-dir")
    if "No space left" in reason or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{path}: no space left on the disk; free some and run the same command again to continue")
    return OutputError(
        f"{path}: cannot be written ({reason}); choose another --output or --work-dir, or make it writable"
    )


def commit(finished: Path, final: Path) -> None:
    """Give a finished folder its final name, in place of what had it."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.replace(old)
    finished.replace(final)
    shutil.rmtree(old, ignore_errors=True)


def publish(artefact: Path, output: Path) -> None:
    """Put an artefact's files into the folder `output`: weights as hard links where the disk allows, others copied."""
    for file in artefact.iterdir():
        if file.suffix == ".safetensors":
            link_or_copy(file, output / file.name)
        else:
            shutil.copy2(file, output / file.name)


def link_or_copy(file: Path, target: Path) -> None:
    """Make `target` another name of `file`, or a copy where the file system has no hard links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def keep_foreign(output: Path, replacement: Path) -> None:
    """Copy to a new output what a user added to the old one: all that its record and its report don't account for."""
    record = read_record(output)
    if record is None:
        return
    for entry in output.iterdir():
        ours = entry.name in record.files or entry.name == RECORD or (replacement / entry.name).exists()
        if not ours and entry.is_dir():
            shutil.copytree(entry, replacement / entry.name, symlinks=True)
        elif not ours:
            shutil.copy2(entry, replacement / entry.name, follow_symlinks=False)


class RunLock:
    """Held while a run uses a work folder; the operating system frees it when the process ends, however it ends.

    A run that fails before it has made anything else takes the folder with it.

    Raises:
        OutputError: another run holds it.
    """

    def __init__(self, work: Path) -> None:
        self.file = work / "lock"

    def __enter__(self) -> None:
        make_writable(self.file.parent)
        self._handle = self.file.open("ab+", buffering=0)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._handle.seek(0)
            holder = self._handle.read().decode() or "another process"
            self._handle.close()
            raise OutputError(
                f"{self.file.parent}: in use by {holder}; wait for that run, or give this one another --work-dir"
            ) from None
        with writing(self.file.parent):
            self._handle.truncate(0)
            self._handle.write(f"process {os.getpid()} since {now()}".encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        folder = self.file.parent
        if error is not None and not any(
            path.is_file() and not path.name.endswith("lock") for path in folder.rglob("*")
        ):
            shutil.rmtree(folder, ignore_errors=True)
        self._handle.close()
