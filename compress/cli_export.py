"""The command that writes a checkpoint for other programs: export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import compress
from compress.cli_options import DebugOption, QuietOption, WorkOption, reporter_of
from compress.errors import UserError
from compress.system.units import parse_size, size

if TYPE_CHECKING:
    from compress.runs.export import Exported


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder, dense or quantized, or a hub id.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="gguf|onnx|openvino", help="llama.cpp, ONNX Runtime GenAI or OpenVINO.")
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="auto (4 and 8-bit codes as they are, else the checkpoint's dtype), f32, bf16, f16 or q8_0; for onnx "
            "and openvino auto (all codes as they are, else f32 or the checkpoint's dtype) or f32.",
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A folder for onnx and openvino. Default: the checkpoint's name, here.",
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="SIZE", help="Write parts of at most so much, like 4GB.")
    ] = None,
    int8_inputs: Annotated[
        bool,
        typer.Option(
            "--int8-inputs", help="onnx, openvino: round inputs of linears to 8 bits as it runs, which is faster."
        ),
    ] = False,
    python: Annotated[
        Path | None,
        typer.Option("--python", metavar="PATH", help="onnx, openvino: the Python of an environment that has it."),
    ] = None,
    check: Annotated[bool, typer.Option(help="Open the result in its program, where that is installed.")] = True,
    work_dir: WorkOption = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a checkpoint for llama.cpp, ONNX Runtime GenAI or OpenVINO, and have that program read it: same answers."""
    most = None if split is None else parse_size(split)
    if split is not None and most is None:
        raise UserError(f"--split {split}: is no size; write it like 4GB, 1.5GiB or 500MB")
    done = compress.export(
        checkpoint, to=to, type=kind, output=output, split=most, int8_inputs=int8_inputs, python=python, check=check,
        work_dir=work_dir or ".dscompress", reporter=reporter_of(quiet, False),
    )  # fmt: skip
    _show(done)
    if any(each.passed is False for each in done.checks):
        raise typer.Exit(1)


def _show(done: "Exported") -> None:
    """What was made, what its program said of it, and how fast it is."""
    written = done.written
    for name, words in written.facts():
        print(f"{name:<12}{words}")
    for line in written.remarks:
        print(f"note        {line}")
    for each in done.checks:
        word = {True: "ok  ", False: "FAIL", None: "-   "}[each.passed]
        print(f"{word} {each.name}: {each.detail}")
    if (pace := done.pace) is not None:
        print(
            f"speed       {pace.prefill_tokens_per_second:.0f} tokens/s prefill, {pace.decode_tokens_per_second:.1f} "
            f"decode, {size(pace.peak_bytes)} of memory"
            + (", while other work slowed it" if pace.waited > 0.05 else "")
        )
