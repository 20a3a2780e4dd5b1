"""The command that says what fits: plan."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

import compress
from compress.cli_options import DebugOption, reporter_of
from compress.errors import OutputError

_WIDE = 150  # columns where the output is no terminal: tables stay whole in files


def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, config.json, .gguf file, package:NAME/FILE or hub id.")
    ],
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help='A card or machine, such as "RTX 4090".')
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory that a model may fill instead, like 24GB.")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="TOKENS", help="Prompt and answer; default: 8192, or all positions."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences at a time.")] = 1,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="FILE", help="Write a recipe for what is recommended.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: DebugOption = False,
) -> None:
    """Say which precision of a model fits, what it costs and which recipe makes it; no weights are read or fetched."""
    if write is not None and write.exists():
        raise OutputError(f"{write}: exists; name another file")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # what goes wrong there is said in one line here
    reporter_of(False, False)
    found = compress.plan(model, gpu=gpu, memory=memory, context=context, batch=batch)
    if write is not None:
        from compress.footprint.recipe_file import write_recipe

        write_recipe(found, write)
    if as_json:
        print(found.model_dump_json(indent=2))
        return
    from compress.footprint import table

    print("\n".join(table.model_lines(found)) + "\n")
    _print(table.HEADS, table.table_rows(found))
    print("\n" + "\n".join(table.notes(found)) + "\n")
    if found.card is None:
        _print(*table.card_rows(found))
        print(f"\n{table.CARD_NOTE}\n")
    if found.training:
        _print(*table.training_rows(found))
    print(f"{found.training_note}\n")
    print("\n".join(table.advice_lines(found)))
    if write is not None:
        print(f"recipe     {write}")


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column names the rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for number, head in enumerate(heads):
        words = number == 0 or head == "opened by"
        table.add_column(head, justify="left" if words else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, width=None if sys.stdout.isatty() else _WIDE).print(table)
