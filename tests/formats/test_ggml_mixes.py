"""Types of the mixes, against those that llama.cpp's own quantizer gave (recorded by support/record_mixes.py)."""

import json
from itertools import chain, repeat
from pathlib import Path
from typing import Any, get_args

import pytest
from gguf import LlamaFileType

from compress.formats.ggml_mixes import F16, MIXES, Model, Role, tensor_type
from compress.model.gguf.block_types import BLOCK_TYPES

CASES = [json.loads(line) for line in (Path(__file__).parent / "llama_mixes.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['mix']}-{'-'.join(map(str, case['model']))}")
def test_types_are_those_of_llama(case: dict[str, Any]) -> None:
    layers, heads, shared, tied, hidden, inner = case["model"]
    model = Model(layers, heads, shared, tied)
    for role, runs in case["types"].items():
        wanted = list(chain.from_iterable(repeat(kind, count) for kind, count in runs))
        columns = inner if role == "down" else hidden
        assert [tensor_type(case["mix"], role, columns, model, n)[0] for n in range(len(wanted))] == wanted, role


def test_every_mix_and_role_was_recorded() -> None:
    assert {case["mix"] for case in CASES} == set(MIXES)
    assert {role for case in CASES for role in case["types"]} == set(get_args(Role)) - {"qkv"}


@pytest.mark.parametrize("mix", MIXES)
def test_file_types_are_those_of_gguf(mix: str) -> None:
    assert LlamaFileType(MIXES[mix].number).name == f"MOSTLY_{mix.upper()}"


def test_a_width_that_does_not_fit_is_said() -> None:
    model = Model(layers=9, heads=4, key_value_heads=1, tied=False)
    assert tensor_type("q4_k_m", "gate", 512, model) == ("q4_k", False)
    assert tensor_type("q4_k_m", "gate", 576, model) == ("q5_0", True)
    assert tensor_type("q4_k_m", "gate", 50, model) == (F16, True)
    assert tensor_type("q4_k_m", "head", 512, model) == ("q6_k", False)
    assert tensor_type("q4_k_m", "head", 576, model) == ("q8_0", True)
    assert tensor_type("q8_0", "head", 576, model) == ("q8_0", False)


def test_fused_projections_are_stored_as_values_are() -> None:
    model = Model(layers=32, heads=32, key_value_heads=8, tied=False)
    for mix in MIXES:
        for layer in (0, 3, 5, 31):
            assert tensor_type(mix, "qkv", 512, model, layer) == tensor_type(mix, "v", 512, model, layer)


def test_no_type_is_unknown() -> None:
    used = {kind for case in CASES for runs in case["types"].values() for kind, _ in runs}
    assert used - {F16} == set(BLOCK_TYPES)
