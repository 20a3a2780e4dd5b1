"""A stage kind that the product does not know: two modules and a row, and all that surrounds stages works with it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from desk import RECIPE, TEXT
from random_models import load_stock, make_model
from with_scale import Commands

STAGE = "stages:\n  - kind: quantize\n    group_size: 32\n"


@pytest.fixture(scope="module")
def dscompress(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("printed"))
    yield commands
    commands.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", intermediate_size=128)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def write(folder: Path, *stages: str, **more: str) -> None:
    lines = "".join(f"  - {stage}\n" for stage in stages)
    text = RECIPE.replace(STAGE, f"stages:\n{lines}")
    assert text != RECIPE
    (folder / "recipe.yaml").write_text(text.replace("evaluate: false", more.get("evaluate", "evaluate: false")))


def test_it_runs_is_reported_and_found_again(folder: Path, dscompress: Commands) -> None:
    evaluate = "evaluate: {text: text.txt, sequence_length: 16, windows: 2, prompts: []}"
    write(folder, "{kind: scale, factor: 2}", evaluate=evaluate)
    ran = dscompress(folder, "run", "recipe.yaml", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    assert "warning: stages.0: only a toy" in ran.stderr and "KL divergence" in ran.stdout
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [stage["kind"] for stage in report["stages"]] == ["scale"]
    assert report["verified"]["passed"] and report["quality"]["kl"]["mean"] > 0
    assert report["compressed"]["format"] is None and report["compressed"]["quantized_bits_per_weight"] is None
    assert "scale" in (folder / "out" / "report.html").read_text()
    base, result = (load_stock(folder / name, torch.float32) for name in ("model", "out"))
    for layer in base.model.layers:
        layer.mlp.down_proj.weight.mul_(2)
    tokens = torch.arange(1, 17)[None]
    assert torch.equal(base(tokens).logits, result(tokens).logits)
    again = dscompress(folder, "run", "recipe.yaml", "--device", "cpu")
    assert again.returncode == 0 and "scale: finished before" in again.stderr


def test_the_stage_behind_it_is_planned_on_what_it_leaves(folder: Path, dscompress: Commands) -> None:
    write(folder, "{kind: scale, factor: 2, width: 96}", "{kind: quantize, group_size: 64}")
    for command in ("validate", "run"):
        refused = dscompress(folder, command, "recipe.yaml")
        assert refused.returncode == 2
        assert refused.stderr.splitlines()[-1] == (
            "error: stages.1.group_size: 64 does not divide the width 96 of model.layers.*.mlp.down_proj (2 layers); "
            "use -1 or 32"
        )
    write(folder, "{kind: scale, factor: 2, width: 96}", "{kind: quantize, group_size: 32}")
    planned = dscompress(folder, "run", "recipe.yaml", "--dry-run").stdout.splitlines()
    assert [line.split()[0] for line in planned] == [
        "model", "stage", "result", "disk", "time", "stage", "result", "memory", "disk", "time", "output",
    ]  # fmt: skip
    ran = dscompress(folder, "run", "recipe.yaml", "--device", "cpu")
    assert ran.returncode == 0, ran.stderr
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [stage["kind"] for stage in report["stages"]] == ["scale", "quantize"]
    base, result = report["base"]["parameters"], report["compressed"]["parameters"]
    assert base - result == 2 * 3 * 64 * (128 - 96)
    assert json.loads((folder / "out" / "config.json").read_text())["intermediate_size"] == 96


@pytest.mark.parametrize(
    ("stages", "lines"),
    [
        (["{kind: scale}"], ["recipe.yaml:7: stages.0.factor: is missing; add it. What down_proj is multiplied by."]),
        (
            ["{kind: scale, factor: 2, widht: 3}", "{kind: scal, factor: 2}"],
            [
                "recipe.yaml:7: stages.0.widht: unknown key; did you mean width?",
                "recipe.yaml:8: stages.1.kind: 'scal' is not allowed; use distill, finetune, prune, quantize or "
                "scale (did you mean scale?)",
            ],
        ),
        (
            ["{kind: quantize, bitz: 4}", "{kind: scale, factor: 2}"],
            ["recipe.yaml:7: stages.0.bitz: unknown key; did you mean bits?"],
        ),
        (
            ["{kind: quantize, group_size: 32}", "{kind: scale, factor: 2}"],
            ["recipe.yaml:6: stages: quantize comes once, as the last stage; remove or move the others"],
        ),
        (
            ["{kind: scale, factor: 2, width: 500}", "{kind: scale, factor: 2, width: 400}"],
            [
                "stages.0.width: 500 is more than the 128 channels; use fewer",
                "stages.1.width: 400 is more than the 128 channels; use fewer",
            ],
        ),
    ],
)
def test_it_is_refused_in_its_own_words(
    folder: Path, dscompress: Commands, stages: list[str], lines: list[str]
) -> None:
    write(folder, *stages)
    refused = dscompress(folder, "validate", "recipe.yaml")
    assert (refused.returncode, refused.stderr.splitlines()) == (2, [f"error: {line}" for line in lines])


def test_it_goes_on_where_it_was_killed(folder: Path, dscompress: Commands) -> None:
    write(folder, "{kind: scale, factor: 2, width: 96}")
    whole = dscompress(folder, "run", "recipe.yaml", "--device", "cpu", "--output", "whole", "--work-dir", "other")
    assert whole.returncode == 0, whole.stderr
    process = dscompress.begin(folder, "run", "recipe.yaml", "--device", "cpu")
    while not list(folder.glob(".dscompress/stages/*.part/layer-00000.safetensors")):
        os.kill(process, 0)  # it is there
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert dscompress.end().returncode == -signal.SIGKILL and not (folder / "out").exists()
    continued = dscompress(folder, "run", "recipe.yaml", "--device", "cpu")
    assert continued.returncode == 0, continued.stderr
    one, other = ((folder / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other
