"""What a prune stage will do to a model: the shape that it gets, from config.json and headers alone. Never torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from compress.errors import ModelError
from compress.forecast_records import Forecast
from compress.model.layout import by_layer, merged_bytes
from compress.model.shapes import PlannedShapes, Shapes, find_modules, is_tied
from compress.prune.axes import Anatomy, Dims, anatomy, smaller_config
from compress.prune.search import nearest_legal, search
from compress.recipe.prune import PatternStage, PruneStage
from compress.recipe.shape import Shape
from compress.recipe.types import StageSpec
from compress.stages.contract import Plan, Setting
from compress.stages.memory import Load, forecast, largest_layer, solver_bytes
from compress.system.units import count, size

_WIDE, _NARROW = 128, 64  # what kernels like widths to be a multiple of, in large models and in small ones
_NARROW_UNDER = 2048
_LEAST_STEPS = 4  # a width that has fewer multiples than that takes smaller ones
_COMPARED = 3  # shapes, by `allocate: auto`
_AMPLE = 20  # calibration tokens for each input, from which on `damp` alone holds solved weights back


def plan(spec: PruneStage | PatternStage, shapes: Shapes | None, setting: Setting) -> Plan:
    """What the stage will do to a model of these shapes; None where it is not here."""
    where = setting.where
    if shapes is None:
        return Plan(None)
    if shapes.config.get("auto_map"):
        return Plan(
            shapes, [f"{where}: the model comes with code of its own; pruning knows transformers' families only"]
        )
    if isinstance(spec, PatternStage):
        return _pattern_plan(spec, shapes, setting)
    try:
        body = anatomy(shapes)
    except ModelError as error:
        return Plan(shapes, [f"{where}: {error}"])
    problems = axis_problems(spec, body, where)
    if problems:
        return Plan(shapes, problems)
    multiples = multiples_of(spec, body, setting.following)
    if spec.shape is not None:
        given = spec.shape if isinstance(spec.shape, list) else [spec.shape]
        found = [dims_of(each, body, where, multiples) for each in given]
        problems = [each for each in found if isinstance(each, str)]
        chosen = [each for each in found if isinstance(each, Dims)]
    else:
        chosen, problems = _searched(spec, body, setting, multiples)
    problems += [line for dims in chosen[1:] for line in _later_problems(body, setting, dims)]
    if problems:
        return Plan(shapes, problems)
    best = chosen[0]
    after = planned_shapes(body, best)
    return Plan(
        after,
        warnings=warnings_of(spec, body, best, setting),
        lines=_lines(spec, body, chosen),
        forecast=_forecast(spec, body, after, len(chosen), setting),
        spec=resolved(spec, chosen),
        builds=True,
    )


def axis_problems(spec: PruneStage, body: Anatomy, where: str) -> list[str]:
    """Axes along which the model can't be cut, a line each."""
    able = [axis for axis in ("ffn", "heads", "hidden", "layers") if axis not in body.problems]
    remedy = f"use {', '.join(able)}" if able else "it can't be pruned"
    bad = [axis for axis in spec.over if axis in body.problems]
    return [f"{where}.axes: {axis} can't be cut here: {body.problems[axis]}; {remedy}" for axis in bad]


def multiples_of(spec: PruneStage, body: Anatomy, following: Sequence[StageSpec]) -> dict[str, int]:
    """What ffn, hidden and the joined width of the heads must be a multiple of."""
    groups = [_group(stage) for stage in following]
    dims = body.dims
    found = {"q": math.lcm(1, *groups)}
    for axis in ("ffn", "hidden"):
        width = dims.of_axis(axis)
        step = spec.multiple_of or (_WIDE if width >= _NARROW_UNDER else _NARROW)
        while spec.multiple_of is None and step > 1 and width < _LEAST_STEPS * step:
            step //= 2
        found[axis] = math.lcm(step, *groups)
    return found


def _group(stage: StageSpec) -> int:
    """The group of columns that a later stage's scales are for; 1 where it has none."""
    if getattr(stage, "granularity", "") == "block":
        return 128
    return max(1, getattr(stage, "group_size", None) or 1)


def dims_of(shape: Shape, body: Anatomy, where: str, multiples: dict[str, int]) -> Dims | str:
    """The sizes that a recipe gives, or why they can't be."""
    whole, sizes = body.dims, shape.sizes
    before = whole.sizes
    more = next((key for key in sizes if sizes[key] > before[key]), None)
    if more is not None:
        return f"{where}.shape.{more}: {sizes[more]} is more than the model's {before[more]}; pruning only removes"
    heads, groups = sizes.get("num_attention_heads"), sizes.get("num_key_value_heads")
    inside = whole.heads // whole.kv_heads
    if groups is None:
        groups = heads if heads is not None and inside == 1 else whole.kv_heads
    if heads is None:
        heads = groups * inside
    dims = Dims(
        sizes.get("hidden_size", whole.hidden), sizes.get("intermediate_size", whole.ffn), heads, groups,
        whole.head_dim, sizes.get("num_hidden_layers", whole.layers),
    )  # fmt: skip
    refused = body.refusal(dims)
    if refused is None:
        return dims
    near = nearest_legal(body, dims, multiples)
    remedy = "" if near is None else f"; the nearest legal shape is {words(near, body.dims)}"
    return f"{where}.shape: {refused}{remedy}"


def _searched(
    spec: PruneStage, body: Anatomy, setting: Setting, multiples: dict[str, int]
) -> tuple[list[Dims], list[str]]:
    """The shapes that meet the target, or problems."""
    target, where = spec.target, setting.where
    assert target is not None, "there is a target where there is no shape"
    total, inside = body.total
    if target.sparsity is not None:
        layers = target.of == "layers"
        whole = inside if layers else total
        wanted, said = (1 - target.sparsity) * whole, f"sparsity: {target.sparsity:g}"

        def cost(dims: Dims) -> float:
            return body.count(dims)[1 if layers else 0]
    elif target.parameters is not None:
        wanted, said = float(target.parameters), f"parameters: {count(target.parameters)}"
        if target.parameters > total:
            return [], [
                f"{where}.target.parameters: {target.parameters:,} is more than the model's {total:,}; use fewer"
            ]

        def cost(dims: Dims) -> float:
            return body.count(dims)[0]
    else:
        return _within_bytes(spec, body, setting, multiples)
    found = search(body, spec.over, multiples, wanted, cost, at_most=False)
    if found.best:
        return list(found.best[: _COMPARED if spec.allocate == "auto" else 1]), []
    share = 1 - cost(found.nearest) / (inside if target.of == "layers" else total)
    return [], [_not_reached(spec, body, found.nearest, said, f"sparsity {share:.3f}", where)]


def _within_bytes(
    spec: PruneStage, body: Anatomy, setting: Setting, multiples: dict[str, int]
) -> tuple[list[Dims], list[str]]:
    """The shapes whose checkpoint, behind the last stage, has no more bytes than the target.

    Bytes grow with the parameters of the layers and of all else, so two plans show how much, and the shapes that are
    found are planned to be sure.
    """
    assert spec.target is not None and spec.target.bytes is not None, "the target is in bytes"
    wanted, where, said = spec.target.bytes, setting.where, f"bytes: {size(spec.target.bytes)}"
    exact = cache(partial(_final_bytes, body, setting))

    def parameters(dims: Dims) -> float:
        return body.count(dims)[0]

    least = search(body, spec.over, multiples, 0.0, parameters, at_most=False).nearest
    middle = (parameters(least) + body.total[0]) / 2
    half = search(body, spec.over, multiples, middle, parameters, at_most=False).nearest
    each = _bytes_each(body, exact, half, least)
    if each is None:
        axes = ", ".join(spec.over)
        return [], [f"{where}.target.{said} is reached by no shape over {axes} that the stages behind it can work on"]

    def cost(dims: Dims) -> float:
        total, inside = body.count(dims)
        return each[0] * inside + each[1] * (total - inside)

    for share in (1.0, 0.997, 0.98):  # the reckoning may be a little below what the plan says
        found = search(body, spec.over, multiples, share * wanted, cost, at_most=True)
        best = [dims for dims in found.best if exact(dims) <= wanted]
        if best:
            return best[: _COMPARED if spec.allocate == "auto" else 1], []
    smallest = found.nearest if math.isfinite(exact(found.nearest)) else least
    return [], [_not_reached(spec, body, smallest, said, size(exact(smallest)), where)]


def _bytes_each(body: Anatomy, exact: Callable[[Dims], float], one: Dims, other: Dims) -> tuple[float, float] | None:
    """Bytes of a parameter of the layers, and of any other, from two shapes; None where a later stage works on none."""
    sizes = {dims: exact(dims) for dims in (one, other) if math.isfinite(exact(dims))}
    if not sizes:
        return None
    stored = body.shapes.bytes / body.total[0]  # outside the layers, where hardly anything is quantized
    rows = [(total - inside, inside, found) for dims, found in sizes.items() for total, inside in [body.count(dims)]]
    if len(rows) == 2 and rows[0][1] != rows[1][1] and rows[0][0] == rows[1][0]:
        inner = (rows[0][2] - rows[1][2]) / (rows[0][1] - rows[1][1])
        return inner, (rows[0][2] - inner * rows[0][1]) / rows[0][0]
    outer, inside, found = rows[0]
    return max(0.0, found - stored * outer) / inside, stored


def _not_reached(spec: PruneStage, body: Anatomy, near: Dims, said: str, reached: str, where: str) -> str:
    shape = words(near, body.dims) or "the model as it is"
    return (
        f"{where}.target.{said} is reached by no shape over {', '.join(spec.over)}; "
        f"the nearest is {reached} ({shape}); use that, or more axes"
    )


def _final_bytes(body: Anatomy, setting: Setting, dims: Dims) -> float:
    """Bytes of the checkpoint behind the last stage, for a shape; infinite where a later stage can't work on it."""
    from compress.stages import KINDS

    shapes: Shapes | None = planned_shapes(body, dims)
    for number, stage in enumerate(setting.following):
        rest = replace(setting, where="", following=setting.following[number + 1 :])
        for part in KINDS[stage.kind].parts(stage, shapes, rest):
            after = KINDS[part.kind].plan().plan(part, shapes, rest)
            if after.problems or after.shapes is None:
                return math.inf
            shapes = after.shapes
    assert shapes is not None
    return shapes.bytes


def _later_problems(body: Anatomy, setting: Setting, dims: Dims) -> list[str]:
    """Why the stage behind this one can't work on one of several shapes; with the first one, its own plan says so."""
    from compress.stages import KINDS

    if not setting.following:
        return []
    stage, *rest = setting.following
    shapes = planned_shapes(body, dims)
    behind = replace(setting, following=rest)
    part = KINDS[stage.kind].parts(stage, shapes, behind)[0]
    after = KINDS[part.kind].plan().plan(part, shapes, behind)
    return [f"{setting.where}.shape: {words(dims, body.dims)} does not suit what follows: {p}" for p in after.problems]


def planned_shapes(body: Anatomy, dims: Dims) -> PlannedShapes:
    """The model of these sizes, as far as they are known before the work: which layers stay is not."""
    parent, modules = body.shapes, find_modules(body.shapes)
    tied = f"{modules.head}.weight" if is_tied(parent, modules) else ""
    tensors = {}
    for name, info in parent.tensors.items():
        parts: Any = body.outer.get(name, ((), ()))
        if name.startswith(modules.layers + "."):
            index, _, local = name.removeprefix(modules.layers + ".").partition(".")
            if int(index) >= dims.layers:
                continue
            parts = body.layer[local]
        elif name == tied:
            continue
        shape = dims.shape_of(parts[0], parts[1]) if parts[0] else info.shape
        width = info.bytes // max(1, math.prod(info.shape))
        tensors[name] = replace(info, shape=shape, bytes=width * math.prod(shape))
    config = smaller_config(body, dims, range(dims.layers))
    return PlannedShapes(parent, config, tensors, merged_bytes(by_layer(tensors, modules.layers), {}))


def resolved(spec: PruneStage, chosen: Sequence[Dims]) -> PruneStage:
    """The stage with its shape filled in, so that what runs hangs on nothing else."""
    shapes = [Shape(**dims.sizes) for dims in chosen]
    shape = shapes if len(shapes) > 1 else shapes[0]
    update = {"target": None, "shape": shape, "axes": spec.over, "multiple_of": None, "allocate": "even"}
    return spec.model_copy(update=update | {"importance": spec.ranking})


def words(dims: Dims, before: Dims) -> str:
    """The sizes that differ, in config.json's words."""
    return ", ".join(f"{key} {was} -> {dims.sizes[key]}" for key, was in before.sizes.items() if was != dims.sizes[key])


def shares(body: Anatomy, dims: Dims) -> str:
    """What is removed, of all parameters and of the layers'."""
    (total, inside), (left, left_inside) = body.total, body.count(dims)
    return (
        f"{count(total - left)} of {count(total)} parameters: {100 * (1 - left / total):.1f} % of all, "
        f"{100 * (1 - left_inside / inside):.1f} % of the layers'"
    )


def warnings_of(spec: PruneStage, body: Anatomy, dims: Dims, setting: Setting) -> list[str]:
    """What should be heard before the run."""
    lines, where, text = [], setting.where, setting.text
    widest, tokens = max(dims.ffn, dims.heads * dims.head_dim), text.samples * text.length
    if spec.compensate and tokens < _AMPLE * widest:
        samples = math.ceil(_AMPLE * widest / text.length)
        lines.append(
            f"{where}: {tokens} calibration tokens are fewer than {_AMPLE} for each of {widest} inputs, so solved "
            f"weights are held back; use samples: {samples} or more"
        )
    if dims == body.dims:
        lines.append(f"{where}: nothing is removed: the model is no larger than wanted as it is")
    if dims.hidden != body.dims.hidden and is_tied(body.shapes, find_modules(body.shapes)) and spec.compensate:
        lines.append(
            f"{where}: the head stays tied to the embeddings, so it is cut with them and not solved anew; "
            "the hidden axis costs most in such models"
        )
    return lines


def _lines(spec: PruneStage, body: Anatomy, chosen: Sequence[Dims]) -> list[tuple[str, str]]:
    how = spec.ranking + (", compensated" if spec.compensate else "")
    how += "" if spec.reconstruct == "off" else f", reconstructed ({spec.reconstruct_steps} steps)"
    rows = [("stage", f"{spec.title} ({how})")]
    for number, dims in enumerate(chosen):
        label = "shape" if len(chosen) == 1 else f"shape {number + 1}"
        rows += [(label, words(dims, body.dims) or "unchanged"), ("removed", shares(body, dims))]
    if len(chosen) > 1:
        rows.append(
            ("", "the one with the least divergence on the calibration text is taken; sizes above are the first's")
        )
    return rows


def _forecast(spec: PruneStage, body: Anatomy, after: PlannedShapes, shapes: int, setting: Setting) -> Forecast:
    """What it takes: the largest of its linears solved beside the layer and the one that it becomes."""
    stored, _ = largest_layer(body.shapes)
    trains, dims, text = spec.reconstruct != "off", body.dims, setting.text
    held = (16 if trains else 5) * stored  # float32 weights, gradients and moments
    widest = max(dims.ffn, dims.heads * dims.head_dim)
    tokens = text.samples * text.length if spec.calibrates else 0
    solver = solver_bytes(widest, widest * dims.hidden, hessian=True)
    load = Load(tokens, after, held, solver, 0, 4 if trains else 2)
    disk = 2 * shapes * after.bytes
    return forecast(load, body.shapes, setting.place, after.bytes, disk, about=shapes > 1)


def _pattern_plan(spec: PatternStage, shapes: Shapes, setting: Setting) -> Plan:
    modules, text = find_modules(shapes), setting.text
    linears, of = modules.linears, int(spec.pattern.partition(":")[2] or 1)
    odd = {shape[1]: name for name, shape in reversed(linears.items()) if shape[1] % of}
    problems = [
        f"{setting.where}.pattern: {spec.pattern} needs widths that {of} divides, and {name} has {width}; "
        "use unstructured"
        for width, name in odd.items()
    ]
    later = list(enumerate(setting.following, int(setting.where.rpartition(".")[2] or 0) + 1))
    problems += [
        f"stages.{number}: removes whole parts behind a pattern, whose zeros it would undo; put it in front of it"
        for number, stage in later
        if isinstance(stage, PruneStage)
    ]
    if problems:
        return Plan(shapes, problems)
    warnings = [_zeros_lost(spec, stage, number) for number, stage in later if stage.kind == "quantize"]
    output = merged_bytes(by_layer(shapes.tensors, modules.layers), {})
    lines = [("stage", f"{spec.title}: {len(linears)} matrices; the zeros are stored, so the size stays")]
    after = PlannedShapes(shapes, dict(shapes.config), shapes.tensors, output)
    widest = max(linears.values(), key=lambda shape: shape[1])
    tokens = text.samples * text.length if spec.calibrates else 0
    beside = shapes if spec.method == "sparsegpt" else None
    solver = solver_bytes(widest[1], math.prod(widest), hessian=spec.calibrates)
    load = Load(tokens, beside, 5 * largest_layer(shapes)[0], solver, 0, 2)
    found = forecast(load, shapes, setting.place, output, 2 * output)
    return Plan(after, warnings=list(filter(None, warnings)), lines=lines, forecast=found)


def _zeros_lost(spec: PatternStage, stage: StageSpec, number: int) -> str:
    """Whether a later stage moves the zeros."""
    if getattr(stage, "pattern", None) == spec.pattern or getattr(stage, "weight_rounding", None) == "rtn":
        return ""
    remedy = "; weight_rounding: rtn in that stage keeps them"
    if hasattr(stage, "pattern"):
        remedy = "" if spec.pattern == "unstructured" else f"; pattern: {spec.pattern} in that stage keeps them"
    return f"stages.{number}: makes up for rounding in all weights, so the zeros of {spec.pattern} are lost{remedy}"
