"""What is said before a run of programs that won't open its result: one line each, with the remedy."""

from dataclasses import replace

import pytest

from compress.formats.openers import per_head_cache, refusals
from compress.stages.quantize.plan import Matrix

KINDS = [*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))]
LINEARS = [f"model.layers.{index}.{kind}" for index in range(2) for kind in KINDS]
WEIGHTS = [Matrix(name, (256, 256), 4, 64, True) for name in LINEARS]
EMBEDDINGS, HEAD = "model.embed_tokens", "lm_head"


def all_with(**changes: object) -> list[Matrix]:
    return [replace(matrix, **changes) for matrix in WEIGHTS]  # type: ignore[arg-type]


def said(layout: str, matrices: list[Matrix], model_type: str = "llama") -> list[str]:
    return refusals(layout, matrices, LINEARS, EMBEDDINGS, model_type, "stages.0")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3"])
@pytest.mark.parametrize("layout", ["pack-quantized", "int-quantized", "float-quantized", "gptq", "torchao"])
def test_what_all_open_is_not_talked_about(layout: str, model_type: str) -> None:
    if (layout, model_type) == ("gptq", "phi3"):
        return
    assert said(layout, WEIGHTS, model_type) == []
    head = Matrix(HEAD, (256, 256), 4, 64, True)
    assert said(layout, [*WEIGHTS, head], model_type) == []
    assert said("pack-quantized", WEIGHTS[7:], model_type) == []  # a whole layer left out


CASES: dict[str, tuple[str, list[Matrix], str]] = {
    "3 bits": (
        "pack-quantized", all_with(bits=3),
        "stages.0.bits: vLLM opens weights of 4 and 8 bits, some here have 3; transformers opens them (for vLLM, use "
        "bits: 4)",
    ),
    "8 bits": (
        "pack-quantized", all_with(bits=8),
        "stages.0.bits: vLLM opens 8-bit weights with 16-bit inputs on a GPU and not on a CPU; transformers opens them "
        "(for vLLM on a CPU, use method: dynamic)",
    ),
    "embeddings": (
        "pack-quantized", [*WEIGHTS, Matrix(EMBEDDINGS, (256, 256), 4, 64, True)],
        "stages.0.embeddings: vLLM does not open quantized embeddings; transformers does (for vLLM, use embeddings: "
        "false)",
    ),
    "gptq, a layer left out": (
        "gptq", WEIGHTS[7:],
        "stages.0.ignore: format gptq without model.layers.*.mlp.down_proj, model.layers.*.mlp.gate_proj, "
        "model.layers.*.mlp.up_proj and 4 more is opened by GPTQModel and vLLM; optimum and ONNX Runtime fail on it "
        "(for them, ignore no layers)",
    ),
    "gptq, whole rows": (
        "gptq", all_with(group_size=-1),
        "stages.0.group_size: format gptq with group_size -1 is opened by GPTQModel and vLLM; optimum and ONNX Runtime "
        "fail on it (for them, use 128)",
    ),
    "gptq, 3 bits": (
        "gptq", all_with(bits=3),
        "stages.0.bits: format gptq with 3 bits is opened by GPTQModel; ONNX Runtime takes 2, 4 and 8 (for it, use "
        "bits: 4)",
    ),
    "gptq, zero points": (
        "gptq", all_with(symmetric=False),
        "stages.0.symmetric: format gptq with zero points is opened by GPTQModel and ONNX Runtime; vLLM refuses it "
        "(for vLLM, use format: compressed-tensors)",
    ),
    "fp8, static": (
        "float-quantized", all_with(bits=8, dtype="fp", inputs="static", group_size=-1),
        "stages.0.granularity: static fp8 with a scale per channel fails in vLLM where it has no kernel for it (its "
        "torch fallback, as on a CPU); there, use method: dynamic",
    ),
    "joined in two schemes": (
        "int-quantized", [*WEIGHTS[:6], replace(WEIGHTS[5], inputs="static"), *WEIGHTS[6:]],
        "stages.0: model.layers.*.mlp: gate_proj and up_proj are quantized differently; vLLM joins them and needs one "
        "scheme; transformers opens them as they are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_the_program_and_the_remedy(case: str) -> None:
    layout, matrices, line = CASES[case]
    assert said(layout, matrices) == [line]


def test_phi3_in_gptq() -> None:
    assert said("gptq", WEIGHTS, "phi3") == [
        "stages.0.format: GPTQModel does not open phi3 in format gptq; vLLM does (elsewhere, use format: "
        "compressed-tensors)"
    ]


def test_a_cache_with_scales_per_head() -> None:
    """As tests/clients saw: vLLM 0.32 on a CPU opens it, and its log-probabilities are others."""
    assert per_head_cache("stages.0") == [
        "stages.0.kv_cache: vLLM's CPU build opens a checkpoint with fp8_per_head and is further off than rounding "
        "explains; vLLM takes scales per head with Flash Attention only (for any other, use kv_cache: fp8)"
    ]


@pytest.mark.parametrize("inputs", ["dynamic", "static"])
def test_fp8_that_vllm_has_kernels_for(inputs: str) -> None:
    matrices = all_with(bits=8, dtype="fp", inputs=inputs, group_size=-1, rows=-1)
    assert said("float-quantized", matrices) == []
