"""What pruning stages did, as reports show it: sizes before and after, and what each layer's linears lost."""

import re
from dataclasses import dataclass, replace

from compress.records import PrunedModule, Report, SparseModule, Stage
from compress.report.figures import number, percent
from compress.system.units import count


@dataclass(frozen=True)
class PrunedView:
    """One stage that pruned.

    Args:
        title: of its section.
        words: what was removed, in a sentence or two.
        sizes: rows of (key of config.json, before, after).
        heads: titles of the columns of `rows`.
        rows: one for each linear.
    """

    title: str
    words: str
    sizes: list[tuple[str, int, int]]
    heads: list[str]
    rows: list[list[str]]


def pruned_views(report: Report) -> list[PrunedView]:
    """Every stage of a report that pruned, in order."""
    several = sum(stage.kind == "prune" or stage.pruned is not None for stage in report.stages) > 1
    views = []
    for position, stage in enumerate(report.stages, 1):
        view = _structured(stage) if stage.pruned else _sparse(stage) if stage.kind == "prune" else None
        if view is not None:
            views.append(replace(view, title=f"{view.title}: stage {position}") if several else view)
    return views


def _structured(stage: Stage) -> PrunedView:
    pruned = stage.pruned
    assert pruned is not None
    removed = pruned.parameters_before - pruned.parameters
    words = (
        f"{count(removed)} of {count(pruned.parameters_before)} parameters are gone: {percent(pruned.share)} of all, "
        f"{percent(pruned.share_of_layers)} of the decoder layers'."
    )
    if pruned.removed_layers:
        words += f" Layers removed (counted from 0): {', '.join(map(str, pruned.removed_layers))}."
    if pruned.calibration_kl is not None:
        words += f" On the calibration text the result is {number(pruned.calibration_kl)} nats of KL from its parent."
    if pruned.tried:
        each = "; ".join(f"{shape}: {number(kl)}" for shape, kl in pruned.tried.items())
        words += f" Shapes compared by that: {each}."
    sizes = [(key, pruned.before[key], size) for key, size in pruned.after.items() if pruned.before[key] != size]
    modules = [(layer.layer, m) for layer in stage.layers for m in layer.modules if isinstance(m, PrunedModule)]
    trained = any(module.layer_error_trained is not None for _, module in modules)
    heads = ["Layer", "Linear", "Shape before", "Shape", "Error, cut", "Error, solved"]
    rows = []
    for index, module in modules:
        row = [str(index), _local(module.name), *(" × ".join(map(str, s)) for s in (module.before, module.shape))]
        row += [percent(module.error_cut), percent(module.error)]
        if trained:
            row += [percent(module.layer_error), percent(module.layer_error_trained)]
        rows.append(row)
    return PrunedView("What was pruned", words, sizes, heads + ["Layer, solved", "Layer, trained"] * trained, rows)


def _sparse(stage: Stage) -> PrunedView | None:
    modules = [(layer.layer, m) for layer in stage.layers for m in layer.modules if isinstance(m, SparseModule)]
    if not modules:
        return None
    weights = sum(m.shape[0] * m.shape[1] for _, m in modules)
    zeros = sum(m.zeros * m.shape[0] * m.shape[1] for _, m in modules)
    words = (
        f"{percent(zeros / weights)} of the weights of {len(modules)} linears are zero (pattern "
        f"{stage.spec.get('pattern')}). Zeros are stored like other weights: the size on disk stays."
    )
    rows = [
        [str(index), _local(m.name), " × ".join(map(str, m.shape)), percent(m.zeros), percent(m.error)]
        for index, m in modules
    ]
    return PrunedView("What was set to zero", words, [], ["Layer", "Linear", "Shape", "Zeros", "Output error"], rows)


def _local(name: str) -> str:
    """A linear's name inside its layer."""
    return re.sub(r"^.*?\.\d+\.", "", name)
