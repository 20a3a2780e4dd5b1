"""How long sequences are where a recipe does not say: 2048 tokens, or as many as the model has positions."""

import json
from pathlib import Path
from typing import Any

import pytest
from command import invoke
from small_model import write_model

from compress.data.calibration import load_windows
from compress.errors import ModelError
from compress.model.checkpoint import Checkpoint
from compress.model.tokenizer import load_tokenizer
from compress.recipe.lengths import fitted_calibration, fitting_length, shortened
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe, json_schema
from compress.recipe.text import CalibrationSpec
from compress.runs.plan import plan_run


def recipe(**more: Any) -> Recipe:
    stage = {"kind": "quantize", "group_size": 32}
    return Recipe.model_validate({"name": "r", "model": "m", "output": "out", "stages": [stage]} | more)


def size(calibration: object, positions: int | None) -> tuple[int, int]:
    more = {} if calibration is None else {"calibration": calibration}
    spec = fitted_calibration(recipe(**more), positions)
    assert spec.sequence_length == spec.length
    return spec.samples, spec.length


@pytest.mark.parametrize(("positions", "length"), [(None, 2048), (131072, 2048), (2048, 2048), (1024, 1024), (64, 64)])
def test_what_is_not_named_fits_the_model(positions: int | None, length: int) -> None:
    assert fitting_length(positions) == length
    for unnamed in (None, "general_en", {"source": "t.txt"}):
        samples, found = size(unnamed, positions)
        assert (found, samples * found) == (length, 128 * 2048)
    assert size({"source": "t.txt", "samples": 5}, positions) == (5, length)
    assert size("general_en_small", positions) == ((32, 512) if length >= 512 else (256, 64))


def test_what_is_named_stays(tmp_path: Path) -> None:
    assert size({"source": "t.txt", "sequence_length": 2048}, 1024) == (128, 2048)
    spec = tmp_path / "spec.yaml"
    (tmp_path / "t.txt").touch()
    spec.write_text("source: t.txt\nsamples: 7\nsequence_length: 2048\n")
    assert size(str(spec), 1024) == (7, 2048)
    spec.write_text("source: t.txt\nsamples: 7\n")
    assert size(str(spec), 1024) == (7, 1024)


def test_more_sequences_make_up_for_a_length_that_does_not_divide() -> None:
    assert size(None, 1000) == (263, 1000)  # 262.144


def test_a_sample_count_alone_leaves_the_length_open(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: org/m\noutput: out\nstages: [{kind: quantize}]\ncalibration: general_en\n"
    )
    loaded = load_recipe(str(tmp_path / "r.yaml"), overrides=["calibration.samples=32"])
    spec = fitted_calibration(loaded, 1024)
    assert (spec.samples, spec.length) == (32, 1024)


def test_a_recipe_without_lengths_runs_on_a_model_of_few_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(Path("model"), max_position_embeddings=64)
    Path("text.txt").write_text("The old library stood at the corner of two quiet streets. " * 40)
    written = {
        "name": "r", "model": "model", "output": "out", "calibration": {"source": "text.txt", "samples": 4},
        "stages": [{"kind": "quantize", "group_size": 32, "format": "gptq"}],
        "evaluate": {"text": "text.txt", "windows": 2, "prompts": []},
    }  # fmt: skip
    Path("r.yaml").write_text(json.dumps(written))
    line = (
        "evaluate: windows have 64 tokens and not 2048, since the model has 64 positions; figures of two lengths are "
        "never comparable"
    )
    validated, done = invoke("validate", "r.yaml"), invoke("run", "r.yaml", "--device", "cpu")
    assert (validated.exit_code, done.exit_code) == (0, 0), done.stderr
    assert f"warning: {line}\n" in validated.stderr
    report = json.loads(Path("out/report.json").read_text())
    assert line in report["warnings"]
    assert report["quality"]["protocol"].startswith("2 windows of 64 tokens from text.txt")
    assert (report["calibration"]["sequences"], report["calibration"]["sequence_length"]) == (4, 64)
    compared = invoke("eval", "model", "out", "--text", "text.txt", "--windows", 2, "--device", "cpu")
    assert json.loads(compared.stdout)["perplexity"] == report["quality"]["perplexity"]


def test_only_what_was_shortened_is_said() -> None:
    assert shortened(recipe(), 2048) == shortened(recipe(), None) == []
    assert shortened(recipe(evaluate=False), 64) == shortened(recipe(evaluate={"sequence_length": 32}), 64) == []


def test_a_named_length_beyond_the_positions_is_still_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", max_position_embeddings=64)
    with pytest.raises(ModelError, match=r"^calibration\.sequence_length: 65 is more than the model's 64 positions"):
        plan_run(recipe(model=str(folder), calibration={"source": "t.txt", "sequence_length": 65}), folder)
    with pytest.raises(ModelError, match=r"^evaluate\.sequence_length: 80 is more than the model's 64 positions"):
        plan_run(recipe(model=str(folder), evaluate={"sequence_length": 80}), folder)
    planned = plan_run(recipe(model=str(folder)), folder)
    assert planned.windows == 64


@pytest.mark.parametrize("spelling", ["licence", "license"])
def test_either_spelling_of_a_licence_is_taken(tmp_path: Path, spelling: str) -> None:
    write_model(tmp_path / "model")
    (tmp_path / "t.txt").write_text("The old library stood at the corner of two quiet streets. " * 4)
    (tmp_path / "s.yaml").write_text(f"source: t.txt\n{spelling}: CC0\n")
    tokenizer = load_tokenizer(Checkpoint(tmp_path / "model").folder, False)
    assert load_windows(str(tmp_path / "s.yaml"), tokenizer, sequence_length=8, windows=1).licence == "CC0"
    assert CalibrationSpec(source="t.txt", licence="CC0", license="CC0").licence == "CC0"
    assert spelling in json_schema()["$defs"]["CalibrationSpec"]["properties"]
