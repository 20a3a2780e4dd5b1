"""The stages of a report as a chain: what each one was, what it left of the model, and what that cost."""

from dataclasses import dataclass

from compress.recipe.shape import AXIS_OF
from compress.records import Report, Stage
from compress.report import figures
from compress.report.paths import without_folders
from compress.system.units import count, size

HEADS = ["", "Stage", "Parameters", "Size", "Perplexity", "KL from the base", "Tokens trained", "Time"]


@dataclass(frozen=True)
class Point:
    """The base (number 0) or a stage's checkpoint: its parameters and its KL from the base, nats per token."""

    number: int
    verb: str
    parameters: int
    kl: float


def chain_rows(report: Report) -> list[list[str]]:
    """A row of `HEADS` for the base and for each stage; none for a recipe of one stage."""
    if len(report.stages) < 2:
        return []
    base, quality = report.base, report.quality
    costs = (quality.perplexity.base, 0.0) if quality else (None, None)
    first = ["0", f"base: {without_folders(base.model)}", *_figures(base.parameters, base.bytes, *costs), "–", "–"]
    rows = [first]
    for number, stage in enumerate(measured(report), 1):
        tokens = count(stage.trained.tokens) if stage.trained else "–"
        cells = _figures(stage.parameters, stage.bytes, stage.perplexity, stage.kl)
        rows.append([str(number), words(report, number - 1), *cells, tokens, figures.duration(stage.seconds)])
    return rows


def _figures(parameters: int | None, size_on_disk: int | None, perplexity: float | None, kl: float | None) -> list[str]:
    return [
        "–" if parameters is None else count(parameters),
        "–" if size_on_disk is None else size(size_on_disk),
        "–" if perplexity is None else figures.perplexity(perplexity),
        figures.number(kl),
    ]


def measured(report: Report) -> list[Stage]:
    """The stages; what the last one's record leaves out is the report's own, for its checkpoint is the result."""
    if not report.stages:
        return []
    last, result, quality = report.stages[-1], report.compressed, report.quality
    known = {
        "parameters": result.parameters,
        "bytes": result.bytes,
        "perplexity": quality.perplexity.compressed if quality else None,
        "kl": quality.kl.mean if quality else None,
    }
    missing = {name: value for name, value in known.items() if getattr(last, name) is None}
    return [*report.stages[:-1], last.model_copy(update=missing)]


def chain_points(report: Report) -> list[Point]:
    """The base and the stages whose KL is known, in order; none unless two are and the number of parameters changed."""
    points = [
        Point(number, verb(report, number - 1), stage.parameters, stage.kl)
        for number, stage in enumerate(measured(report), 1)
        if stage.parameters is not None and stage.kl is not None
    ]
    points = [Point(0, "base", report.base.parameters, 0.0), *points]
    return points if len(points) > 2 and len({point.parameters for point in points}) > 1 else []


def verb(report: Report, index: int) -> str:
    """What a stage does: prune, finetune, heal, distill, quantize.

    Learning a teacher's predictions is healing where something was pruned before.
    """
    stage = report.stages[index]
    behind_pruning = any(each.kind == "prune" for each in report.stages[:index])
    healing = stage.kind == "finetune" and behind_pruning and _loss(stage).startswith("kl")
    return "heal" if healing else stage.kind


def roles(report: Report) -> list[str]:
    """What became of the model before quantization: pruned, sparse, healed, finetuned, distilled; in order."""
    names = {"finetune": "finetuned", "heal": "healed", "distill": "distilled"}
    found = []
    for index, stage in enumerate(report.stages):
        name = names.get(verb(report, index))
        pruned = "pruned" if stage.pruned else "sparse" if stage.kind == "prune" else None
        healed = "healed" if stage.kind == "prune" and stage.trained else None
        found += [each for each in (pruned, healed, name) if each]
    return list(dict.fromkeys(found))


def words(report: Report, index: int) -> str:
    """A stage in a few words: `prune ffn, heads`, `heal (kl)`, `distill (kl + 0.1 ce)`, `quantize gptq 4-bit`."""
    stage = report.stages[index]
    lora = stage.spec.get("lora")
    trains = stage.kind in ("finetune", "distill")
    parts = []
    if stage.pruned:
        before, after = stage.pruned.before, stage.pruned.after
        axes = dict.fromkeys(AXIS_OF[key] for key in after if key in AXIS_OF and before.get(key) != after[key])
        parts.append(f"prune {', '.join(axes)}".strip())
    elif not trains:
        parts.append(" ".join([stage.kind, *_settings(stage)]))
    if trains:
        extra = f", LoRA of rank {lora.get('rank')}" if lora else ""
        parts.append(f"{verb(report, index)} ({_loss(stage)}{extra})")
    elif stage.trained:
        parts.append(f"heal ({stage.trained.loss})")
    return ", ".join(parts)


def _settings(stage: Stage) -> list[str]:
    spec = stage.spec
    bits = [] if spec.get("bits") is None else [f"{spec['bits']}-bit"]
    return [str(spec[key]) for key in ("method", "dtype", "type", "pattern") if spec.get(key) is not None] + bits


def _loss(stage: Stage) -> str:
    return stage.trained.loss if stage.trained else str(stage.spec.get("loss", ""))
