"""A finished checkpoint as the file of another program, which that program is asked about."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import OutputError, UserError
from compress.model.arch import check_code
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.served_records import ServedPace
from compress.system.extras import missing_extra
from compress.system.programs import Engine, find_program
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.evaluation.verify import Check
    from compress.exports.gguf.write import Written as GgufWritten
    from compress.exports.onnx.build import Written as OnnxWritten

TYPES = {"gguf": ("auto", "f32", "bf16", "f16", "q8_0"), "onnx": ("auto", "f32")}


@dataclass(frozen=True)
class Exported:
    """What was made, and what the program said of it.

    Args:
        written: the files.
        checks: what was looked at; empty where nobody was asked.
        pace: tokens per second and memory, where it was asked.
    """

    written: "GgufWritten | OnnxWritten"
    checks: "list[Check]"
    pace: ServedPace | None


def export(
    checkpoint: str | Path,
    *,
    to: str = "gguf",
    type: str = "auto",
    output: str | Path | None = None,
    split: int | None = None,
    int8_inputs: bool = False,
    python: str | Path | None = None,
    check: bool = True,
    work_dir: str | Path = ".dscompress",
    reporter: Reporter | None = None,
) -> Exported:
    """Write a checkpoint as a file for another program, and ask that program what it reads in it.

    Args:
        checkpoint: a folder, dense or quantized, whoever wrote it; or a hub id or GGUF file.
        to: "gguf", for llama.cpp and what is built on it; "onnx", a folder for ONNX Runtime GenAI.
        type: of matrices. For gguf "auto" keeps codes that lie on a grid of ggml, and the checkpoint's own dtype for
            the others; or "f32", "bf16", "f16", "q8_0". For onnx "auto" keeps codes, and other matrices are float32;
            or "f32", all of them.
        output: the file or folder; None is one by the checkpoint's name in the current folder.
        split: gguf: bytes of tensors in a file; None writes one.
        int8_inputs: onnx: round the inputs of linears to 8 bits as it runs, which is faster and not exact.
        python: onnx: the interpreter of an environment with ONNX Runtime GenAI; None looks for one.
        check: open it in the program; llama.cpp, where that is installed.
        work_dir: where a GGUF file is unpacked.
        reporter: told what happens; None says it on standard error.

    Raises:
        UserError: what can't be written, or not there, and why.
    """
    _check_choice("--to", to, tuple(TYPES))
    _check_choice("--type", type, TYPES[to])
    for option, other, given in (
        ("--split", "gguf", split is not None),
        ("--int8-inputs", "onnx", int8_inputs),
        ("--python", "onnx", python is not None),
    ):
        if given and to != other:
            raise UserError(f"{option}: is for --to {other}; leave it out")
    engine = _onnx_engine(python) if to == "onnx" else None
    if engine is None and (missing := missing_extra("gguf", "gguf")):
        raise UserError(f"--to gguf: {missing}")
    reporter = reporter or Reporter()
    folder = resolve_model(str(checkpoint), None, Path(work_dir).absolute(), reporter.say)
    check_code(Checkpoint(folder).config, str(checkpoint), False)
    path = Path(output) if output is not None else _named(str(checkpoint), to, type)
    if engine is None:
        return _to_gguf(folder, path, type, split, check, reporter)
    return _to_onnx(folder, path.absolute(), engine, type, int8_inputs, check, reporter)


def _to_gguf(folder: Path, file: Path, kind: str, split: int | None, check: bool, reporter: Reporter) -> Exported:
    if file.is_dir():
        raise OutputError(f"{file}: is a folder; name a file, like {file / 'model.gguf'}")
    from compress.evaluation.llama_cpp import Timing, check_in_llama_cpp
    from compress.exports.gguf.write import export_gguf

    written = export_gguf(folder, file.absolute(), kind, split, reporter)
    if not check:
        return Exported(written, [], None)
    reporter.say("asking llama.cpp about it")
    return Exported(written, *check_in_llama_cpp(folder, written.files[0], written.matrices, timing=Timing()))


def _to_onnx(
    folder: Path, output: Path, engine: Engine, kind: str, int8_inputs: bool, check: bool, reporter: Reporter
) -> Exported:
    from compress.evaluation.onnx_runtime import Timing, check_in_onnx_runtime
    from compress.exports.onnx.build import export_onnx

    written = export_onnx(folder, output, engine, kind, int8_inputs, reporter)
    if not check:
        return Exported(written, [], None)
    reporter.say("asking ONNX Runtime GenAI about it")
    checks, pace = check_in_onnx_runtime(
        folder, output, engine, len(written.codes), written.codes.other, int8_inputs, timing=Timing()
    )
    return Exported(written, checks, pace)


def _onnx_engine(python: str | Path | None) -> Engine:
    from compress.evaluation.onnx_runtime import PROGRAM

    found = find_program(PROGRAM, None if python is None else str(python))
    if isinstance(found, str):
        raise UserError(f"--to onnx: {found}")
    return found


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: is not known; use {', '.join(allowed)}")


def _named(reference: str, to: str, kind: str) -> Path:
    """The file or folder that is written where none is named."""
    name = Path(reference).resolve().name.removesuffix(".gguf")
    kind = "" if kind == "auto" else f"-{kind.upper()}"
    return Path(f"{name}{kind}.gguf" if to == "gguf" else f"{name}{kind}-onnx")
