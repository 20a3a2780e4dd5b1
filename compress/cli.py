"""The command line: parse, call, print. Only the command that needs torch imports it."""

import json
import os
import sys
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import compress
from compress.cli_export import export
from compress.cli_options import (
    DebugOption,
    DeviceOption,
    ModelOption,
    OutputOption,
    QuietOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    WorkOption,
    print_table,
    reporter_of,
)
from compress.cli_plan import plan
from compress.cli_sweep import compare, sweep_app
from compress.errors import DscompressError, RecipeError, UserError
from compress.system import distributed, interrupts, launcher
from compress.system.units import parse_size

if TYPE_CHECKING:
    from compress.recipe.schema import Recipe
    from compress.records import Report
    from compress.runs.plan import RunPlan
    from compress.system.progress import Reporter

_MOST_PROBLEMS, _LONGEST_LINE = 50, 1000


class _Group(TyperGroup):
    """Turns errors into one line and an exit code: 0 done, 1 failed, 2 the user's mistake, 130 interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with interrupts.watched():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            print("\ninterrupted; run the same command again to continue where it stopped", file=sys.stderr)
            raise typer.Exit(130) from None
        except DscompressError as error:
            raise typer.Exit(distributed.failed(error, _say)) from None


def _say(error: DscompressError) -> None:
    if "--debug" in sys.argv:
        traceback.print_exc()
    problems = error.problems if isinstance(error, RecipeError) else [str(error)]
    more = len(problems) - _MOST_PROBLEMS
    for problem in problems[:_MOST_PROBLEMS] + ([f"{more:,} more problems; mend these first"] if more > 0 else []):
        print(f"error: {_printable(problem)}", file=sys.stderr, flush=True)


def _printable(text: str) -> str:
    """One line, in which what a file slipped in can't steer the terminal."""
    line = " ".join(text.splitlines())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} ... {line[-_LONGEST_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


app = typer.Typer(
    cls=_Group,
    name="dscompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make large language models small enough to ship, and prove what that cost.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="Recipes that come with dscompress.")
cache_app = typer.Typer(no_args_is_help=True, help="Intermediate artefacts in a work folder.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(cache_app, name="cache")
app.add_typer(sweep_app, name="sweep")
app.command()(compare)
app.command()(plan)
app.command()(export)


def _version(asked: bool) -> None:
    if asked:
        print(f"dscompress {compress.__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    overrides: SetOption = None,
    device: DeviceOption = "auto",
    work_dir: WorkOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan with sizes and memory, and stop.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not continue or reuse earlier work.")] = False,
    max_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Keep to this much memory of the device, like 8GB.")
    ] = None,
    nproc: Annotated[
        int, typer.Option("--nproc", min=1, metavar="N", help="Processes to share the work, each with its own GPU.")
    ] = 1,
    nnodes: Annotated[
        int, typer.Option("--nnodes", min=1, metavar="M", help="Hosts to share it, each with --nproc processes.")
    ] = 1,
    rdzv: Annotated[
        str | None, typer.Option("--rdzv", metavar="HOST:PORT", help="Where they meet: a free port of one of them.")
    ] = None,
    quiet: QuietOption = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the libraries say, too.")] = False,
    debug: DebugOption = False,
) -> None:
    """Run a recipe: compress a model, verify the checkpoint, measure what it cost.

    The same command continues a run that was stopped, and repeats nothing that is finished. Hosts that share a disk
    share the work when it is started on each of them with the same --nnodes and --rdzv.
    """
    if max_memory is not None:  # a small memory has no room for gaps
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    launches = not dry_run and (nproc > 1 or nnodes > 1 or bool(rdzv))
    if not launches and not dry_run:
        device = distributed.join(device)
    loaded = _load(recipe, overrides, model, output)
    work = work_dir.absolute() if work_dir else None
    reporter = reporter_of(quiet, verbose)
    if launches:
        raise typer.Exit(launcher.launch(nproc, device, sys.argv[1:], reporter.say, nnodes, rdzv))
    if dry_run:
        _print_plan(loaded, work, reporter, device, _bytes(max_memory))
        return
    from compress.evaluation.stock import loader_ahead

    limit = _bytes(max_memory)
    with ExitStack() as kept:
        with suppress(Exception):  # which the run says
            kept.enter_context(loader_ahead(device, limit))  # before all that it imports, which takes as long
        report = compress.run(loaded, device=device, work_dir=work, fresh=fresh, max_memory=limit, reporter=reporter)
    if report is None:
        return
    _print_report(report)
    failed = any(export.passed is False for export in report.exports)
    if failed or (report.verified is not None and not report.verified.passed):
        raise typer.Exit(1)


@app.command()
def validate(
    recipe: RecipeArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    overrides: SetOption = None,
    debug: DebugOption = False,
) -> None:
    """Check a recipe, and that it fits the model where that is a folder here; nothing is computed or written."""
    from compress.runs.plan import other_models, plan_run

    loaded = _load(recipe, overrides, model, output)
    folder = Path(loaded.model)
    models = {name: Path(name) for name in other_models(loaded) if Path(name).is_dir()}
    planned = plan_run(loaded, folder if folder.is_dir() else None, models)
    reporter = reporter_of(False, False)
    for line in planned.warnings:
        reporter.warn(line)
    print(f"{recipe}: valid")


@app.command()
def schema() -> None:
    """Print the recipe's JSON schema, for editors that complete and check YAML."""
    from compress.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2))


@app.command()
def eval(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The original: a folder, hub id or GGUF file.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="A checkpoint folder, dense or quantized.")],
    text: Annotated[str, typer.Option("--text", help="A text or jsonl file, or a bundled text.")] = "wikitext2",
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", min=2, help="Tokens per window; default: 2048, or the positions of BASE."),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Number of windows.")] = 64,
    tasks: Annotated[
        str | None, typer.Option("--tasks", metavar="A,B", help="Benchmark tasks of lm-eval that both do, too.")
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option("--task-files", metavar="DIR", help="Task files of yours, before lm-eval's own.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Items of each task; default: all.")] = None,
    fewshot: Annotated[
        int | None, typer.Option("--fewshot", min=0, help="Examples before each item; default: each task's own number.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Word tasks by the model's chat template.")] = False,
    device: DeviceOption = "auto",
    work_dir: WorkOption = None,
    trust_remote_code: TrustOption = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare two checkpoints: perplexity, KL divergence, top-1 agreement, tasks. Prints JSON."""
    reporter = reporter_of(quiet, False)
    work = work_dir or Path.cwd() / ".dscompress"
    quality = compress.evaluate(
        base, candidate, text=text, sequence_length=sequence_length, windows=windows, device=device, work_dir=work,
        tasks=[name.strip() for name in tasks.split(",")] if tasks else None, task_files=task_files, limit=limit,
        fewshot=fewshot, chat=chat, trust_remote_code=trust_remote_code, reporter=reporter,
    )  # fmt: skip
    print(quality.model_dump_json(indent=2))


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")],
    serve: Annotated[
        str | None, typer.Option(metavar="auto|PYTHON", help="Open it in the vLLM of that environment, too.")
    ] = None,
    device: DeviceOption = "auto",
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Open a checkpoint with the stock loader and with ours, and compare: PASS, or what differs."""
    reporter_of(False, False)
    checks = compress.verify(checkpoint, device=device, trust_remote_code=trust_remote_code, serve=serve)
    for check in checks:
        word = {True: "ok  ", False: "FAIL", None: "-   "}[check.passed]
        print(f"{word} {check.name}: {check.detail}")
    failed = any(check.passed is False for check in checks)
    print("FAIL" if failed else "PASS")
    if failed:
        raise typer.Exit(1)


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.")],
    debug: DebugOption = False,
) -> None:
    """Show what a checkpoint holds: sizes, how each kind of matrix is stored, how it was made."""
    print("\n".join(compress.inspect(checkpoint)))


@recipes_app.command("list")
def recipes_list() -> None:
    """List the bundled recipes."""
    from compress.recipe.load import list_recipes

    rows = list_recipes()
    width = max(len(name) for name, _ in rows)
    for name, summary in rows:
        print(f"{name:<{width}}  {summary}")


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")]) -> None:
    """Print a bundled recipe."""
    from compress.recipe.load import recipe_text

    print(recipe_text(name), end="")


@recipes_app.command("copy")
def recipes_copy(
    name: Annotated[str, typer.Argument(help="Name of a bundled recipe.")],
    target: Annotated[Path | None, typer.Argument(help="File to write; default: NAME.yaml here.")] = None,
) -> None:
    """Copy a bundled recipe to a file of yours."""
    from compress.errors import OutputError
    from compress.recipe.load import recipe_text

    file = target or Path(f"{name.removesuffix('.yaml')}.yaml")
    if file.exists():
        raise OutputError(f"{file}: exists; name another file")
    text = recipe_text(name)
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror}); name another file") from error
    print(file)


CacheArgument = Annotated[Path, typer.Argument(metavar="WORK_DIR", help="The work folder.")]


@cache_app.command("ls")
def cache_ls(work_dir: CacheArgument = Path(".dscompress")) -> None:
    """List what a work folder holds, with sizes."""
    from compress.runs.cache import cache_entries

    for entry in cache_entries(work_dir):
        print(f"{entry.bytes / 1e6:10,.1f} MB  {entry.kind:<12} {entry.path.name}")


@cache_app.command("clean")
def cache_clean(work_dir: CacheArgument = Path(".dscompress")) -> None:
    """Delete what a work folder holds; finished outputs stay."""
    from compress.runs.cache import clean_cache

    print(f"freed {clean_cache(work_dir) / 1e6:,.1f} MB")


def _print_report(report: "Report") -> None:
    from compress.report.write import export_lines, served_line, speed_words, summary_table, tasks_line

    print_table(("", "base", "compressed", "change"), summary_table(report))
    said = [("tasks", tasks_line(report)), ("speed", speed_words(report)), ("served", served_line(report))]
    for label, words in [*said, *(("exported", line) for line in export_lines(report))]:
        if words:
            print(f"{label:<12}{words}")
    print(f"checkpoint  {report.compressed.path}\nreport      {Path(report.compressed.path) / 'report.html'}")


def _print_plan(
    recipe: "Recipe", work_dir: Path | None, reporter: "Reporter", device: str, max_memory: int | None
) -> None:
    """What a run would do; nothing is computed or written but a GGUF file's copy in the work folder."""
    from compress.model.source import resolve_model
    from compress.runs.artefact import check_output, check_work, work_folder
    from compress.runs.foreseen import place_of
    from compress.runs.plan import other_models, plan_run

    output = Path(recipe.output)
    check_output(output)
    work = work_folder(output, work_dir)
    check_work(work, output, recipe.model)
    models = {name: resolve_model(name, None, work, reporter.say) for name in other_models(recipe)}
    base = resolve_model(recipe.model, recipe.revision, work, reporter.say)
    planned = plan_run(recipe, base, models, place_of(device, max_memory))
    for line in planned.warnings:
        reporter.warn(line)
    if any(plan.builds for plan in planned.stages):
        from compress.runs.builds import check_planned  # here, because it imports torch

        check_planned(planned)
    if recipe.export:
        from compress.runs.exported import check_exports, note_unasked  # likewise

        note_unasked(check_exports(planned), reporter)
    print("\n".join(planned.lines(work, _gguf_files(planned))))


def _gguf_files(planned: "RunPlan") -> dict[str, int]:
    """The bytes of each .gguf file that the recipe itself leaves, by name."""
    if not planned.recipe.writes_gguf:
        return {}
    from compress.runs.gguf_file import planned_files  # here, because it imports torch

    return planned_files(planned)


def _load(reference: str, overrides: list[str] | None, model: str | None, output: Path | None) -> "Recipe":
    from compress.recipe.load import load_recipe

    return load_recipe(reference, overrides=overrides or (), model=model, output=str(output) if output else None)


def _bytes(size: str | None) -> int | None:
    """A size such as 8GB, 7.5GiB or 500MB in bytes."""
    if size is None:
        return None
    found = parse_size(size)
    if found is None:
        raise UserError(f"--max-memory {size}: is no size; write it like 8GB, 7.5GiB or 500MB")
    return found


if __name__ == "__main__":
    main()
