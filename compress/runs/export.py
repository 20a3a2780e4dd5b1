"""A finished checkpoint as the file of another program, which that program is asked about."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import OutputError, UserError
from compress.model.arch import check_code
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.recipe.export import TARGETS, ExportSpec, targets_with
from compress.runs.exporters import exporter_of
from compress.served_records import ServedPace
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.evaluation.verify import Check
    from compress.runs.exporters import AnyWritten


@dataclass(frozen=True)
class Exported:
    """What was made, and what the program said of it.

    Args:
        written: the files.
        checks: what was looked at; empty where nobody was asked.
        pace: tokens per second and memory, where it was asked.
    """

    written: "AnyWritten"
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
        to: "gguf", for llama.cpp and what is built on it; "onnx" or "openvino", a folder for ONNX
            Runtime GenAI or OpenVINO.
        type: of matrices. For gguf "auto" keeps codes that lie on a grid of ggml, and the checkpoint's own dtype for
            the others; or "f32", "bf16", "f16", "q8_0". For onnx "auto" keeps codes, and other matrices are float32;
            or "f32", all of them. For openvino the same, and "auto" keeps other matrices in the checkpoint's own dtype.
        output: the file or folder; None is one by the checkpoint's name in the current folder.
        split: gguf: bytes of tensors in a file; None writes one.
        int8_inputs: onnx, openvino: round the inputs of linears to 8 bits as it runs, which is faster and not exact.
        python: onnx, openvino: the interpreter of an environment with the program; None looks for one.
        check: open it in the program; llama.cpp, where that is installed.
        work_dir: where a GGUF file is unpacked.
        reporter: told what happens; None says it on standard error.

    Raises:
        UserError: what can't be written, or not there, and why.
    """
    spec = _spec(to, type, {"split": split, "int8_inputs": int8_inputs, "python": python})
    try:
        exporter = exporter_of(spec)
    except UserError as error:
        raise UserError(f"--to {to}: {error}") from None
    reporter = reporter or Reporter()
    folder = resolve_model(str(checkpoint), None, Path(work_dir).absolute(), reporter.say)
    check_code(Checkpoint(folder).config, str(checkpoint), False)
    path = Path(output) if output is not None else _named(str(checkpoint), spec)
    if spec.target.suffix and path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file, like {path / f'model{spec.target.suffix}'}")
    written = exporter.write(folder, path.absolute(), reporter)
    if not check:
        return Exported(written, [], None)
    reporter.say(f"asking {spec.target.program} about it")
    return Exported(written, *exporter.ask(folder, written))


def _spec(to: str, kind: str, options: dict[str, Any]) -> ExportSpec:
    """What is asked for, if it can be.

    Raises:
        UserError: in the words of the command.
    """
    _check_choice("--to", to, tuple(TARGETS))
    _check_choice("--type", kind, TARGETS[to].types)
    given = {option: value for option, value in options.items() if value not in (None, False)}
    for option in given:
        if option not in TARGETS[to].options:
            raise UserError(f"--{option.replace('_', '-')}: is for --to {targets_with(option)}; leave it out")
    if (split := given.get("split")) is not None and split < 1:
        raise UserError(f"--split {split}: is no size; write it like 4GB, 1.5GiB or 500MB")
    if "python" in given:
        given["python"] = str(given["python"])
    return ExportSpec.model_validate({"to": to, "type": kind, **given})


def _check_choice(option: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{option} {value}: is not known; use {', '.join(allowed)}")


def _named(reference: str, spec: ExportSpec) -> Path:
    """The file or folder that is written where none is named."""
    stem = Path(reference).resolve().name.removesuffix(".gguf")
    if spec.target.suffix:
        return Path(spec.file_name(stem))
    return Path(f"{stem}{'' if spec.type == 'auto' else f'-{spec.type.upper()}'}-{spec.to}")
