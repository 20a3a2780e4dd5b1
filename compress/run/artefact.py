"""Artefacts: folders that are whole checkpoints plus a record of how they came to be, and where they lie.

A work folder holds everything that makes a run repeatable and resumable:

    .dscompress/
      lock                        one run at a time
      base/<fingerprint>/         a GGUF file as a checkpoint
      stages/<fingerprint>/       a finished stage: a checkpoint with dscompress.json
      stages/<fingerprint>.part/  one under way: a file for each finished layer
      evaluations/<fingerprint>*  figures, and the base model's last hidden states

A folder gets its final name by one rename, when it is whole. Never imports torch.
"""

import os
import shutil
from pathlib import Path

from compress.errors import OutputError
from compress.records import RECORD, read_record
from compress.system.files import link_or_copy, unwritable


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


def check_output(output: Path) -> None:
    """Refuse an output folder that holds something else than an earlier result.

    Raises:
        OutputError: with what to do.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file()):
        raise OutputError(f"{output}: exists and was not written by dscompress; choose another --output or remove it")


def publish(artefact: Path, output: Path) -> None:
    """Put an artefact's files into the folder `output`: weights as hard links where the disk allows, others copied."""
    for file in artefact.iterdir():
        if file.suffix == ".safetensors":
            link_or_copy(file, output / file.name)
        else:
            shutil.copy2(file, output / file.name)


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
