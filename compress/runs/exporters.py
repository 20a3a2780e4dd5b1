"""The programs that checkpoints are written for: what writes each target of compress/recipe/export.py, and asks it.

`dscompress export` and the end of a recipe both write and ask by these. Nothing heavy is imported before it is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from compress.errors import ModelError, UserError
from compress.exports.marked import check_replaceable
from compress.exports.plan import Foreseen
from compress.exports.refused import ROUNDS_INPUTS
from compress.formats.facts import TORCHAO
from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint
from compress.recipe.export import ExportSpec
from compress.served_records import ServedPace
from compress.system.extras import missing_extra
from compress.system.programs import Engine, Program, find_program
from compress.system.progress import Reporter

if TYPE_CHECKING:
    import torch

    from compress.evaluation.verify import Check
    from compress.exports.gguf.write import Written as GgufWritten
    from compress.exports.onnx.build import Written as OnnxWritten
    from compress.exports.openvino.build import Written as OpenvinoWritten
    from compress.quant.grid import Grid

    AnyWritten: TypeAlias = GgufWritten | OnnxWritten | OpenvinoWritten


class Exporter(Protocol):
    """One export: what writes it is there.

    Attributes:
        spec: what is asked for.
        version: of the program that is asked about it; None where `unasked` says why it can't be.
        unasked: likewise.
        check_version: of what asks it.
    """

    spec: ExportSpec
    version: str | None
    unasked: str | None
    check_version: int

    def made_by(self, name: str | None = None) -> list[Any]:
        """What its bytes hang on beside checkpoint and options; `name` is what programs call the model."""

    def check(self, config_folder: Path, base: Path, result: Foreseen) -> None:
        """Refuse what could not be written at the end.

        Args:
            config_folder: with the config.json that the result will have, and its tokenizer.
            base: the dense checkpoint that the result is made of.
            result: what is planned.

        Raises:
            ModelError: by name.
        """

    def check_place(self, path: Path) -> None:
        """Refuse to write over what is not ours.

        Raises:
            OutputError: naming it.
        """

    def write(self, folder: Path, path: Path, reporter: Reporter, name: str | None = None) -> "AnyWritten":
        """Write a checkpoint to a file or a folder of this name; `name` is what programs call the model."""

    def ask(
        self, folder: Path, written: Any, trust_remote_code: bool = False, device: "torch.device | None" = None
    ) -> "tuple[list[Check], ServedPace | None]":
        """What the program says of it, beside the checkpoint."""

    def dump(self, written: Any) -> dict[str, Any]:
        """What was written, as JSON can hold it."""

    def load(self, kept: dict[str, Any], path: Path) -> "AnyWritten":
        """The same of what `dump` gave; `path` is what was written."""


class ForLlamaCpp:
    """A .gguf file, or several parts of one.

    Args:
        spec: what is asked for.

    Raises:
        UserError: the package that writes it is missing.
    """

    def __init__(self, spec: ExportSpec) -> None:
        from compress.evaluation.llama_cpp import CHECK_VERSION, PACKAGE, llama_cpp_missing

        if missing := missing_extra("gguf", "gguf"):
            raise UserError(missing)
        self.spec, self.unasked = spec, llama_cpp_missing()
        self.version = None if self.unasked else version(PACKAGE)
        self.check_version = CHECK_VERSION

    def made_by(self, name: str | None = None) -> list[Any]:
        """What its bytes hang on beside checkpoint and options; the model's name is in its header."""
        from compress.exports.gguf.write import CODE_VERSION

        return [CODE_VERSION, name]

    def check(self, config_folder: Path, base: Path, result: Foreseen) -> None:
        """Refuse what could not be written at the end."""
        from compress.exports.gguf.config import header_of
        from compress.exports.gguf.tensors import Tensors
        from compress.exports.gguf.tokenizer import tokenizer_keys

        header = header_of(config_folder, str(result.shapes.config.get("model_type")))
        tokenizer_keys(config_folder, header.config.vocab_size)
        if result.layout == TORCHAO:
            raise ModelError(f"{config_folder}: {ROUNDS_INPUTS}")
        dense = Checkpoint(base)
        Tensors(dense, header_of(base, str(dense.config.get("model_type"))), "F32", False)

    def check_place(self, path: Path) -> None:
        """Refuse to write over what is not ours."""
        from compress.exports.gguf.write import check_replaceable

        check_replaceable(path)

    def write(self, folder: Path, path: Path, reporter: Reporter, name: str | None = None) -> "GgufWritten":
        """Write a checkpoint to a file of this name, or to parts of it."""
        from compress.exports.gguf.write import export_gguf

        return export_gguf(folder, path, self.spec.type, self.spec.split, reporter, name)

    def ask(
        self, folder: Path, written: Any, trust_remote_code: bool = False, device: "torch.device | None" = None
    ) -> "tuple[list[Check], ServedPace | None]":
        """What llama.cpp says of it, beside the checkpoint."""
        from compress.evaluation.llama_cpp import Timing, check_in_llama_cpp

        matrices = written.matrices
        return check_in_llama_cpp(folder, written.files[0], matrices, trust_remote_code, Timing(), device)

    def dump(self, written: Any) -> dict[str, Any]:
        """What was written, as JSON can hold it."""
        kept = vars(written) | {"files": [file.name for file in written.files]}
        return dict(kept)

    def load(self, kept: dict[str, Any], path: Path) -> "GgufWritten":
        """The same of what `dump` gave; `path` is what was written."""
        from compress.exports.gguf.write import Written

        return Written(**kept | {"files": [path.with_name(name) for name in kept["files"]]})


@dataclass(frozen=True)
class _Kind:
    """What makes folders for a program, and asks it about them.

    Args:
        program: whose environment makes them.
        code_version: of what makes them.
        check_version: of what asks.
        check: refuses what could not be made of a planned result, by the folder with its config.json.
        write: a checkpoint to a folder, in an environment, with matrices of a type, inputs rounded or not.
        ask: about a checkpoint's folder: the environment, how many matrices have codes, and which of them differ.
        written: what was written.
        digests: of the codes in it, of what is kept of them.
    """

    program: Program
    code_version: int
    check_version: int
    check: Callable[[ExportSpec, Path, Foreseen], None]
    write: "Callable[[Path, Path, Engine, str, bool, Reporter], OnnxWritten | OpenvinoWritten]"
    ask: "Callable[..., tuple[list[Check], ServedPace | None]]"
    written: "Callable[..., OnnxWritten | OpenvinoWritten]"
    digests: Callable[[Any], Any]


class ForFolder:
    """A folder for a program, made in an environment that has it.

    Args:
        spec: what is asked for.
        kind: of what makes it.

    Raises:
        UserError: there is no such environment.
    """

    version: str | None
    unasked: str | None = None  # what makes it is asked about it

    def __init__(self, spec: ExportSpec, kind: _Kind) -> None:
        found = find_program(kind.program, spec.python)
        if isinstance(found, str):
            raise UserError(found)
        self.spec, self.kind, self.engine, self.version = spec, kind, found, found.version
        self.check_version = kind.check_version

    def made_by(self, name: str | None = None) -> list[Any]:
        """What its bytes hang on beside checkpoint and options; the model's name is in none of its files."""
        return [self.kind.code_version, self.engine.version, *self.engine.others]

    def check(self, config_folder: Path, base: Path, result: Foreseen) -> None:
        """Refuse what could not be written at the end."""
        self.kind.check(self.spec, config_folder, result)

    def check_place(self, path: Path) -> None:
        """Refuse to write over what is not ours."""
        check_replaceable(path)

    def write(self, folder: Path, path: Path, reporter: Reporter, name: str | None = None) -> "AnyWritten":
        """Write a checkpoint to a folder of this name."""
        return self.kind.write(folder, path, self.engine, self.spec.type, self.spec.int8_inputs, reporter)

    def ask(
        self, folder: Path, written: Any, trust_remote_code: bool = False, device: "torch.device | None" = None
    ) -> "tuple[list[Check], ServedPace | None]":
        """What its program says of it, beside the checkpoint."""
        from compress.evaluation.other_program import Timing

        codes, timing = written.codes, Timing.within(positions_of(Checkpoint(folder).config))
        return self.kind.ask(folder, written.folder, self.engine, len(codes), codes.other, timing=timing, device=device)

    def dump(self, written: Any) -> dict[str, Any]:
        """What was written, as JSON can hold it."""
        kept = {name: value for name, value in vars(written).items() if name != "folder"}
        return kept | {"codes": written.codes.dump()}

    def load(self, kept: dict[str, Any], path: Path) -> "AnyWritten":
        """The same of what `dump` gave; `path` is what was written."""
        return self.kind.written(folder=path, **kept | {"codes": self.kind.digests(kept["codes"])})


def _for_onnx_runtime(spec: ExportSpec) -> ForFolder:
    from compress.evaluation.onnx_runtime import CHECK_VERSION, PROGRAM, check_in_onnx_runtime
    from compress.exports.onnx.build import CODE_VERSION, Written, export_onnx
    from compress.exports.onnx.codes import Digests

    ask = partial(check_in_onnx_runtime, int8_inputs=spec.int8_inputs)
    kind = _Kind(PROGRAM, CODE_VERSION, CHECK_VERSION, _check_onnx, export_onnx, ask, Written, Digests.load)
    return ForFolder(spec, kind)


def _check_onnx(spec: ExportSpec, config_folder: Path, result: Foreseen) -> None:
    from compress.exports.onnx.carried import Asked, carried_grids
    from compress.exports.onnx.config import builder_config, target_of
    from compress.model.shapes import find_modules

    config = result.shapes.config
    builder_config(config, config_folder)
    if result.layout == TORCHAO:
        raise ModelError(f"{config_folder}: {ROUNDS_INPUTS}")
    grids, columns = _planned(result)
    linears, asked = find_modules(result.shapes).linears, Asked(spec.type, spec.int8_inputs)
    target = target_of(config, config_folder)
    carried_grids(config_folder, grids, columns.__getitem__, linears, target, asked)


def _for_openvino(spec: ExportSpec) -> ForFolder:
    from compress.evaluation.openvino_runtime import CHECK_VERSION, PROGRAM, check_in_openvino
    from compress.exports.openvino.build import CODE_VERSION, Written, export_openvino
    from compress.exports.openvino.codes import Digests

    ask, write = check_in_openvino, export_openvino
    kind = _Kind(PROGRAM, CODE_VERSION, CHECK_VERSION, _check_openvino, write, ask, Written, Digests.load)
    return ForFolder(spec, kind)


def _check_openvino(spec: ExportSpec, config_folder: Path, result: Foreseen) -> None:
    from compress.exports.openvino.codes import carried_grids
    from compress.exports.openvino.config import traced_config

    traced_config(result.shapes.config, config_folder)
    if result.layout == TORCHAO:
        raise ModelError(f"{config_folder}: {ROUNDS_INPUTS}")
    grids, columns = _planned(result)
    carried_grids(config_folder, grids, columns.__getitem__, spec.type, spec.int8_inputs)


def _planned(result: Foreseen) -> "tuple[dict[str, Grid], dict[str, int]]":
    """Grids and columns of the modules that will be quantized."""
    from compress.quant.grid import Grid

    grids = {
        each.name: Grid(each.bits, each.group_size, each.symmetric, float8=each.dtype == "fp", rows=each.rows)
        for each in result.matrices
    }
    return grids, {each.name: each.shape[1] for each in result.matrices}


def exporter_of(spec: ExportSpec) -> Exporter:
    """What writes an export.

    Raises:
        UserError: it is missing, and how to get it.
    """
    kinds: dict[str, Callable[[ExportSpec], Exporter]] = {
        "gguf": ForLlamaCpp, "onnx": _for_onnx_runtime, "openvino": _for_openvino
    }  # fmt: skip
    return kinds[spec.to](spec)
