"""What the commands share: options by the same words everywhere, who is told what happens, tables."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.system import distributed

if TYPE_CHECKING:
    from compress.system.progress import Reporter

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Path of a recipe, or the name of a bundled one.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value: --set stages.0.bits=3.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Use this model instead of the recipe's.")]
OutputOption = Annotated[Path | None, typer.Option("--output", help="Write the checkpoint here.")]
WorkOption = Annotated[
    Path | None, typer.Option("--work-dir", help="Intermediate artefacts; default: .dscompress beside the output.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Only warnings, errors and results.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]


def reporter_of(quiet: bool, verbose: bool) -> "Reporter":
    """Who is told what happens."""
    from compress.system.progress import Reporter

    if not verbose:
        _hush()
    return Reporter(quiet, silent=distributed.rank() > 0)


def _hush() -> None:
    """Keep the libraries' own bars and notices off the screen; `-v` shows them."""
    import logging

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("datasets").setLevel(logging.ERROR)
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    for name in ("torchao", "torch.utils._pytree"):  # kernels for GPUs that are not there; how torchao registers
        logging.getLogger(name).setLevel(logging.ERROR)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[Any]], named: int = 1) -> None:
    """A table on standard output; columns behind the first ones, which name a row, are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="right" if number >= named else "left", no_wrap=number < named)
    for row in rows:
        table.add_row(*[str(cell) for cell in row])
    Console(highlight=False, width=None if sys.stdout.isatty() else 110).print(table)
