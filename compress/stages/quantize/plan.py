"""What a quantize stage will do to a model: which matrices become what, what can't work, how much memory it takes.

All from config.json and safetensors headers. Never imports torch, so that `validate` answers at once.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, get_args

from compress.errors import RecipeError
from compress.formats.facts import FACTS, bytes_on_disk
from compress.formats.openers import gptq_head, per_head_cache, refusals
from compress.model.arch import width_of
from compress.model.checkpoint import TensorInfo
from compress.model.shapes import LAYER, PlannedShapes, Shapes, find_modules, is_tied, model_dtype, parameter_count
from compress.recipe.messages import did_you_mean
from compress.recipe.quantize import GroupSize, WeightActivationStage, WeightOnlyStage
from compress.stages.contract import Plan, Setting
from compress.stages.quantize.cache_plan import check_cache
from compress.stages.quantize.few_tokens import few_tokens
from compress.stages.quantize.matrix import Matrix
from compress.system.units import size

_HEADER_BYTES = 120  # that a tensor takes in a file's header, about
_HEADS = ("lm_head", "embed_out")  # names by which an output head may be called, whatever the checkpoint calls it
_BLOCK = 128  # rows and columns of the blocks of `granularity: block`


def plan(spec: WeightOnlyStage | WeightActivationStage, shapes: Shapes | None, setting: Setting) -> Plan:
    """What the stage will do to a model of these shapes; None where it is not here."""
    where, text = setting.where, setting.text
    splits = isinstance(spec, WeightOnlyStage)
    warnings = gptq_head(where) if isinstance(spec, WeightOnlyStage) and spec.format == "gptq" and spec.lm_head else []
    if shapes is None:
        return Plan(None, warnings=warnings, splits=splits)
    try:
        matrices = plan_matrices(spec, shapes, where)
        check_cache(spec, shapes, where)
    except RecipeError as error:
        return Plan(shapes, problems=error.problems, warnings=warnings, splits=splits)
    if problem := _reference_problem(spec, shapes, setting):
        return Plan(shapes, problems=[problem], warnings=warnings, splits=splits)
    warnings += few_tokens(spec, matrices, text.samples * text.length, text.length)
    found = estimate(spec, matrices, shapes, text.samples, text.length)
    kinds = ", ".join(sorted({matrix.kind for matrix in matrices}))
    lines = [
        ("stage", f"{spec.kind} {spec.method}: {len(matrices)} matrices, {kinds}, format {spec.format}"),
        (
            "memory",
            f"about {size(found.memory_bytes)} ({text.samples} x {text.length} calibration tokens)",
        ),
    ]
    modules, kind = find_modules(shapes), str(shapes.config.get("model_type"))
    warnings += refusals(spec.layout, matrices, modules.linears, modules.embeddings, kind, where)
    if isinstance(spec, WeightActivationStage) and spec.kv_cache == "fp8_per_head":
        warnings += per_head_cache(where)
    config = shapes.config | {"quantization_config": {"quant_method": spec.format}}
    after = PlannedShapes(shapes, config, shapes.tensors, found.output_bytes)
    return Plan(after, (), warnings, lines, found.disk_bytes, splits, generates=FACTS[spec.layout].stock is None)


def _reference_problem(spec: WeightOnlyStage | WeightActivationStage, shapes: Shapes, setting: Setting) -> str | None:
    """Why the outputs of the recipe's own model can't be aimed at."""
    if not isinstance(spec, WeightOnlyStage) or spec.reference == "parent" or setting.base is None:
        return None
    widths = width_of(setting.base.config), width_of(shapes.config)
    if widths[0] == widths[1]:
        return None
    return (
        f"{setting.where}.reference: base is {widths[0]} wide and the pruned model {widths[1]}: their states can't be "
        "compared; use parent"
    )


def plan_matrices(spec: WeightOnlyStage | WeightActivationStage, checkpoint: Shapes, where: str) -> list[Matrix]:
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
    if isinstance(spec, WeightOnlyStage) and spec.lm_head and head is not None:
        shapes[modules.head] = _two(head)
    if isinstance(spec, WeightOnlyStage) and spec.embeddings and vocabulary is not None:
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


def _matrix(name: str, shape: tuple[int, int], spec: WeightOnlyStage | WeightActivationStage) -> Matrix:
    if isinstance(spec, WeightActivationStage):
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
    spec: WeightOnlyStage | WeightActivationStage,
    matrices: Sequence[Matrix],
    checkpoint: Shapes,
    sequences: int,
    sequence_length: int,
) -> Estimate:
    """Memory and disk of a quantize stage on this model with this much calibration text."""
    modules = find_modules(checkpoint)
    dtype = model_dtype(checkpoint)
    packed = sum(bytes_on_disk(spec.layout, matrix, dtype) + 3 * _HEADER_BYTES for matrix in matrices)
    replaced = {matrix.name for matrix in matrices} | ({modules.head} if is_tied(checkpoint, modules) else set())
    output = checkpoint.bytes + packed - sum(_dense_bytes(checkpoint, name) for name in replaced)
    layer: Counter[str] = Counter()
    for name, info in checkpoint.tensors.items():
        match = LAYER.fullmatch(name)
        layer[match[2] if match and match[1] == modules.layers else "outside"] += info.bytes
    outside = layer.pop("outside", 0)
    hidden = width_of(checkpoint.config) or 0
    widest = max(matrix.shape[1] for matrix in matrices)
    in_layers = max((m.shape[1] for m in matrices if m.name.startswith(modules.layers)), default=widest)
    models = 2 if isinstance(spec, WeightOnlyStage) and spec.correction else 1
    activations = models * 2 * sequences * sequence_length * (5 * hidden + in_layers)
    memory = 4 * max(layer.values()) + 20 * widest**2 + activations + outside + 700_000_000
    return Estimate(checkpoint.bytes, output, memory, 2 * output, parameter_count(checkpoint))


def _dense_bytes(checkpoint: Shapes, module: str) -> int:
    info = checkpoint.tensors.get(f"{module}.weight")
    return info.bytes if info is not None else 0
