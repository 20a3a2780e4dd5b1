"""The shape of the code, read from its syntax: who imports whom, what stays free of torch, how long things grow."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "compress").rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

FOLDERS = {"compress", "recipes", "calibration", "tests", "examples"}
WRITTEN_BY_RUNS_AND_BUILDS = {"outputs", "build", "dist", "__pycache__"}
LIGHT = (
    "compress.recipe",
    "compress.errors",
    "compress.records",
    "compress.record_types",
    "compress.export_records",
    "compress.forecast_records",
    "compress.served_records",
    "compress.task_records",
    "compress.sweep_records",
    "compress.sweeps.points",
    "compress.sweeps.prepare",
    "compress.report",
    "compress.stages.contract",
)
HEAVY = ("torch", "transformers")
# From the command down: a package imports what stands below it, and nothing beside it.
LEVELS = (
    ("compress.cli", "compress.__init__"),
    ("compress.cli_sweep", "compress.cli_plan", "compress.cli_export"),
    ("compress.cli_options",),
    ("compress.sweeps",),
    ("compress.runs", "compress.footprint"),
    ("compress.stages", "compress.evaluation", "compress.exports", "compress.report"),
    ("compress.loop", "compress.data", "compress.formats", "compress.quant", "compress.prune", "compress.train"),
    ("compress.recipe", "compress.model", "compress.kernels"),
    ("compress.system",),
    ("compress.errors", "compress.records", "compress.sweep_records"),
    ("compress.export_records",),
    ("compress.forecast_records", "compress.served_records", "compress.task_records"),
    ("compress.record_types",),
)
EXCEPTIONS = {
    "compress.formats": ("compress.quant.grid", "compress.quant.blocks"),  # the one definition of rounding
    "compress.kernels": ("compress.quant.grid", "compress.model.gguf.block_types"),  # what grids there are
    "compress.loop": ("compress.data.calibration.TokenSet",),  # the type
    "compress.prune": ("compress.quant.gptq", "compress.quant.statistics"),  # SparseGPT is GPTQ's loop
    "compress.recipe": ("compress.stages.KINDS",),  # a table that imports nothing
}


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether the module is one of the packages, or inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names(node: ast.AST) -> Iterator[str]:
    """Modules that one import statement reaches; `from a import b` may mean the module a.b, so both are given."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "compress is imported by its full name"
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(module: str) -> set[str]:
    """All that a module imports, anywhere in it."""
    return {name for node in ast.walk(tree(MODULES[module])) for name in names(node)}


def imports_at_start(module: str) -> set[str]:
    """What is imported because this module is: its statements outside functions, and its parent packages."""
    found = {module.rpartition(".")[0]} - {""}
    waiting: list[ast.AST] = [tree(MODULES[module])]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        found.update(names(node))
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting.extend(ast.iter_child_nodes(node))
    return found


def test_modules_are_found() -> None:
    assert {"compress", "compress.errors", "compress.recipe", "compress.quant.grid"} <= set(MODULES)


def is_light(module: str) -> bool:
    return within(module, LIGHT) or module.endswith(".plan")


@pytest.mark.parametrize("module", [module for module in MODULES if is_light(module)])
def test_light_modules_never_import_torch(module: str) -> None:
    reached, waiting = set(), {module}
    while waiting:
        name = waiting.pop()
        assert not within(name, HEAVY), f"{module} reaches {name} as soon as it is imported"
        reached.add(name)
        if name in MODULES:
            waiting |= imports_at_start(name) - reached


def level_and_package(module: str) -> tuple[int, str]:
    """How far down a module of ours stands, and the package of that level that it belongs to."""
    return next((n, each) for n, level in enumerate(LEVELS) for each in level if within(module, (each,)))


@pytest.mark.parametrize("module", [module for module in MODULES if module != "compress"])
def test_imports_go_down(module: str) -> None:
    level, package = level_and_package(module)
    allowed = EXCEPTIONS.get(package, ())
    for name in imports(module):
        if name == "compress" or not within(name, ("compress",)) or name == "compress.__version__":
            continue
        if name in (each for exception in allowed for each in (exception, exception.rpartition(".")[0])):
            continue
        if name.startswith(tuple(f"{exception}." for exception in allowed)):
            continue
        below, other = level_and_package(name)
        assert other == package or below > level, f"{module} imports {name}"


def test_exceptions_are_needed() -> None:
    for package, allowed in EXCEPTIONS.items():
        inside = {name for module in MODULES if within(module, (package,)) for name in imports(module)}
        assert set(allowed) <= inside


def test_kernels_know_nothing_but_the_grid() -> None:
    allowed = ("compress.errors", "compress.quant.grid", "compress.model.gguf.block_types", "compress.kernels")
    for module in MODULES:
        if within(module, ("compress.kernels",)):
            ours = {name for name in imports(module) if within(name, ("compress",)) and name != "compress.quant"}
            assert not {name for name in ours if not within(name, allowed)}, module


def test_triton_is_imported_where_it_runs() -> None:
    """It exists for Linux alone, and only a GPU needs it."""
    names = ("columns", "divergence", "scales", "solver", "block_scales", "block_solver", "block_refine")
    kernels = tuple(f"compress.kernels.{name}" for name in names)
    for module in MODULES:
        if not within(module, kernels):
            assert not {name for name in imports_at_start(module) if within(name, ("triton", *kernels))}, module


def test_top_level_folders() -> None:
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert folders - WRITTEN_BY_RUNS_AND_BUILDS <= FOLDERS


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400
    for node in ast.walk(tree(MODULES[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
