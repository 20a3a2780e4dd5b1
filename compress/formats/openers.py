"""Who opens what: said before a run, where a program that users may have in mind won't open the result.

Never imports torch. What is known was tried with vLLM 0.32, GPTQModel 7.6, optimum with transformers 5.23 and ONNX
Runtime GenAI 0.18. transformers itself is not trusted to open anything: every run's verification asks it.
"""

import re
from collections.abc import Collection, Sequence
from itertools import product

from compress.formats.facts import FLOAT_QUANTIZED, GPTQ, PACK_QUANTIZED, TORCHAO, Matrix

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}  # by vLLM
VLLM_BITS = frozenset({4, 8})


def refusals(
    layout: str, matrices: Sequence[Matrix], linears: Collection[str], embeddings: str, model_type: str, where: str
) -> list[str]:
    """A line for each program that won't open a checkpoint, with the remedy.

    Args:
        layout: the format's name.
        matrices: to quantize.
        linears: names of all linears of the decoder layers.
        embeddings: name of the token embeddings.
        model_type: of the model.
        where: the stage, such as `stages.0`.
    """
    if layout == TORCHAO:
        return []
    lines = _joined(matrices, linears, where)
    if layout == PACK_QUANTIZED:
        lines += _pack_quantized(matrices, embeddings, where)
    if layout == GPTQ:
        lines += _gptq(matrices, linears, model_type, where)
    if layout == FLOAT_QUANTIZED and any(m.rows == 1 and m.inputs in ("static", "auto") for m in matrices):
        lines.append(
            f"{where}.granularity: static fp8 with a scale per channel fails in vLLM where it has no kernel for it "
            "(its torch fallback, as on a CPU); there, use method: dynamic"
        )
    return lines


def gptq_head(where: str) -> list[str]:
    """What a quantized head in format gptq is opened by, which can be said without the model."""
    return [
        f"{where}.lm_head: a quantized head in format gptq is opened by GPTQModel; transformers with optimum "
        "takes it for a missing one and fills it with random weights (for transformers, use format: compressed-tensors)"
    ]


def per_head_cache(where: str) -> list[str]:
    """What is known of a cache with scales for each head."""
    return [
        f"{where}.kv_cache: vLLM's CPU build opens a checkpoint with fp8_per_head and is further off than rounding "
        "explains; vLLM takes scales per head with Flash Attention only (for any other, use kv_cache: fp8)"
    ]


def _pack_quantized(matrices: Sequence[Matrix], embeddings: str, where: str) -> list[str]:
    lines, bits = [], {matrix.bits for matrix in matrices}
    if odd := sorted(bits - VLLM_BITS):
        lines.append(
            f"{where}.bits: vLLM opens weights of 4 and 8 bits, some here have {' and '.join(map(str, odd))}; "
            "transformers opens them (for vLLM, use bits: 4)"
        )
    if 8 in bits:
        lines.append(
            f"{where}.bits: vLLM opens 8-bit weights with 16-bit inputs on a GPU and not on a CPU; transformers opens "
            "them (for vLLM on a CPU, use method: dynamic)"
        )
    if any(matrix.name == embeddings for matrix in matrices):
        lines.append(
            f"{where}.embeddings: vLLM does not open quantized embeddings; transformers does (for vLLM, use "
            "embeddings: false)"
        )
    return lines


def _gptq(matrices: Sequence[Matrix], linears: Collection[str], model_type: str, where: str) -> list[str]:
    lines = []
    kept = sorted({_kind(name) for name in set(linears) - {matrix.name for matrix in matrices}})
    if kept:
        lines.append(
            f"{where}.ignore: format gptq without {_some(kept)} is opened by GPTQModel and vLLM; optimum and ONNX "
            "Runtime fail on it (for them, ignore no layers)"
        )
    if any(matrix.group_size == -1 for matrix in matrices):
        lines.append(
            f"{where}.group_size: format gptq with group_size -1 is opened by GPTQModel and vLLM; optimum and ONNX "
            "Runtime fail on it (for them, use 128)"
        )
    if any(matrix.bits == 3 for matrix in matrices):
        lines.append(
            f"{where}.bits: format gptq with 3 bits is opened by GPTQModel; ONNX Runtime takes 2, 4 and 8 (for it, "
            "use bits: 4)"
        )
    if not all(matrix.symmetric for matrix in matrices):
        lines.append(
            f"{where}.symmetric: format gptq with zero points is opened by GPTQModel and ONNX Runtime; vLLM refuses it "
            "(for vLLM, use format: compressed-tensors)"
        )
    if model_type == "phi3":
        lines.append(
            f"{where}.format: GPTQModel does not open phi3 in format gptq; vLLM does (elsewhere, use format: "
            "compressed-tensors)"
        )
    return lines


def _joined(matrices: Sequence[Matrix], linears: Collection[str], where: str) -> list[str]:
    """What vLLM does not run, since it joins some linears."""
    schemes = {m.name: (m.bits, m.group_size, m.symmetric, m.rows, m.dtype, m.inputs) for m in matrices}
    rows = {matrix.name: matrix.shape[0] % matrix.rows for matrix in matrices if matrix.rows > 1}
    found = {}
    for parent, parts in product(dict.fromkeys(name.rpartition(".")[0] for name in linears), JOINED.values()):
        names = [name for part in parts if (name := f"{parent}.{part}") in linears]
        said = f"{where}: {_kind(parent)}: {' and '.join(parts)} "
        if len({schemes.get(name) for name in names}) > 1:
            found[said] = "are quantized differently; vLLM joins them and needs one scheme"
        elif any(rows.get(name) for name in names):
            found[said] = (
                "have rows that fill no whole block; vLLM joins them and needs that (use granularity: channel)"
            )
    return [f"{said}{why}; transformers opens them as they are" for said, why in found.items()]


def _kind(name: str) -> str:
    """A module's name with its numbers as `*`."""
    return re.sub(r"[.][0-9]+(?=[.]|$)", ".*", name)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
