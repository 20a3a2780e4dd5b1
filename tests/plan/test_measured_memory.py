"""Weights, cache and activations together, against what a process of stock transformers takes on this CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from compress.footprint.activations import FORWARD, activation_bytes
from compress.footprint.cache import cache_of
from compress.footprint.precisions import PRECISIONS, Weights, weights_of
from compress.footprint.subject import open_subject

BF16 = next(precision for precision in PRECISIONS if precision.name == "bf16")
TOKENS = 1024
MODELS = {
    "qwen2": {"vocab_size": 24000, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6,
              "num_attention_heads": 16, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama": {"vocab_size": 64000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6,
              "num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.parametrize("family", MODELS)
def test_the_total_is_what_a_process_takes(family: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(family, **MODELS[family], max_position_embeddings=4096)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    subject = open_subject(str(tmp_path))
    weights = weights_of(subject, BF16)
    assert isinstance(weights, Weights)
    said = weights.bytes + cache_of(subject.config, family).bytes(TOKENS)
    said += activation_bytes(
        subject.config, TOKENS, TOKENS, FORWARD
    )  # a plain forward pass gives logits of every token
    script = Path(__file__).with_name("measured_memory.py")
    returned = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}  # what is free again is no longer resident
    command = [sys.executable, script, tmp_path, str(TOKENS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, env=returned)
    measured = json.loads(done.stdout.splitlines()[-1])
    print(f"{family}: said {said / 1e6:.1f} MB, measured {measured / 1e6:.1f} MB, {said / measured - 1:+.1%}")
    assert said == pytest.approx(measured, rel=0.15)
