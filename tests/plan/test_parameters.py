"""Parameters counted from a config alone, against the counts that the models' pages publish."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.footprint.precisions import PRECISIONS, Weights, weights_of
from compress.footprint.subject import open_subject

CONFIGS = Path(__file__).parent / "configs"
# As the hub shows them for the safetensors in 16 bits. DeepSeek-V3's is its main model's, without the MTP module.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "deepseek-llm-7b": 6_910_365_696,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_419_200,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "r1-distill-qwen-1.5b": 1_777_088_000,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 4_300_079_472,
    "mistral-7b-v0.1": 7_241_732_096,
}
ROUNDED = {"deepseek-llm-67b": 67.4e9, "deepseek-coder-33b": 33.3e9}
# What their authors say that a token is computed with; some leave the embeddings out.
ACTIVE = {"deepseek-v2": 21e9, "deepseek-v3": 37e9, "qwen3-30b-a3b": 3.3e9}
BF16 = next(precision for precision in PRECISIONS if precision.name == "bf16")


def test_all_configs_are_counted() -> None:
    assert {file.stem for file in CONFIGS.glob("*.json")} == PUBLISHED.keys() | ROUNDED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones(name: str) -> None:
    subject = open_subject(str(CONFIGS / f"{name}.json"))
    weights = weights_of(subject, BF16)
    assert isinstance(weights, Weights)
    assert (subject.parameters, weights.bytes) == (PUBLISHED[name], 2 * PUBLISHED[name])


def test_rounded_counts() -> None:
    for name, count in ROUNDED.items():
        assert open_subject(str(CONFIGS / f"{name}.json")).parameters == pytest.approx(count, rel=2e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_active_parameters(name: str) -> None:
    subject = open_subject(str(CONFIGS / f"{name}.json"))
    if name in ACTIVE:
        assert subject.active == pytest.approx(ACTIVE[name], rel=0.025)
    elif not subject.experts:
        assert subject.active == subject.parameters


def test_a_quantized_model_is_planned_from_16_bits() -> None:
    subject = open_subject(str(CONFIGS / "deepseek-v3.json"))
    assert any("stored quantized (fp8)" in note for note in subject.notes)
    assert subject.refused == "it is quantized already (fp8)"
    assert "quantization_config" in json.loads((CONFIGS / "deepseek-v3.json").read_text())


def test_a_multimodal_model_keeps_its_other_parts_in_16_bits() -> None:
    subject = open_subject(str(CONFIGS / "gemma-3-4b.json"))
    linears = subject.modules.linears
    assert len(linears) == 34 * 7 and all(name.startswith("model.layers.") for name in linears)
    assert any("multimodal" in note for note in subject.notes)


def test_a_multimodal_model_by_its_headers(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    by_headers, by_config = open_subject(str(tmp_path)), open_subject(str(tmp_path / "config.json"))
    assert by_headers.told == "headers" and by_headers.parameters == by_config.parameters
    assert by_headers.modules == by_config.modules and len(by_headers.modules.linears) == 3 * 7
    sizes = [weights_of(each, precision) for each in (by_headers, by_config) for precision in PRECISIONS[:5]]
    assert all(isinstance(each, Weights) for each in sizes)
    assert [w.bytes for w in sizes[:5]] == [w.bytes for w in sizes[5:]]  # type: ignore[union-attr]
