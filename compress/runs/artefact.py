"""Artefacts: folders that are whole checkpoints plus a record of how they came to be, and where they lie.

A work folder holds everything that makes a run repeatable and resumable:

    .dscompress/
      base/<fingerprint>/          a GGUF file as a checkpoint
      stages/<fingerprint>/        a finished stage: a checkpoint with dscompress.json
      stages/<fingerprint>.part/   one under way: a file for each finished layer
      stages/<fingerprint>.lock    held alone by who makes it, shared by those who use it
      scores/<fingerprint>/        what stages on one model and text share: the order in which parts are removed
      texts/<fingerprint>/         a text to train on, packed into sequences of tokens
      teachers/<fingerprint>/      what a teacher said of them
      exports/<fingerprint>*       the result for another program, and what that said of it
      evaluations/<fingerprint>*   figures, and the base model's last hidden states
      digests.json                 of the base model's files

A folder gets its final name by one rename, when it is whole. Never imports torch.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING

from compress.errors import OutputError
from compress.model.checkpoint import INDEX, read_part, write_part
from compress.model.identity import DIGESTS
from compress.model.side_files import refresh
from compress.records import RECORD, Probe, Record, Report, now, read_record
from compress.report.write import write_model_card, write_report
from compress.stages.contract import Result
from compress.system.files import commit, link_or_copy, unwritable, write_text
from compress.system.fingerprint import digests
from compress.system.locks import FileLock
from compress.system.machine import versions

if TYPE_CHECKING:
    from torch import Tensor

_ENVIRONMENT = "environment.json"  # what continuing half-done work needs to be the same
MATTERS = ("torch", "transformers")
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data", ".bin")


class StageArtefact:
    """What a stage makes, in a work folder.

    Used in a `with`, which ends with the run: until then nobody takes the artefact away.

    Args:
        work: the work folder.
        key: the stage's fingerprint.
        what: it is called when somebody has to wait for it.
        say: told what the user should know.

    Attributes:
        folder: the finished checkpoint.
        part: folder in which the stage works.
    """

    def __init__(self, work: Path, key: str, what: str, say: Callable[[str], None]) -> None:
        stages = work / "stages"
        self.key, self.folder, self.part = key, stages / key, stages / f"{key}.part"
        self._probe = stages / f"{key}.probe.safetensors"
        self._lock = FileLock(stages / f"{key}.lock")
        self._what, self._say, self._making = what, say, False

    def find(self, fresh: bool, device: str, parent: Path) -> Record | None:
        """The record of a finished artefact, which may be used from now on; None where it is for this process to make.

        Waits for another process that is making it.

        Args:
            fresh: make it anew in any case.
            device: kind of device that computes.
            parent: folder of what the stage starts from, whose side files the artefact has.
        """
        if not fresh:
            self._lock.acquire(exclusive=False, waiting=self._wait)
            record = self._finished()
            if record is not None:
                shutil.rmtree(self.part, ignore_errors=True)  # of one that was killed when it had finished
                return refresh(parent, self.folder, record)
            self._lock.release()
        self._lock.acquire(exclusive=True, waiting=self._wait)
        if fresh:
            shutil.rmtree(self.folder, ignore_errors=True)
            shutil.rmtree(self.part, ignore_errors=True)
        record = self._finished()
        if record is not None:  # by a process that has been waited for
            self._lock.acquire(exclusive=False)
            shutil.rmtree(self.part, ignore_errors=True)
            return refresh(parent, self.folder, record)
        self._begin(device)
        return None

    def _wait(self, holder: str) -> None:
        self._say(f"{self._what}: waiting for {holder}, which is at work on the same")

    def _finished(self) -> Record | None:
        return read_record(self.folder) if self._probe.is_file() else None

    def _begin(self, device: str) -> None:
        """Keep what an earlier run has left half-done only if this one would compute the same."""
        here = {name: version for name, version in versions().items() if name in MATTERS} | {"device": device}
        noted = self.part / _ENVIRONMENT
        there = None
        with suppress(OSError, ValueError):
            there = json.loads(noted.read_text(encoding="utf-8"))
        if self.part.exists() and there != here:
            other = there if isinstance(there, dict) else {}
            changes = [f"{name} {other.get(name, 'unknown')}, now {value}" for name, value in here.items()]
            changed = "; ".join(
                c for c, (name, value) in zip(changes, here.items(), strict=True) if other.get(name) != value
            )
            self._say(f"{self._what}: was begun with {changed}; starting it again")
            shutil.rmtree(self.part)
        self._making = True
        self.part.mkdir(parents=True, exist_ok=True)
        write_text(noted, json.dumps(here))

    def commit(self, result: Result, *, parent: str, base: str, probe: Probe) -> None:
        """Give what the stage has made its record and its name."""
        made = self.part / "checkpoint"
        record = Record(
            fingerprint=self.key, parent=parent, base=base, stage=result.record, created=now(), versions=versions(),
            probe=probe, files=digests(made),
        )  # fmt: skip
        write_text(made / RECORD, record.model_dump_json(indent=2) + "\n")
        write_part(self._probe, {"logits": result.logits}, {})
        commit(made, self.folder)
        shutil.rmtree(self.part, ignore_errors=True)
        self._making = False
        self._lock.acquire(exclusive=False)

    def logits(self) -> "Tensor":
        """What the finished model said in memory, float32 [S, V]."""
        return read_part(self._probe)[0]["logits"]

    def __enter__(self) -> "StageArtefact":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._making and {path.name for path in self.part.glob("*")} <= {_ENVIRONMENT}:
            shutil.rmtree(self.part, ignore_errors=True)  # it was begun, and nothing is lost
        self._lock.release()


def work_folder(output: Path, work_dir: Path | None) -> Path:
    """Where intermediate artefacts lie: what `--work-dir` says, else beside the output."""
    return work_dir or output.parent / ".dscompress"


def check_work(work: Path, output: Path, model: str) -> None:
    """Refuse a work folder inside the output, which is replaced, or inside the model's folder, which is not ours.

    Args:
        work: the work folder.
        output: the output folder.
        model: what the recipe calls the model.

    Raises:
        OutputError: naming it.
    """
    try:
        work.exists()
    except OSError as error:
        raise unwritable(work, error) from error
    real = Path(os.path.realpath(work))
    for what, folder in (("output", output), ("model", Path(model))):
        place = Path(os.path.realpath(folder))
        if (real == place or place in real.parents) and (what == "output" or place.is_dir()):
            raise OutputError(f"--work-dir {work}: lies in the {what} folder; name another folder")


def is_work(path: Path) -> bool:
    """Whether something in a work folder is what a run has worked for: a file that is no lock and no mere digest."""
    return path.is_file() and path.suffix != ".lock" and path.name != DIGESTS


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something else than an earlier result.

    Raises:
        OutputError: with what to do.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file()):
        raise OutputError(f"{output}: exists and was not written by dscompress; choose another --output or remove it")


def write_output(
    artefact: Path,
    output: Path,
    report: Report,
    beside: Mapping[str, Path] = MappingProxyType({}),
    written: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Give an output the files of a finished checkpoint, its report and its model card, all by one rename.

    Args:
        artefact: the checkpoint.
        output: folder to write; what a user added to an earlier result in it stays.
        report: says where it lies then, and whether other files hold the weights than the artefact's own.
        beside: further files, by their names there; a name may have a folder in it.
        written: SHA-256 of those beside, as they were written, by their names there.

    Raises:
        OutputError: the folder holds something else, or can't be written.
    """
    partial = output.with_name(f".{output.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _publish(artefact, partial, report, beside, written)
        write_report(report, partial)
        write_model_card(report, partial)
        check_output(output)
        _keep_foreign(output, partial)
        commit(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is left of it where all went well


def _publish(
    artefact: Path, output: Path, report: Report, beside: Mapping[str, Path], written: Mapping[str, str]
) -> None:
    """Put an artefact's files into the folder `output`: weights as hard links where the disk allows, others copied."""
    own = report.compressed.file is None or report.compressed.file not in beside
    for file in artefact.iterdir():
        if file.suffix in (".safetensors", ".gguf"):
            if own:
                link_or_copy(file, output / file.name)
        elif not own and file.name == INDEX:
            pass  # of safetensors
        elif file.is_dir():
            shutil.copytree(file, output / file.name, copy_function=_place)
        else:
            shutil.copy2(file, output / file.name)
    record = read_record(output)
    if beside and record is not None:
        for name, source in beside.items():
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            _place(source, output / name)
        files = {name: digest for name, digest in record.files.items() if (output / name).is_file()}
        files |= {name: written[name] for name in beside}
        stage = record.stage.model_copy(update={"spec": report.stages[-1].spec})  # as this run was asked
        record = record.model_copy(update={"files": files, "stage": stage})
        write_text(output / RECORD, record.model_dump_json(indent=2) + "\n")


def _place(source: str | Path, target: str | Path) -> None:
    """Another name of a file of weights, which nobody edits; a copy of any other."""
    if Path(source).suffix in _WEIGHTS:
        link_or_copy(Path(source), Path(target))
    else:
        shutil.copy2(source, target)


def drop_weights(output: Path) -> None:
    """Delete a result's weights, for other programs too; its report and its record stay."""
    record = read_record(output)
    recorded = () if record is None else record.files
    for file in {*output.glob("*.safetensors*"), *(output / name for name in recorded)}:
        if file.suffix in _WEIGHTS or file.name == INDEX:
            file.unlink(missing_ok=True)


def _keep_foreign(output: Path, replacement: Path) -> None:
    """Copy to a new output what a user added to the old one: all that its record and its report don't account for."""
    record = read_record(output)
    if record is None:
        return
    recorded = {name.partition("/")[0] for name in record.files}
    for entry in output.iterdir():
        ours = entry.name in recorded or entry.name == RECORD or (replacement / entry.name).exists()
        if not ours and entry.is_dir():
            shutil.copytree(entry, replacement / entry.name, symlinks=True)
        elif not ours:
            shutil.copy2(entry, replacement / entry.name, follow_symlinks=False)
        elif entry.name in recorded and entry.is_dir():
            _keep_inside(entry, replacement / entry.name, record.files)


def _keep_inside(folder: Path, replacement: Path, recorded: Collection[str]) -> None:
    """The same in a folder of ours."""
    for file in folder.rglob("*"):
        name = file.relative_to(folder)
        target = replacement / name
        if file.is_file() and f"{folder.name}/{name.as_posix()}" not in recorded and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
