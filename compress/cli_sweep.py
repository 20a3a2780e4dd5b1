"""Commands that make and show many results: sweep, sweep promote, compare."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import compress
from compress.cli_options import (
    DebugOption,
    DeviceOption,
    ModelOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    WorkOption,
    print_table,
    reporter_of,
)
from compress.errors import UserError

if TYPE_CHECKING:
    from compress.sweep_records import Sweep

_KEEP = ("all", "best", "none")


class _SweepGroup(TyperGroup):
    """`dscompress sweep RECIPE` beside `dscompress sweep promote SWEEP POINT`: what is no command is a recipe."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


sweep_app = typer.Typer(
    cls=_SweepGroup,
    no_args_is_help=True,
    help="Make all points of a sweep: dscompress sweep RECIPE --over PATH=VALUE,VALUE (options: sweep run --help).",
)


@sweep_app.command("run")
def run(
    recipe: RecipeArgument,
    over: Annotated[
        list[str] | None,
        typer.Option("--over", metavar="PATH=V,V", help="Values of a setting; several options make a grid."),
    ] = None,
    model: ModelOption = None,
    output: Annotated[Path | None, typer.Option("--output", help="Folder of the sweep.")] = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    work_dir: WorkOption = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, metavar="N", help="Points made at a time, each by a process (and GPU) of its own."
        ),
    ] = 1,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="auto|ADDRESS", help="Make them on a Ray cluster instead."),
    ] = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="all|best|none", help="Whose weights stay; best: those on the frontier.")
    ] = "all",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what points share and add, and stop.")] = False,
    quiet: QuietOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries say, too.")] = False,
    debug: DebugOption = False,
) -> None:
    """Make every point of a sweep, and a table and pictures of what they cost.

    The same command continues a sweep that was stopped, and makes no finished point again.
    """
    if keep not in _KEEP:
        raise UserError(f"--keep {keep}: is not known; use {', '.join(_KEEP[:-1])} or {_KEEP[-1]}")
    reporter = reporter_of(quiet, verbose)
    common: dict[str, Any] = {
        "over": over or (), "overrides": overrides or (), "model": model, "output": output, "work_dir": work_dir,
        "reporter": reporter,
    }  # fmt: skip
    if dry_run:
        from compress.sweeps.prepare import plan_sweep

        print("\n".join(plan_sweep(recipe, **common)))
        return
    sweep = compress.sweep(recipe, device=device, jobs=jobs, ray=ray, keep=keep, **common)  # type: ignore[arg-type]
    folder = output or Path(sweep.recipe["output"])
    _show(sweep, folder, "sweep")
    if any(point.status == "failed" for point in sweep.points):
        raise typer.Exit(1)


@sweep_app.command("promote")
def promote(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="Folder of a sweep.")],
    point: Annotated[str, typer.Argument(metavar="POINT", help="Name of one of its points.")],
    output: Annotated[Path, typer.Option("--output", help="Write the checkpoint here.")],
    debug: DebugOption = False,
) -> None:
    """Make a point of a sweep the finished checkpoint."""
    from compress.sweeps.results import promote as promoted

    report = promoted(sweep, point, output)
    print(f"checkpoint  {report.compressed.path}\nreport      {Path(report.compressed.path) / 'report.html'}")


def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULT...", help="Outputs of runs, folders of sweeps, or checkpoints.")
    ],
    output: Annotated[Path, typer.Option("--output", help="Folder for table and picture.")] = Path("comparison"),
    base: Annotated[
        str | None, typer.Option("--base", metavar="MODEL", help="Measure all anew against this original.")
    ] = None,
    text: Annotated[str, typer.Option("--text", help="With --base: a text file, or a bundled text.")] = "wikitext2",
    sequence_length: Annotated[
        int | None, typer.Option("--sequence-length", min=2, help="With --base: tokens per window.")
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="With --base: number of windows.")] = 64,
    device: DeviceOption = "auto",
    work_dir: WorkOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Put finished runs, sweeps or any checkpoints into one table and one picture."""
    sweep = compress.compare(
        results, output, base=base, text=text, sequence_length=sequence_length, windows=windows, device=device,
        work_dir=work_dir, trust_remote_code=trust_remote_code, reporter=reporter_of(quiet, False),
    )  # fmt: skip
    _show(sweep, output, "compare")


def _show(sweep: "Sweep", folder: Path, stem: str) -> None:
    from compress.report.sweep_table import brief_table

    print_table(*brief_table(sweep), named=2)
    if sweep.search is not None:
        best = sweep.search.best or "none"
        print(f"best        {best}: {sweep.search.goal}; {sweep.search.note}")
    print(f"page        {folder / f'{stem}.html'}\npicture     {folder / f'{stem}.png'}")
