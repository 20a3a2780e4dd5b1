"""What `dscompress run --dry-run` prints: a recipe's plan with sizes, memory and disk, from headers alone."""

import shutil
from pathlib import Path

from compress.model.shapes import parameter_count
from compress.model.source import resolve_model
from compress.recipe.schema import Recipe
from compress.run.artefact import check_output
from compress.run.plan import calibration_of, open_model
from compress.run.warnings import cautions
from compress.stages.quantize.few_tokens import few_tokens
from compress.stages.quantize.plan import estimate, plan_matrices
from compress.system.progress import Reporter


def describe(recipe: Recipe, work: Path, reporter: Reporter) -> list[str]:
    """The plan, a line each; nothing is computed or written but a GGUF file's copy in the work folder.

    Raises:
        UserError: whatever would stop the run before it starts.
    """
    output = Path(recipe.output)
    check_output(output)
    base = open_model(resolve_model(recipe.model, recipe.revision, work, reporter.say), recipe)
    for line in cautions(recipe, base):
        reporter.warn(line)
    text = calibration_of(recipe, base)
    lines = [f"model    {recipe.model}: {parameter_count(base):,} parameters, {_size(base.bytes)}"]
    for number, stage in enumerate(recipe.stages):
        matrices = plan_matrices(stage, base, f"stages.{number}")
        plan = estimate(stage, matrices, base, text.samples, text.length)
        for line in few_tokens(stage, matrices, text.samples * text.length, text.length):
            reporter.warn(line)
        kinds = ", ".join(sorted({m.kind for m in matrices}))
        free = shutil.disk_usage(_existing(work)).free
        lines += [
            f"stage    {stage.kind} {stage.method}: {len(matrices)} matrices, {kinds}, format {stage.format}",
            f"result   about {_size(plan.output_bytes)}, {plan.base_bytes / plan.output_bytes:.2f} times smaller",
            f"memory   about {_size(plan.memory_bytes)} ({text.samples} x {text.length} calibration tokens)",
            f"disk     about {_size(plan.disk_bytes)} under {work}, {_size(free)} free",
        ]
    return [*lines, f"output   {output}"]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
