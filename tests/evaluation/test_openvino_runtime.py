"""What is made of OpenVINO's answers; a stand-in gives them. tests/clients has the real one."""

import json
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_models import load_stock, make_model

from compress.evaluation.odd_tokens import odd_tokens
from compress.evaluation.openvino_runtime import PROGRAM, check_in_openvino
from compress.evaluation.other_program import Timing
from compress.evaluation.verify import Check, probe_tokens
from compress.system.programs import Engine, find_program

PACE = {
    "prefill_tokens_per_second": 100.0, "decode_tokens_per_second": 10.0, "loaded_bytes": 5, "peak_bytes": 6,
    "waited": 0.0,
}  # fmt: skip
OPTIONS = {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "f16"}
NEW = 16
# Answers each request with that of its precision, the logits where they are asked for, and keeps the request.
_SCRIPT = """#!/bin/sh
exec {python} -S -c '
import json, shutil, sys
from pathlib import Path
here, request = Path("{here}"), json.loads(Path(sys.argv[1]).read_text())
name = "exact" if request["exact"] else "chosen"
(here / (name + "-request.json")).write_text(json.dumps(request))
shutil.copy(here / (name + ".npy"), request["logits"])
shutil.copy(here / (name + ".json"), sys.argv[2])
' "$2" "$3"
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("openvino") / "model", dtype=torch.float32)


@pytest.fixture(scope="module")
def answer(model: Path) -> dict[str, Any]:
    """What stock transformers says."""
    stock, tokens = load_stock(model, torch.float32), probe_tokens(model, False).tolist()
    prompt = len(tokens)
    with torch.no_grad():
        for _ in range(NEW):
            tokens.append(int(stock(torch.tensor([tokens])).logits[0, -1].argmax()))
        logits = stock(torch.tensor([tokens[:prompt]])).logits[0]
    return {
        "version": "2026.4.1", "codes": {"model.layers.0.mlp.up_proj": ["c", "s", ""]}, "options": OPTIONS,
        "ids": list(odd_tokens(model, False)[0].values()), "pace": PACE, "continuation": tokens[prompt:],
        "logits": logits.numpy(),
    }  # fmt: skip


def checks(
    tmp_path: Path, folder: Path, exact: Mapping[str, Any], chosen: Mapping[str, Any] | None = None, **more: Any
) -> dict[str, Check]:
    for name, answer in (("exact", exact), ("chosen", chosen or exact)):
        kept = {key: value for key, value in answer.items() if key != "logits"}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))
        np.save(tmp_path / f"{name}.npy", answer.get("logits", np.zeros(0)))
    python = tmp_path / "python"
    python.write_text(_SCRIPT.format(python=sys.executable, here=tmp_path))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    made = {"matrices": 1, "other": lambda found: [] if found else ["all"], "timing": Timing()} | more
    found, pace = check_in_openvino(folder, tmp_path, Engine(python, "2026.4.1"), **made)
    assert pace is None or pace.model_dump() == PACE
    return {each.name: each for each in found}


def test_what_stock_transformers_would_say_passes(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found = checks(tmp_path, model, answer)
    assert [each.passed for each in found.values()] == [True, True, True, True]
    assert found["codes"].detail == "all 1 matrices, scales and zero points too, as in the checkpoint"
    assert found["tokens"].detail.startswith("the same in ")
    assert found["openvino"].detail.endswith("of 16 tokens it goes on with, the first 16 are ours")
    exact, chosen = (json.loads((tmp_path / f"{name}-request.json").read_text()) for name in ("exact", "chosen"))
    assert exact["folder"] == chosen["folder"] == str(tmp_path) and exact["tokens"] == chosen["tokens"]
    assert exact["timing"] is None and chosen["timing"]["rounds"] == 3


def test_other_numbers_fail(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    noise = torch.randn(answer["logits"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    assert checks(tmp_path, model, answer | {"logits": answer["logits"] + 1e-4 * noise})["openvino"].passed
    wrong = checks(tmp_path, model, answer | {"logits": answer["logits"] + 1e-2 * noise})["openvino"]
    assert wrong.passed is False and "(allowed 0.001)" in wrong.detail
    assert checks(tmp_path, model, answer | {"logits": answer["logits"] * np.nan})["openvino"].passed is False


def test_what_the_machine_rounds_may_be_further_off(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    noise = torch.randn(answer["logits"].shape, generator=torch.Generator().manual_seed(0)).numpy()
    found = checks(tmp_path, model, answer, answer | {"logits": answer["logits"] + 2e-2 * noise})
    assert found["openvino"].passed and found["as it runs here"].passed
    said = (
        "with what it chooses on this machine (INFERENCE_PRECISION_HINT bf16, KV_CACHE_PRECISION f16) they differ by "
    )
    assert found["as it runs here"].detail.startswith(said)
    for wrong in (noise, np.nan):
        broken = checks(tmp_path, model, answer, answer | {"logits": answer["logits"] + wrong})
        assert broken["openvino"].passed and broken["as it runs here"].passed is False


def test_other_codes_fail(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found = checks(tmp_path, model, answer, matrices=3, other=lambda codes: [*codes, "b"])["codes"]
    assert found.passed is False and found.detail == (
        "2 of 3 matrices are not the checkpoint's, first model.layers.0.mlp.up_proj"
    )
    assert "codes" not in checks(tmp_path, model, answer, matrices=0)


def test_a_few_odd_texts_are_borne_and_many_are_not(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    for wrong, passed in ((1, None), (10, None), (11, False)):
        ids = [[*row[:-1], row[-1] + 1] if place < wrong else row for place, row in enumerate(answer["ids"])]
        found = checks(tmp_path, model, answer | {"ids": ids}, timing=None)["tokens"]
        assert found.passed is passed and found.detail.startswith(f"others in {wrong} of ")
        assert found.detail.endswith("it takes ids)")


def test_what_it_said_is_quoted(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    failure = {"failure": "RuntimeError: no such file"}
    found = checks(tmp_path, model, failure)
    assert list(found) == ["openvino"] and found["openvino"].passed is False
    assert found["openvino"].detail == "OpenVINO 2026.4.1 does not open it: RuntimeError: no such file"
    later = checks(tmp_path, model, answer, failure)["as it runs here"]
    assert later.passed is False and later.detail == "OpenVINO 2026.4.1 does not run it: RuntimeError: no such file"


def test_an_environment_needs_what_makes_models_too(tmp_path: Path) -> None:
    """The client prints no version where some of it is missing."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    others = ["torch", "transformers", "optimum-intel", "openvino-tokenizers", "openvino-genai"]
    for number, package in enumerate([*others, "openvino"]):
        found = find_program(PROGRAM, str(python))
        assert isinstance(found, str) and f"{python}: has no OpenVINO; name the Python" in found
        info = tmp_path / f"{package.replace('-', '_')}-{number}.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {number}.0\n")
    beside = tuple(f"{package} {number}.0" for number, package in enumerate(others))
    assert find_program(PROGRAM, str(python)) == Engine(python, "5.0", beside)
