"""Which programs will not open what a quantize stage writes though transformers does: said before the run, a line each.

Never imports torch.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import product

from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.stages.quantize.matrix import Matrix

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # by vLLM


def opened_by_few(spec: WeightOnlyStage | WeightActivationStage, where: str) -> list[str]:
    """What can be said without the model.

    Args:
        spec: the stage.
        where: the stage in the recipe, such as `stages.0`.
    """
    if not (isinstance(spec, WeightOnlyStage) and spec.format == "gptq" and spec.lm_head):
        return []
    return [
        f"{where}.lm_head: a quantized head in format gptq is opened by GPTQModel; transformers with optimum "
        "takes it for a missing one and fills it with random weights (for transformers, use format: compressed-tensors)"
    ]


def refused_by_vllm(matrices: Sequence[Matrix], linears: Collection[str], where: str) -> list[str]:
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
