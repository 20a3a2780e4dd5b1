"""The files beside a checkpoint's weights that go with it: tokenizer, chat templates, generation config, licence.

They come from the base at the start and are brought up to date when a finished stage is taken again, since none of them
is a reason to compute it anew. Never imports torch.
"""

import shutil
from pathlib import Path

from compress.records import RECORD, Record
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint, sha256

_NOT_COPIED = (  # by first and by last letters: weights, adapters, and what is written anew
    (".", "config.json", "README.md", RECORD, "report.", "adapter_", "quantize_config.json", "train_log."),
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json"),
)
_FOLDERS = ("additional_chat_templates",)  # transformers' name for the templates beside the first one


def side_files(folder: Path) -> list[str]:
    """Paths inside a checkpoint folder, with "/", sorted."""
    found = [file for part in (".", *_FOLDERS) for file in (folder / part).glob("*") if file.is_file()]
    names = [file.relative_to(folder).as_posix() for file in found]
    return sorted(name for name in names if not name.startswith(_NOT_COPIED[0]) and not name.endswith(_NOT_COPIED[1]))


def side_digest(folder: Path) -> str:
    """What identifies their contents."""
    return fingerprint({name: sha256(folder / name) for name in side_files(folder)})


def copy_side_files(source: Path, target: Path) -> None:
    """Copy them to another checkpoint folder, over those that it has; what the source lacks is removed there."""
    names = side_files(source)
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        copy = (target / name).with_name((target / name).name + ".tmp")
        shutil.copyfile(source / name, copy)
        copy.replace(target / name)
    for name in set(side_files(target)) - set(names):
        (target / name).unlink()
    for part in _FOLDERS:
        if (target / part).is_dir() and not any((target / part).iterdir()):
            (target / part).rmdir()


def refresh(parent: Path, artefact: Path, record: Record) -> Record:
    """Give a finished stage the side files that its parent has now, and its record their digests; returns the record.

    The record is written last: one that was stopped in between is refreshed again.
    """
    digests = {name: sha256(parent / name) for name in side_files(parent)}
    kept = set(record.files) - set(side_files(artefact))
    wanted = {name: record.files[name] for name in record.files if name in kept and name not in digests} | digests
    if wanted == record.files and set(side_files(artefact)) == set(digests):
        return record
    copy_side_files(parent, artefact)
    record = record.model_copy(update={"files": wanted})
    write_text(artefact / RECORD, record.model_dump_json(indent=2) + "\n")
    return record
