"""What is no mistake in a recipe, but what its user should hear before the run: a line each.

Never imports torch, so that `validate` answers at once.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import find_modules
from compress.recipe.lengths import shortened
from compress.recipe.load import load_evaluation_spec
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import CalibrationSpec, Recipe, is_local_source
from compress.run.plan import calibration_of
from compress.stages.quantize.plan import Matrix, plan_matrices
from compress.system.fingerprint import sha256

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM


def cautions(recipe: Recipe, base: Checkpoint | None = None) -> list[str]:
    """Lines for `Reporter.warn`.

    Args:
        recipe: valid.
        base: its model where that is here; some lines need its tensors' names and shapes.
    """
    lines = [
        f"stages.{number}.lm_head: a quantized head in format gptq is opened by GPTQModel; transformers with optimum "
        "takes it for a missing one and fills it with random weights (for transformers, use format: compressed-tensors)"
        for number, stage in enumerate(recipe.stages)
        if isinstance(stage, WeightOnlyStage) and stage.format == "gptq" and stage.lm_head
    ]
    if recipe.evaluate is not None and any(stage.calibrates for stage in recipe.stages):
        calibration, evaluation = calibration_of(recipe), load_evaluation_spec(recipe.evaluate.text)
        if _same_text(calibration, evaluation):
            lines.append(
                f"calibration and evaluate.text are the same text ({evaluation.name or Path(evaluation.source).name}), "
                "which flatters the reported accuracy; calibrate on another, such as general_en"
            )
    if base is not None:
        lines += shortened(recipe, positions_of(base.config))
    for number, stage in enumerate(recipe.stages):
        if base is not None and stage.format != "torchao":
            where = f"stages.{number}"
            lines += _refused_by_vllm(plan_matrices(stage, base, where), find_modules(base).linears, where)
    return lines


def _refused_by_vllm(matrices: Sequence[Matrix], linears: Collection[str], where: str) -> list[str]:
    """What a checkpoint would hold that vLLM does not run, since it joins some linears; transformers opens it.

    Args:
        matrices: to quantize.
        linears: names of all linears of the decoder layers.
        where: the stage, such as `stages.0`.
    """
    schemes = {matrix.name: replace(matrix, name="", shape=(0, 0)) for matrix in matrices}
    rows = {matrix.name: matrix.shape[0] % matrix.rows for matrix in matrices if matrix.rows > 1}
    found = {}
    for parent, parts in product(dict.fromkeys(name.rpartition(".")[0] for name in linears), _JOINED):
        names = [name for part in parts if (name := f"{parent}.{part}") in linears]
        said = f"{where}: {re.sub(r'[.][0-9]+(?=[.]|$)', '.*', parent)}: {' and '.join(parts)} "
        if len({schemes.get(name) for name in names}) > 1:
            found[said] = "are quantized differently; vLLM joins them and needs one scheme"
        elif any(rows.get(name) for name in names):
            found[said] = (
                "have rows that fill no whole block; vLLM joins them and needs that (use granularity: channel)"
            )
    return [f"{said}{why}; transformers opens them as they are" for said, why in found.items()]


def _same_text(one: CalibrationSpec, other: CalibrationSpec) -> bool:
    """The same file by its bytes, or the same split of a hub dataset; how many samples are drawn does not matter."""
    if not (is_local_source(one.source) and is_local_source(other.source)):
        return (one.source, one.subset, one.split) == (other.source, other.subset, other.split)
    first, second = Path(one.source).expanduser(), Path(other.source).expanduser()
    if not (first.is_file() and second.is_file()):
        return False  # reading them says so
    if first.samefile(second):
        return True
    return first.stat().st_size == second.stat().st_size and sha256(first) == sha256(second)
