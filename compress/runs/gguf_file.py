"""The .gguf file at the end of a recipe, or its parts: planned, written from the last artefact, opened in llama.cpp."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import TYPE_CHECKING

from compress.errors import ModelError, RecipeError, reason
from compress.evaluation.llama_cpp import ENGINE, check_in_llama_cpp
from compress.evaluation.llama_cpp_served import served_in_llama_cpp
from compress.evaluation.verify import Check
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.header import open_gguf, parts_of
from compress.model.source import resolve_model
from compress.recipe.export import ExportSpec, stem_of
from compress.recipe.gguf import GgufStage
from compress.recipe.schema import Recipe
from compress.records import Report, read_record
from compress.runs.artefact import StageArtefact
from compress.runs.exporters import ForLlamaCpp
from compress.runs.foreseen import foreseen_result, origin_of, sketch_of
from compress.runs.kept_export import KeptExport, Source
from compress.runs.plan import RunPlan
from compress.served_records import Served
from compress.stages.quantize.input_squares import FILE as SUMS
from compress.system.extras import missing_extra
from compress.system.fingerprint import sha256
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.exports.gguf.write import Written

_IMATRIX = "imatrix.gguf"


@dataclass(frozen=True)
class GgufFile:
    """What was written, and what llama.cpp said of it.

    Args:
        name: in the output; of the first part, where there are several.
        parts: how many files hold the weights.
        bytes: of them.
        served: for the report.
        files: what goes into the output, by its name there.
        digests: SHA-256 of each, as it was written.
    """

    name: str
    parts: int
    bytes: int
    served: Served
    files: dict[str, Path]
    digests: dict[str, str]


class _ForStage(ForLlamaCpp):
    """What a quantize stage leaves: the weights in one file or several, and an importance matrix if it made one."""

    def write(self, folder: Path, path: Path, reporter: Reporter, name: str | None = None) -> "Written":
        """Write a checkpoint to a file of this name, or to parts of it."""
        from compress.exports.gguf.imatrix import export_imatrix

        if (folder / SUMS).is_file():
            export_imatrix(folder, folder / SUMS, path.with_name(_IMATRIX))
        return super().write(folder, path, reporter, name)


def planned_files(planned: RunPlan) -> dict[str, int]:
    """The bytes of each file with weights that a run will leave, by name; about so where a stage chooses its shape.

    Raises:
        RecipeError: no `gguf` package, a model whose computation or tokenizer llama.cpp can't have, or no
            room for headers.
    """
    recipe = planned.recipe
    where = f"stages.{len(recipe.stages) - 1}.format"
    if missing := missing_extra("gguf", "gguf"):
        raise RecipeError([f"{where}: {missing}"])
    from compress.exports.gguf.sizes import planned_sizes

    stage, result = _stage_of(recipe), foreseen_result(planned)
    with sketch_of(origin_of(planned), result.shapes.config) as sketch:
        try:
            return planned_sizes(sketch, result, stage.type, file_name(recipe), stage.split, recipe.name)
        except ModelError as error:
            said = str(error).replace(str(sketch), recipe.model)
            raise RecipeError([f"{where}: gguf can't hold this model: {said}"]) from None
        except OSError as error:  # a file for each part's header
            said = f"{error.strerror} in {gettempdir()}, where the headers of all files are laid out"
            raise RecipeError([f"{where}: {said}; make room there, set TMPDIR, or make split larger"]) from None


def make_gguf(
    recipe: Recipe, artefact: StageArtefact, base: Checkpoint, base_id: str, work: Path, fresh: bool, context: Context,
    held: ExitStack,
) -> GgufFile:  # fmt: skip
    """Write the result in the work folder, once, and ask llama.cpp about it.

    Args:
        recipe: whose result it is.
        artefact: of the last stage.
        base: to time beside it, where the recipe has `serve`.
        base_id: its fingerprint.
        work: the work folder.
        fresh: write anew what was written before.
        context: where our reader computes, and who is told what happens.
        held: holds on to the files.
    """
    reporter, name = context.reporter, file_name(recipe)
    exporter = _ForStage(ExportSpec(to="gguf", split=_stage_of(recipe).split))
    kept = KeptExport(exporter, Source(artefact.folder, artefact.key, recipe.name), name, work, fresh, reporter)
    kept.write(held)
    for remark in kept.written.remarks:
        reporter.warn(remark)
    beside = None
    if recipe.serve is not None:
        whole = ForLlamaCpp(ExportSpec(to="gguf"))
        beside = KeptExport(whole, Source(base.folder, base_id), "the base as .gguf", work, fresh, reporter)
    sums = kept.path.with_name(_IMATRIX)
    weights = {name: file for name, file in kept.files().items() if file != sums}
    files = weights | ({f"{stem_of(recipe.name)}.{_IMATRIX}": sums} if sums in kept.digests else {})
    first, size = next(iter(weights)), sum(file.stat().st_size for file in weights.values())
    served = _asked(recipe, artefact.folder, weights[first], beside, context, held)
    digests = {name: kept.digests[file] for name, file in files.items()}
    return GgufFile(first, len(weights), size, served, files, digests)


def _asked(
    recipe: Recipe, checkpoint: Path, file: Path, beside: KeptExport | None, context: Context, held: ExitStack
) -> Served:
    """What llama.cpp says of the file; that it could not be asked, whatever the reason, is said and recorded."""
    reporter = context.reporter
    try:
        if beside is not None:
            beside.write(held)
        reporter.say("opening the file in llama.cpp")
        base = None if beside is None else beside.path
        return served_in_llama_cpp(checkpoint, file, matrix_types(file), base, context.device, recipe.trust_remote_code)
    except Exception as error:  # of memory, of disks, of our own reader: the file must not be lost by it
        reporter.warn(
            f"llama.cpp could not be asked about the file: {reason(error)}; mend this and run the same command again, "
            "or run dscompress verify on the file"
        )
        return Served(engine=ENGINE, opened=False, passed=False, note=f"could not be asked: {reason(error)}")


def verify_gguf(file: Path) -> list[Check]:
    """What can be said of a GGUF file: it is as it was written, and llama.cpp reads in it what our reader does."""
    record, parts, checks = read_record(file.parent), parts_of(file), list[Check]()
    if record is not None and file.name in record.files:
        changed = [part.name for part in parts if record.files.get(part.name) != sha256(part)]
        said = f"changed since it was written: {', '.join(changed)}" if changed else "as it was written (SHA-256)"
        checks.append(Check("file", not changed, f"{sum(part.stat().st_size for part in parts):,} bytes, {said}"))
    with TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = resolve_model(str(file), None, Path(scratch), Reporter().say)
        return [*checks, *check_in_llama_cpp(folder, parts[0], matrix_types(file))[0]]


def matrix_types(file: Path) -> set[str]:
    """Types of a file's matrices, ggml's names."""
    from gguf import GGMLQuantizationType

    return {GGMLQuantizationType(each.type).name for each in open_gguf(file).tensors.values() if len(each.shape) > 1}


def _stage_of(recipe: Recipe) -> GgufStage:
    stage = recipe.stages[-1]
    assert isinstance(stage, GgufStage), "it was asked for"
    return stage


def file_name(recipe: Recipe) -> str:
    """NAME-Q4_K_M.gguf, which parts have numbers added to."""
    kind, stem = _stage_of(recipe).type, stem_of(recipe.name)
    return f"{stem if kind in stem.lower() else f'{stem}-{kind.upper()}'}.gguf"


def with_gguf(report: Report, made: GgufFile, planned: int) -> Report:
    """The report, with bytes of the .gguf files for the checkpoint's, planned ones too, and what llama.cpp said."""
    size = {"bytes": made.bytes, "bits_per_weight": 8 * made.bytes / report.compressed.parameters}
    *before, last = report.stages
    about = any(stage.forecast is None or stage.forecast.about for stage in before)
    if (forecast := last.forecast) is not None:
        forecast = forecast.model_copy(update={"output_bytes": planned, "about": about})
    stages = [*before, last.model_copy(update={"bytes": made.bytes, "forecast": forecast})]
    return report.model_copy(
        update={
            "compressed": report.compressed.model_copy(update=size | {"file": made.name, "files": made.parts}),
            "size_ratio": report.base.bytes / made.bytes,
            "stages": stages,
            "served": made.served,
        }
    )
