"""What a quantize stage will do to a model: which matrices become what, what can't work, how much memory it takes.

All from config.json and safetensors headers. Never imports torch, so that `validate` answers at once.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

from compress.errors import RecipeError
from compress.formats.facts import FACTS
from compress.formats.openers import gptq_head, per_head_cache, refusals
from compress.model.arch import width_of
from compress.model.checkpoint import TensorInfo
from compress.model.shapes import DTYPE_NAMES, PlannedShapes, Shapes, find_modules, is_tied, model_dtype
from compress.recipe.gguf import GgufStage
from compress.recipe.messages import did_you_mean
from compress.recipe.quantize import GroupSize, QuantizeStage, WeightActivationStage, WeightOnlyStage
from compress.recipe.weights import WeightStage
from compress.stages.contract import Plan, Setting
from compress.stages.memory import Load, forecast, largest_layer, solver_bytes
from compress.stages.quantize.block_plan import block_lines, block_matrices, block_problems
from compress.stages.quantize.cache_plan import check_cache
from compress.stages.quantize.few_tokens import few_tokens
from compress.stages.quantize.matrix import Matrix
from compress.stages.quantize.written import output_bytes

_HEADS = ("lm_head", "embed_out")  # names by which an output head may be called, whatever the checkpoint calls it
_BLOCK = 128  # rows and columns of the blocks of `granularity: block`


def plan(spec: QuantizeStage, shapes: Shapes | None, setting: Setting) -> Plan:
    """What the stage will do to a model of these shapes; None where it is not here."""
    where, text = setting.where, setting.text
    splits = isinstance(spec, WeightStage)
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
    output = output_bytes(spec, matrices, shapes)
    about = isinstance(spec, GgufStage) or any(matrix.inputs == "auto" for matrix in matrices)
    kinds = ", ".join(sorted({matrix.kind for matrix in matrices}))
    lines = [("stage", f"{spec.kind} {spec.method}: {len(matrices)} matrices, {kinds}, format {spec.format}")]
    if isinstance(spec, GgufStage):
        lines += block_lines(spec, matrices, shapes)
    modules, kind = find_modules(shapes), str(shapes.config.get("model_type"))
    if not isinstance(spec, GgufStage):  # llama.cpp takes each matrix by itself
        warnings += refusals(spec.layout, matrices, modules.linears, modules.embeddings, kind, where)
    if isinstance(spec, WeightActivationStage) and spec.kv_cache == "fp8_per_head":
        warnings += per_head_cache(where)
    config = shapes.config | {"quantization_config": {"quant_method": spec.format}}
    if not config.get("dtype") and not config.get("torch_dtype"):
        config["dtype"] = DTYPE_NAMES[model_dtype(shapes)]  # as the stage writes it
    after = PlannedShapes(shapes, config, shapes.tensors, output)
    found = forecast(_load(spec, matrices, shapes, setting), shapes, setting.place, output, 2 * output, about)
    return Plan(after, (), warnings, lines, found, splits, generates=FACTS[spec.layout].stock is None)


def _reference_problem(spec: QuantizeStage, shapes: Shapes, setting: Setting) -> str | None:
    """Why the outputs of the recipe's own model can't be aimed at."""
    if not isinstance(spec, WeightStage) or spec.reference == "parent" or setting.base is None:
        return None
    widths = width_of(setting.base.config), width_of(shapes.config)
    if widths[0] == widths[1]:
        return None
    return (
        f"{setting.where}.reference: base is {widths[0]} wide and the pruned model {widths[1]}: their states can't be "
        "compared; use parent"
    )


def plan_matrices(spec: QuantizeStage, checkpoint: Shapes, where: str) -> list[Matrix]:
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
    blocks = isinstance(spec, GgufStage)
    own_head = blocks and f"{modules.head}.weight" in checkpoint.tensors and not is_tied(checkpoint, modules)
    if head is not None and (own_head or (isinstance(spec, WeightOnlyStage) and spec.lm_head)):
        shapes[modules.head] = _two(head)
    if vocabulary is not None and (blocks or (isinstance(spec, WeightOnlyStage) and spec.embeddings)):
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
    if isinstance(spec, GgufStage):
        matrices = block_matrices(spec, {name: shapes[name] for name in kept}, checkpoint)
        problems += block_problems(checkpoint, where)
    else:
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


def _load(spec: QuantizeStage, matrices: Sequence[Matrix], shapes: Shapes, setting: Setting) -> Load:
    """What the stage does in the layer loop: weights as stored, as codes, as they run; one group solved at a time."""
    inside, width = find_modules(shapes).layers + ".", setting.place.width
    stored, weights = largest_layer(shapes)
    models = 2 if isinstance(spec, WeightStage) and spec.correction else 1
    layer = 2 * stored + (width + 1) * weights + (models * width * weights if stored != width * weights else 0)
    if isinstance(spec, WeightActivationStage) and spec.smooth is not None:
        layer += 4 * weights  # what is read becomes float32
    groups: Counter[tuple[str, int]] = Counter()
    for matrix in matrices:
        place = matrix.name.removeprefix(inside).partition(".")[0] if matrix.name.startswith(inside) else ""
        groups[place, matrix.shape[1]] += math.prod(matrix.shape)
    solves = spec.weight_rounding == "gptq"
    solvers = {place: solver_bytes(inputs, number, solves) for (place, inputs), number in groups.items() if place}
    heads = [solver_bytes(inputs, number, solves) for (place, inputs), number in groups.items() if not place]
    tokens = setting.text.samples * setting.text.length if spec.calibrates else 0
    return Load(
        tokens, shapes if models == 2 else None, layer, max(solvers.values(), default=0), max(heads, default=0), models
    )
