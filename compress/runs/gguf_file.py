"""The .gguf file at the end of a recipe: written from the last artefact, opened in llama.cpp, put into the output."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from compress.errors import ModelError, RecipeError, reason
from compress.evaluation.llama_cpp import ENGINE, check_in_llama_cpp
from compress.evaluation.llama_cpp_served import served_in_llama_cpp
from compress.evaluation.verify import Check
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.side_files import side_digest
from compress.model.source import resolve_model
from compress.recipe.export import stem_of
from compress.recipe.schema import Recipe
from compress.records import Report, read_record
from compress.runs.artefact import StageArtefact
from compress.served_records import Served
from compress.stages.quantize.input_squares import FILE as SUMS
from compress.system.extras import missing_extra
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint, sha256
from compress.system.locks import made_once
from compress.system.progress import Reporter

_IMATRIX = "imatrix.gguf"


@dataclass(frozen=True)
class GgufFile:
    """What was written, and what llama.cpp said of it.

    Args:
        path: in the work folder.
        name: in the output.
        bytes: of it.
        served: for the report.
        beside: what goes into the output beside it, by its name there.
        digests: SHA-256 of all of them as they were written, by their names there.
    """

    path: Path
    name: str
    bytes: int
    served: Served
    beside: dict[str, Path]
    digests: dict[str, str]


def writes_gguf(recipe: Recipe) -> bool:
    """Whether the recipe's result is a .gguf file."""
    return getattr(recipe.stages[-1], "format", None) == "gguf"


def check_writable(recipe: Recipe, base: Checkpoint) -> None:
    """Refuse, before any work, what could not be written at its end.

    Raises:
        RecipeError: no `gguf` package, or a model whose computation or tokenizer llama.cpp can't have.
    """
    where = f"stages.{len(recipe.stages) - 1}.format"
    if missing := missing_extra("gguf", "gguf"):
        raise RecipeError([f"{where}: {missing}"])
    from compress.exports.gguf.config import header_of
    from compress.exports.gguf.tokenizer import tokenizer_keys

    try:
        header = header_of(base.folder, str(base.config.get("model_type")))
        tokenizer_keys(base.folder, header.config.vocab_size)
    except ModelError as error:
        raise RecipeError([f"{where}: gguf can't hold this model: {error}"]) from None


def make_gguf(
    recipe: Recipe, artefact: StageArtefact, base: Checkpoint, base_id: str, work: Path, fresh: bool, context: Context
) -> GgufFile:
    """Write the file in the work folder, once for each artefact, and ask llama.cpp about it.

    Args:
        recipe: whose result it is.
        artefact: of the last stage.
        base: to time beside it, where the recipe has `serve`.
        base_id: its fingerprint.
        work: the work folder.
        fresh: write anew what was written before.
        context: where our reader computes, and who is told what happens.
    """
    reporter = context.reporter
    file, kept = _made(artefact.folder, artefact.key, recipe.name, work, fresh, reporter)
    for remark in kept["remarks"]:
        reporter.warn(remark)
    served = _asked(recipe, artefact.folder, file, base, base_id, work, fresh, context)
    name, sums = file_name(recipe), f"{stem_of(recipe.name)}.{_IMATRIX}"
    beside, digests = {}, {name: kept["files"][file.name]}
    if _IMATRIX in kept["files"]:
        beside, digests[sums] = {sums: file.with_name(_IMATRIX)}, kept["files"][_IMATRIX]
    return GgufFile(file, name, file.stat().st_size, served, beside, digests)


def _made(
    checkpoint: Path, key: str, name: str | None, work: Path, fresh: bool, reporter: Reporter
) -> tuple[Path, dict[str, Any]]:
    """The file of a checkpoint, and what was noted of it: remarks, and digests of what was written."""
    from compress.exports.gguf.imatrix import export_imatrix
    from compress.exports.gguf.write import CODE_VERSION, export_gguf

    folder = work / "gguf" / fingerprint(key, side_digest(checkpoint), name, CODE_VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    file, imatrix, note = folder / "model.gguf", folder / _IMATRIX, folder / "note.json"
    if fresh or not _is_whole(note, reporter):
        note.unlink(missing_ok=True)
    with made_once(note, lambda holder: reporter.say(f"waiting for {holder}, which writes it")) as missing:
        if missing:
            file.unlink(missing_ok=True)  # a damaged one would not be known as ours
            if (checkpoint / SUMS).is_file():
                export_imatrix(checkpoint, checkpoint / SUMS, imatrix)
            remarks = export_gguf(checkpoint, file, "auto", None, reporter, name).remarks
            files = {each.name: sha256(each) for each in (file, imatrix) if each.is_file()}
            write_text(note, json.dumps({"remarks": remarks, "files": files}))
        return file, json.loads(note.read_text(encoding="utf-8"))


def _is_whole(note: Path, reporter: Reporter) -> bool:
    """Whether all that a note tells of is as it was written."""
    if not note.is_file():
        return False
    with suppress(OSError, ValueError, KeyError, TypeError):
        files = json.loads(note.read_text(encoding="utf-8"))["files"].items()
        if all(sha256(note.with_name(name)) == digest for name, digest in files):
            return True
    reporter.say(f"{note.parent}: changed since it was written; writing it again")
    return False


def _asked(
    recipe: Recipe, checkpoint: Path, file: Path, base: Checkpoint, base_id: str, work: Path, fresh: bool,
    context: Context,
) -> Served:  # fmt: skip
    """What llama.cpp says of the file; that it could not be asked, whatever the reason, is said and recorded."""
    reporter = context.reporter
    try:
        beside = None if recipe.serve is None else _made(base.folder, base_id, None, work, fresh, reporter)[0]
        reporter.say("opening the file in llama.cpp")
        types, trust = matrix_types(file), recipe.trust_remote_code
        return served_in_llama_cpp(checkpoint, file, types, beside, context.device, trust)
    except Exception as error:  # of memory, of disks, of our own reader: the file must not be lost by it
        reporter.warn(
            f"llama.cpp could not be asked about the file: {reason(error)}; mend this and run the same command again, "
            "or run dscompress verify on the file"
        )
        return Served(engine=ENGINE, opened=False, passed=False, note=f"could not be asked: {reason(error)}")


def verify_gguf(file: Path) -> list[Check]:
    """What can be said of a GGUF file: it is as it was written, and llama.cpp reads in it what our reader does."""
    record, checks = read_record(file.parent), list[Check]()
    if record is not None and file.name in record.files:
        same = record.files[file.name] == sha256(file)
        said = "as it was written (SHA-256)" if same else "changed since it was written"
        checks.append(Check("file", same, f"{file.stat().st_size:,} bytes, {said}"))
    with TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = resolve_model(str(file), None, Path(scratch), Reporter().say)
        return [*checks, *check_in_llama_cpp(folder, file, matrix_types(file))[0]]


def matrix_types(file: Path) -> set[str]:
    """Types of a file's matrices, ggml's names."""
    from gguf import GGMLQuantizationType

    from compress.model.gguf.header import open_gguf

    return {GGMLQuantizationType(each.type).name for each in open_gguf(file).tensors.values() if len(each.shape) > 1}


def file_name(recipe: Recipe) -> str:
    """NAME-Q4_K_M.gguf."""
    kind = str(getattr(recipe.stages[-1], "type", ""))
    stem = stem_of(recipe.name)
    return f"{stem if kind in stem.lower() else f'{stem}-{kind.upper()}'}.gguf"


def with_gguf(report: Report, made: GgufFile) -> Report:
    """The report, with the file's size for the checkpoint's, and what llama.cpp said of it."""
    size = {"bytes": made.bytes, "bits_per_weight": 8 * made.bytes / report.compressed.parameters}
    stages = [*report.stages[:-1], report.stages[-1].model_copy(update={"bytes": made.bytes})]
    return report.model_copy(
        update={
            "compressed": report.compressed.model_copy(update=size | {"file": made.name}),
            "size_ratio": report.base.bytes / made.bytes,
            "stages": stages,
            "served": made.served,
        }
    )
