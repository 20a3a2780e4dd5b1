"""The .gguf file at the end of a recipe: written from the last artefact, opened in llama.cpp, put into the output."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import ModelError, RecipeError
from compress.evaluation.llama_cpp import check_in_llama_cpp
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
    """

    path: Path
    name: str
    bytes: int
    served: Served
    beside: Mapping[str, Path]


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
    from compress.exports.gguf.imatrix import export_imatrix
    from compress.exports.gguf.write import CODE_VERSION, export_gguf

    reporter = context.reporter

    def once(checkpoint: Path, key: str, name: str | None = None) -> tuple[Path, list[str]]:
        folder = work / "gguf" / fingerprint(key, side_digest(checkpoint), name, CODE_VERSION)
        folder.mkdir(parents=True, exist_ok=True)
        file, remarks = folder / "model.gguf", folder / "remarks.json"
        if fresh:
            remarks.unlink(missing_ok=True)
        with made_once(remarks, lambda holder: reporter.say(f"waiting for {holder}, which writes it")) as missing:
            if missing:
                if (checkpoint / SUMS).is_file():
                    export_imatrix(checkpoint, checkpoint / SUMS, folder / _IMATRIX)
                write_text(remarks, json.dumps(export_gguf(checkpoint, file, "auto", None, reporter, name).remarks))
            return file, json.loads(remarks.read_text(encoding="utf-8"))

    file, remarks = once(artefact.folder, artefact.key, recipe.name)
    for remark in remarks:
        reporter.warn(remark)
    beside = None if recipe.serve is None else once(base.folder, base_id)[0]
    reporter.say("opening the file in llama.cpp")
    served = served_in_llama_cpp(
        artefact.folder, file, matrix_types(file), beside, context.device, recipe.trust_remote_code
    )
    named = f"{stem_of(recipe.name)}.{_IMATRIX}"
    sums = {named: file.with_name(_IMATRIX)} if (artefact.folder / SUMS).is_file() else {}
    return GgufFile(file, file_name(recipe), file.stat().st_size, served, sums)


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
