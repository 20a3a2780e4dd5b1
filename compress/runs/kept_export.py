"""What an exporter has written of a checkpoint, kept in a work folder.

It lies in `exports/<fingerprint>`, with a note of what was written beside it, which appears last: a run that was killed
writes it again, and one that was not does not, unless a file has changed since.
"""

import json
import shutil
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.model.side_files import side_digest
from compress.runs.exporters import Exporter
from compress.system.files import write_text
from compress.system.fingerprint import digests, fingerprint
from compress.system.locks import FileLock
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.runs.exporters import AnyWritten


@dataclass(frozen=True)
class Source:
    """What is written.

    Args:
        folder: a checkpoint.
        key: fingerprint of what it was made by.
        name: what programs call the model; None is the folder's name.
    """

    folder: Path
    key: str
    name: str | None = None


class KeptExport:
    """One export in a work folder.

    Args:
        exporter: what writes it.
        source: of what.
        name: of the file or the folder, in the output and in messages.
        work: the work folder.
        fresh: write it anew even if it is there.
        reporter: told what happens.

    Attributes:
        written: what the exporter said of it; set by `write`.
        digests: SHA-256 of each file as it was written, by where it lies; likewise.
    """

    written: "AnyWritten"
    digests: dict[Path, str]

    def __init__(
        self, exporter: Exporter, source: Source, name: str, work: Path, fresh: bool, reporter: Reporter
    ) -> None:
        self.exporter, self.source, self.name = exporter, source, name
        self.fresh, self.reporter = fresh, reporter
        options = exporter.spec.model_dump(mode="json", exclude={"python"})
        sides = side_digest(source.folder)  # no part of a stage's fingerprint, and some of them go into the file
        self.key = fingerprint(source.key, sides, options, exporter.made_by(source.name))
        self.folder = work / "exports" / self.key
        self.note, self.said = (self.folder.with_name(f"{self.key}{end}.json") for end in ("", ".said"))
        self.path = self.folder / exporter.spec.file_name("model")

    def write(self, held: ExitStack) -> None:
        """Write it unless it is there as it was written, and hold on to it."""
        with ExitStack() as here:
            lock = here.enter_context(FileLock(self.note.with_suffix(".lock")))
            lock.acquire(exclusive=False, waiting=self._wait)
            if self.fresh or not self._is_whole():
                lock.release()
                lock.acquire(exclusive=True, waiting=self._wait)
                if self.fresh or not self._is_whole():  # another process may have written it
                    self._make()
                lock.acquire(exclusive=False, waiting=self._wait)
            else:
                self.reporter.say(f"{self.name}: written before, taken from {self.folder}")
            held.push(here.pop_all())
        kept = json.loads(self.note.read_text(encoding="utf-8"))
        self.written = self.exporter.load(kept["written"], self.path)
        self.digests = {self.folder / name: digest for name, digest in kept["files"].items()}

    def _wait(self, holder: str) -> None:
        self.reporter.say(f"waiting for {holder}, which writes or uses {self.name}")

    def _is_whole(self) -> bool:
        """Whether all is there, and as it was written."""
        if not self.note.is_file():
            return False
        with suppress(OSError, ValueError, KeyError, TypeError):
            if json.loads(self.note.read_text(encoding="utf-8"))["files"] == digests(self.folder):
                return True
        self.reporter.say(f"{self.name}: changed in {self.folder} since it was written; writing it again")
        return False

    def _make(self) -> None:
        for file in (self.note, self.said):
            file.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        written = self.exporter.write(self.source.folder, self.path, self.reporter, self.source.name)
        kept = {
            "stage": self.source.key, "written": self.exporter.dump(written), "files": digests(self.folder)
        }  # fmt: skip
        write_text(self.note, json.dumps(kept))

    def files(self) -> dict[str, Path]:
        """What goes into the output, by its name there."""
        written = sorted(self.digests)
        if self.exporter.spec.target.suffix:
            stem, ending = self.path.stem, Path(self.name).stem
            return {ending + file.name.removeprefix(stem): file for file in written}
        return {f"{self.name}/{file.relative_to(self.path).as_posix()}": file for file in written}
