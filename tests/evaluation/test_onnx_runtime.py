"""What is made of ONNX Runtime GenAI's answers; a stand-in gives them. tests/clients has the real one."""

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_files import quantized
from random_models import load_stock, make_model

from compress.evaluation.odd_tokens import odd_tokens
from compress.evaluation.onnx_runtime import PROGRAM, Timing, check_in_onnx_runtime
from compress.evaluation.verify import Check, probe_tokens
from compress.system.programs import Engine, find_program

PACE = {
    "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0, "loaded_bytes": 5, "peak_bytes": 6,
    "waited": 0.0,
}  # fmt: skip
NEW = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("onnx") / "model", intermediate_size=128, dtype=torch.float32)


@pytest.fixture(scope="module")
def answer(model: Path) -> dict[str, Any]:
    """What stock transformers says."""
    stock, tokens = load_stock(model, torch.float32), probe_tokens(model, False).tolist()
    prompt = len(tokens)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(stock(torch.tensor([tokens])).logits[0, -1].argmax()))
        logits = stock(torch.tensor([tokens[:prompt]])).logits[0]
    row = {"name": "/model/layers.0/mlp/up_proj/MatMulNBits", "codes": "c", "scales": "s", "zeros": "z"}
    return {
        "version": "0.18.0", "codes": [row], "ids": list(odd_tokens(model, False)[0].values()), "pace": PACE,
        "continuation": tokens[prompt:], "logits": logits.numpy(),
    }  # fmt: skip


def engine(tmp_path: Path, answer: Mapping[str, Any]) -> Engine:
    """An environment that always gives this answer, with the logits where they are asked for, and keeps the request."""
    python, kept = tmp_path / "python", {name: value for name, value in answer.items() if name != "logits"}
    (tmp_path / "answer.json").write_text(json.dumps(kept))
    np.save(tmp_path / "logits.npy", answer.get("logits", np.zeros(0)))
    python.write_text(
        f'#!/bin/sh\ncp "$2" {tmp_path}/request.json; cp {tmp_path}/answer.json "$3"\n'
        f"""cp {tmp_path}/logits.npy "$(sed 's/.*"logits": "\\([^"]*\\)".*/\\1/' "$2")"\n"""
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Engine(python, "0.18.0")


def checks(tmp_path: Path, folder: Path, answer: Mapping[str, Any], **more: Any) -> dict[str, Check]:
    made = {"matrices": 1, "other": lambda nodes: [] if nodes else ["all"]} | more
    found, pace = check_in_onnx_runtime(folder, tmp_path, engine(tmp_path, answer), timing=Timing(), **made)
    assert pace is None or pace.model_dump() == PACE
    return {each.name: each for each in found}


def test_what_stock_transformers_would_say_passes(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found = checks(tmp_path, model, answer)
    assert [each.passed for each in found.values()] == [True, True, True]
    assert found["codes"].detail == "all 1 matrices, scales and zero points too, as in the checkpoint"
    assert found["tokens"].detail.startswith("the same in ")
    assert found["onnx runtime"].detail.endswith("of 16 tokens it goes on with, the first 16 are ours")
    request = json.loads((tmp_path / "request.json").read_text())
    assert request["folder"] == str(tmp_path) and request["timing"]["rounds"] == 3


def test_other_numbers_fail(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    noise = torch.randn(answer["logits"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    assert checks(tmp_path, model, answer | {"logits": answer["logits"] + 1e-4 * noise})["onnx runtime"].passed
    wrong = checks(tmp_path, model, answer | {"logits": answer["logits"] + 1e-2 * noise})["onnx runtime"]
    assert wrong.passed is False and "(allowed 0.001)" in wrong.detail
    assert checks(tmp_path, model, answer | {"logits": answer["logits"] * np.nan})["onnx runtime"].passed is False


def test_inputs_in_8_bits_may_be_further_off(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    noise = torch.randn(answer["logits"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    near = answer | {"logits": answer["logits"] + 2e-2 * noise}
    assert checks(tmp_path, model, near)["onnx runtime"].passed is False
    assert checks(tmp_path, model, near, int8_inputs=True)["onnx runtime"].passed
    far = answer | {"logits": answer["logits"] + noise}
    assert checks(tmp_path, model, far, int8_inputs=True)["onnx runtime"].passed is False


def test_other_codes_fail(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found = checks(tmp_path, model, answer, matrices=3, other=lambda nodes: [*nodes, "b"])["codes"]
    assert found.passed is False and found.detail == (
        "2 of 3 matrices are not the checkpoint's, first /model/layers.0/mlp/up_proj/MatMulNBits"
    )
    assert "codes" not in checks(tmp_path, model, answer, matrices=0)


def test_a_few_odd_texts_are_borne_and_many_are_not(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    for wrong, passed in ((1, None), (10, None), (11, False)):
        ids = [[*row[:-1], row[-1] + 1] if place < wrong else row for place, row in enumerate(answer["ids"])]
        found = checks(tmp_path, model, answer | {"ids": ids})["tokens"]
        assert found.passed is passed and found.detail.startswith(f"others in {wrong} of ")
        assert found.detail.endswith("it takes ids)")


def test_rounding_that_the_program_does_not_do_is_no_difference(tmp_path: Path, model: Path) -> None:
    """The checkpoint rounds the inputs of linears, ONNX Runtime does not."""
    folder = quantized(model, tmp_path / "work", method="dynamic")
    stock = load_stock(folder, torch.float32)
    for module in stock.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_scheme.input_activations = None
    tokens = probe_tokens(folder, False)
    with torch.no_grad():
        logits = stock(tokens[None]).logits[0].numpy()
    said = {"codes": [], "ids": list(odd_tokens(folder, False)[0].values()), "continuation": [], "pace": None}
    assert checks(tmp_path, folder, said | {"logits": logits}, matrices=0)["onnx runtime"].passed


@pytest.mark.parametrize("answer", [{"failure": "RuntimeError: no such file"}])
def test_what_it_said_is_quoted(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found = checks(tmp_path, model, answer)
    assert found["onnx runtime"].detail == "ONNX Runtime GenAI 0.18.0 does not open it: RuntimeError: no such file"
    assert found["onnx runtime"].passed is False


def test_an_environment_needs_the_builder_too(tmp_path: Path) -> None:
    """The client looks for what the builder imports, and prints no version where some of it is missing."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{find_python()}" -S "$@"\n')
    python.chmod(0o755)
    others = ["torch", "transformers", "onnx", "onnx_ir"]
    for number, package in enumerate([*others, "onnxruntime-genai"]):
        found = find_program(PROGRAM, str(python))
        assert isinstance(found, str) and f"{python}: has no ONNX Runtime GenAI; name the Python" in found
        installed(tmp_path, package, f"{number}.0")
    beside = tuple(f"{package} {number}.0" for number, package in enumerate(others))
    assert find_program(PROGRAM, str(python)) == Engine(python, "4.0", beside)
    installed(tmp_path, "onnxruntime", "7.0")
    assert find_program(PROGRAM, str(python)) == Engine(python, "4.0", (*beside, "onnxruntime 7.0"))


def installed(folder: Path, package: str, version: str) -> None:
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def find_python() -> str:
    import sys

    return sys.executable


@pytest.mark.parametrize("positions", [2, 16, 128, 289, 4096, None])
def test_what_is_timed_fits_the_model(positions: int | None) -> None:
    timing = Timing.within(positions)
    assert timing.prompt_tokens >= 1 and timing.new_tokens >= 1
    if positions is not None and positions > 2:
        assert timing.prompt_tokens + timing.new_tokens + 1 <= positions
    if positions is None or positions >= 289:
        assert timing == Timing()
