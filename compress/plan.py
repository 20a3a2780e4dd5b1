"""What a recipe will do to a model: which matrices it quantizes and how, what can't work, how much memory it takes.

All from config.json and safetensors headers. Never imports torch, so that `validate` answers at once; but for models
with code of their own, since only transformers can say whether it knows them without it.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

from compress.errors import ModelError, RecipeError
from compress.model.arch import FAMILIES, check_code, check_supported, depth_of, positions_of, width_of
from compress.model.checkpoint import Checkpoint, TensorInfo
from compress.recipe import CalibrationSpec, GroupSize, QuantizeStage, Recipe
from compress.recipe_eight_bit import EightBitStage
from compress.recipe_messages import did_you_mean
from compress.recipe_yaml import load_calibration_spec

_LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)\.weight")
_HEADER_BYTES = 120  # that a tensor takes in a file's header, about
_FLOATS = ("BF16", "F16", "F32")
_HEADS = ("lm_head", "embed_out")  # names by which an output head may be called, whatever the checkpoint calls it
_BLOCK = 128  # rows and columns of the blocks of `granularity: block`


def open_model(folder: Path, recipe: Recipe) -> Checkpoint:
    """A recipe's model, checked against everything that the recipe asks of it.

    Raises:
        ModelError: a damaged or unsupported model, or sequences longer than its positions.
        RecipeError: modules or group sizes that do not fit the model.
    """
    checkpoint = Checkpoint(folder)
    check_supported(checkpoint.config, recipe.model)
    check_code(checkpoint.config, recipe.model, recipe.trust_remote_code)
    _check_depth(checkpoint)
    for number, stage in enumerate(recipe.stages):
        plan_matrices(stage, checkpoint, f"stages.{number}")
    if any(stage.calibrates for stage in recipe.stages):
        check_length(checkpoint, calibration_of(recipe).sequence_length, "calibration.sequence_length")
    if recipe.evaluate is not None:
        check_length(checkpoint, recipe.evaluate.sequence_length, "evaluate.sequence_length")
    return checkpoint


def _check_depth(checkpoint: Checkpoint) -> None:
    prefix = find_modules(checkpoint).layers + "."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in checkpoint.names(prefix)}
    depth = depth_of(checkpoint.config)
    if depth != len(layers):
        raise ModelError(
            f"{checkpoint.folder}: config.json says {depth} layers, the weights have {len(layers)}; "
            "get both from the same place"
        )


def calibration_of(recipe: Recipe) -> CalibrationSpec:
    """A recipe's calibration spec, read from its file where the recipe names one."""
    spec = recipe.calibration
    return spec if isinstance(spec, CalibrationSpec) else load_calibration_spec(spec, base=Path.cwd())


def check_length(checkpoint: Checkpoint, sequence_length: int, where: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        ModelError: naming the field.
    """
    limit = positions_of(checkpoint.config)
    if limit is not None and sequence_length > limit:
        raise ModelError(f"{where}: {sequence_length} is more than the model's {limit} positions; use at most {limit}")


def check_vocabulary(checkpoint: Checkpoint, highest: int) -> None:
    """Refuse text with tokens that the model has no embedding for.

    Args:
        checkpoint: the model.
        highest: the largest token id of the text.

    Raises:
        ModelError: the tokenizer is another model's.
    """
    info = checkpoint.tensors.get(f"{find_modules(checkpoint).embeddings}.weight")
    if info is not None and highest >= info.shape[0]:
        raise ModelError(
            f"{checkpoint.folder}: its tokenizer gives token {highest}, its embeddings end at {info.shape[0] - 1}; "
            "tokenizer and weights are of different models"
        )


@dataclass(frozen=True)
class Matrix:
    """One matrix to quantize.

    Args:
        name: module name, without ".weight".
        shape: (O, I).
        bits: width of a code.
        group_size: columns that share a scale, -1 for the row.
        symmetric: zero point fixed in the middle.
        rows: rows that share a scale beside the columns of a group; -1 means all of them.
        dtype: of the codes: int, or fp8.
        inputs: how its inputs are rounded: dynamic, static, auto (one of them, chosen by error); None: not at all.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    rows: int = 1
    dtype: str = "int"
    inputs: str | None = None

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return 1 if self.group_size == -1 else self.shape[1] // self.group_size

    @property
    def kind(self) -> str:
        """What it becomes, in a few words."""
        return f"{self.dtype}{self.bits} {self.inputs}" if self.inputs else f"{self.bits} bits g{self.group_size}"

    @property
    def scales(self) -> int:
        """Scales of its weights."""
        return self.groups * (1 if self.rows == -1 else -(-self.shape[0] // self.rows))


@dataclass(frozen=True)
class Modules:
    """Where a checkpoint keeps its parts, from tensor names: the layers' prefix, embeddings, head, linears."""

    layers: str
    embeddings: str
    head: str
    linears: dict[str, tuple[int, int]]


def find_modules(checkpoint: Checkpoint) -> Modules:
    """Decoder layers, embeddings and head of a dense checkpoint, by the family's row or by the tensors' names.

    Raises:
        ModelError: no tensors that look like decoder layers, or weights that are no floats.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    found = [(match, info) for name, info in checkpoint.tensors.items() if (match := _LAYER.fullmatch(name))]
    prefixes = Counter(match[1] for match, _ in found)
    layers = family.layers if family else (prefixes.most_common(1)[0][0] if prefixes else "")
    linears = {
        match[0].removesuffix(".weight"): (info.shape[0], info.shape[1])
        for match, info in found
        if match[1] == layers and len(info.shape) == 2
    }
    if not linears:
        raise ModelError(f"{checkpoint.folder}: no decoder layers under {layers or 'any prefix'} in the weights")
    odd = next((n for n in linears if checkpoint.tensors[f"{n}.weight"].dtype not in _FLOATS), None)
    if odd:
        dtype = checkpoint.tensors[f"{odd}.weight"].dtype
        raise ModelError(f"{checkpoint.folder}: {odd} is stored as {dtype}; give bf16, fp16 or fp32 weights")
    outside = {n.removesuffix(".weight"): i for n, i in checkpoint.tensors.items() if not n.startswith(layers + ".")}
    wide = [n for n, i in outside.items() if len(i.shape) == 2 and i.shape[0] == checkpoint.config.get("vocab_size")]
    embeddings = family.embeddings if family else next((n for n in wide if "embed" in n or n.endswith("wte")), "")
    head = family.head if family else next((n for n in wide if n != embeddings), "lm_head")
    return Modules(layers, embeddings, head, linears)


def plan_matrices(spec: QuantizeStage | EightBitStage, checkpoint: Checkpoint, where: str) -> list[Matrix]:
    """The matrices that a quantize stage will quantize.

    Args:
        spec: the stage.
        checkpoint: the model.
        where: what errors start with, such as "stages.0".

    Raises:
        RecipeError: globs that match nothing, group sizes that don't divide a width; all problems at once.
    """
    modules = find_modules(checkpoint)
    shapes = dict(modules.linears)
    vocabulary = checkpoint.tensors.get(f"{modules.embeddings}.weight")
    head = checkpoint.tensors.get(f"{modules.head}.weight", vocabulary)
    if isinstance(spec, QuantizeStage) and spec.lm_head and head is not None:
        shapes[modules.head] = _two(head)
    if isinstance(spec, QuantizeStage) and spec.embeddings and vocabulary is not None:
        shapes[modules.embeddings] = _two(vocabulary)
    known = {name: (name,) for name in shapes} | {
        modules.head: (modules.head, *_HEADS),
        modules.embeddings: (modules.embeddings,),
    }
    ignorable = {name for names in known.values() for name in names}  # also what is left alone anyway
    problems = _globs_without_match(spec.ignore, ignorable, shapes, where)
    problems += _globs_without_match(spec.overrides, shapes, shapes, where)
    kept = [
        name for name in shapes if not any(fnmatchcase(alias, glob) for alias in known[name] for glob in spec.ignore)
    ]
    matrices = [_matrix(name, shapes[name], spec) for name in kept]
    problems += _indivisible(matrices, where)
    if not kept and not problems:
        problems.append(f"{where}.ignore: leaves nothing to quantize; remove some of its globs")
    if problems:
        raise RecipeError(problems)
    return matrices


def _two(info: TensorInfo) -> tuple[int, int]:
    return info.shape[0], info.shape[1]


def _matrix(name: str, shape: tuple[int, int], spec: QuantizeStage | EightBitStage) -> Matrix:
    if isinstance(spec, EightBitStage):
        method: str = spec.method
        for glob, other in spec.overrides.items():
            method = other.method if fnmatchcase(name, glob) else method
        width, rows = {"channel": (-1, 1), "tensor": (-1, -1), "block": (_BLOCK, _BLOCK)}[spec.granularity]
        if spec.bits == 4:
            width = spec.group_size or 32
        return Matrix(name, shape, spec.bits, width, True, rows, spec.dtype.removesuffix("8"), method)
    settings: dict[str, Any] = {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
    for glob, override in spec.overrides.items():
        if fnmatchcase(name, glob):
            settings |= override.model_dump(exclude_none=True)
    return Matrix(name, shape, **settings)


def _globs_without_match(
    globs: Iterable[str], names: Collection[str], linears: Collection[str], where: str
) -> list[str]:
    """A line for each glob that matches none of the names, with the linears that there are."""
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    problems = []
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            hint = did_you_mean(glob.rpartition(".")[2], sorted({name.rpartition(".")[2] for name in names}))
            problems.append(f"{where}: {glob!r} matches no linear layer{hint}; there are {', '.join(leaves)}")
    return problems


def _indivisible(matrices: Sequence[Matrix], where: str) -> list[str]:
    by_width: dict[tuple[int, int], list[str]] = {}
    for matrix in matrices:
        width = matrix.shape[1]
        if matrix.group_size != -1 and width % matrix.group_size:
            by_width.setdefault((matrix.group_size, width), []).append(matrix.name)
    problems = []
    for (group_size, width), names in by_width.items():
        works = [str(size) for size in get_args(GroupSize) if size == -1 or width % size == 0]
        kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
        if matrices[0].rows != 1:
            problems.append(
                f"{where}.granularity: blocks of {group_size} do not divide the width {width} of {', '.join(kinds)} "
                f"({len(names)} layers); use channel, or ignore them"
            )
            continue
        problems.append(
            f"{where}.group_size: {group_size} does not divide the width {width} of {', '.join(kinds)} "
            f"({len(names)} layers); use {' or '.join(works)}"
        )
    return problems


@dataclass(frozen=True)
class Estimate:
    """What a run will take, in bytes; estimates from shapes.

    Args:
        base_bytes: the model's safetensors.
        output_bytes: the checkpoint to be written.
        memory_bytes: largest resident memory of the layer loop on a CPU that computes in 16 bits (one layer twice, its
            largest Hessian and what solves it, a layer's inner activations for each model beside the other, embeddings
            and head, libraries).
        disk_bytes: free space wanted while it runs.
        parameters: of the model.
    """

    base_bytes: int
    output_bytes: int
    memory_bytes: int
    disk_bytes: int
    parameters: int


def estimate(
    spec: QuantizeStage | EightBitStage,
    matrices: Sequence[Matrix],
    checkpoint: Checkpoint,
    sequences: int,
    sequence_length: int,
) -> Estimate:
    """Memory and disk of a quantize stage on this model with this much calibration text."""
    modules = find_modules(checkpoint)
    wide = any(checkpoint.tensors[f"{name}.weight"].dtype == "F32" for name in modules.linears)
    packed = sum(quantized_bytes(m, spec.format, 4 if wide else 2) + 3 * _HEADER_BYTES for m in matrices)
    replaced = {matrix.name for matrix in matrices} | ({modules.head} if _is_tied(checkpoint, modules) else set())
    output = checkpoint.bytes + packed - sum(_dense_bytes(checkpoint, name) for name in replaced)
    layer: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        match = _LAYER.fullmatch(name)
        layer[match[2] if match and match[1] == modules.layers else "outside"] += info.bytes
    outside = layer.pop("outside", 0)
    hidden = width_of(checkpoint.config) or 0
    widest = max(matrix.shape[1] for matrix in matrices)
    in_layers = max((m.shape[1] for m in matrices if m.name.startswith(modules.layers)), default=widest)
    models = 2 if isinstance(spec, QuantizeStage) and spec.correction else 1
    activations = models * 2 * sequences * sequence_length * (5 * hidden + in_layers)
    memory = 4 * max(layer.values()) + 20 * widest**2 + activations + outside + 700_000_000
    return Estimate(checkpoint.bytes, output, memory, 2 * output, parameter_count(checkpoint))


def _dense_bytes(checkpoint: Checkpoint, module: str) -> int:
    info = checkpoint.tensors.get(f"{module}.weight")
    return info.bytes if info is not None else 0


def quantized_bytes(matrix: Matrix, format: str, scale_bytes: int = 2) -> int:
    """Bytes of the tensors that hold a quantized matrix in a checkpoint format (compress/export says which)."""
    rows, columns = matrix.shape
    scales = matrix.scales
    if format == "torchao":
        return rows * columns + (scale_bytes + (matrix.bits == 4)) * scales
    if matrix.inputs is not None:
        return rows * columns + scale_bytes * (scales + (matrix.inputs != "dynamic"))
    if format == "gptq":
        return (rows * columns + scales) * matrix.bits // 8 + 2 * scales + 4 * columns
    zeros = 0 if matrix.symmetric else 4 * matrix.groups * -(-rows * matrix.bits // 32)
    return 4 * rows * -(-columns * matrix.bits // 32) + scale_bytes * scales + zeros + 16


def _is_tied(checkpoint: Checkpoint, modules: Modules) -> bool:
    tied = checkpoint.config.get("tie_word_embeddings", False)
    return bool(tied) and f"{modules.embeddings}.weight" in checkpoint.tensors


def parameter_count(checkpoint: Checkpoint) -> int:
    """Parameters of a dense checkpoint; a tied head that is stored twice counts once."""
    modules = find_modules(checkpoint)
    skipped = f"{modules.head}.weight" if _is_tied(checkpoint, modules) else ""
    total = 0
    for name, info in checkpoint.tensors.items():
        if name != skipped and info.dtype in _FLOATS:
            total += math.prod(info.shape)
    return total
