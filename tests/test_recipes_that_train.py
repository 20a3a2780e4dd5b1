"""Every bundled recipe that trains, run by its name on a model and a text that are small."""

from pathlib import Path

import pytest
import yaml
from command import invoke
from finished import FinishedRun

from compress.recipe.schema import bundled_dir
from compress.records import Report
from compress.stages import KINDS

TEXT = f"{{source: {bundled_dir('calibration') / 'text' / 'general_en.jsonl.gz'}, sequence_length: 64}}"
TRAINING = {"tokens": "1k", "batch_size": "4", "held_out": "4", "data": TEXT}
SHAPE = (
    "{num_hidden_layers: 4, hidden_size: 192, num_attention_heads: 6, num_key_value_heads: 3, intermediate_size: 512}"
)
# What is small beside the training itself, and which stages come out.
RECIPES = {
    "8b_prune_35": ({}, ["prune", "finetune"]),
    "8b_to_1.3b_distill": ({"stages.0.shape": SHAPE}, ["prune", "distill"]),
    "8b_edge": ({"stages.1.type": "q4_0", "stages.0.target.sparsity": "0.2"}, ["prune", "finetune", "quantize"]),
    "8b_edge_chain": ({"stages.2.group_size": "64"}, ["prune", "finetune", "distill", "quantize"]),
    "smollm2_edge_chain": (
        {"stages.0.shape.intermediate_size": "512"}, ["prune", "finetune", "distill", "quantize"]
    ),
}  # fmt: skip


def trained(stage: dict[str, object], place: str) -> dict[str, str]:
    """Overrides that make a stage's training small."""
    where = f"{place}.heal" if "heal" in stage else place
    return {f"{where}.{key}": value for key, value in TRAINING.items()}


def test_all_are_run_here() -> None:
    texts = {path.stem: path.read_text() for path in bundled_dir("recipes").glob("*.yaml")}
    training = {
        name
        for name, text in texts.items()
        for stage in yaml.safe_load(text)["stages"]
        if stage["kind"] in ("finetune", "distill") or "heal" in stage
    }
    assert training == RECIPES.keys() and {"finetune", "distill"} <= KINDS.keys()


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(
    name: str, finished_run: FinishedRun, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load((bundled_dir("recipes") / f"{name}.yaml").read_text())
    smaller, stages = RECIPES[name]
    values = {"calibration.samples": "4", "calibration.sequence_length": "128"} | smaller
    values |= {"evaluate.sequence_length": "128", "evaluate.windows": "2", "evaluate.prompts": "[]"}
    for number, stage in enumerate(recipe["stages"]):
        if "heal" in stage or stage["kind"] == "distill":
            values |= trained(stage, f"stages.{number}")
    options = [option for key, value in values.items() for option in ("--set", f"{key}={value}")]
    result = invoke("run", name, "--model", tiny_model, "--work-dir", finished_run.work, *options)
    assert result.exit_code == 0, result.stderr
    report = Report.model_validate_json((tmp_path / recipe["output"] / "report.json").read_text())
    assert report.verified is not None and report.verified.passed and report.verified.max_logit_difference == 0
    assert [stage.kind for stage in report.stages] == stages
    for stage in report.stages:
        assert (stage.trained is not None) == (stage.kind in ("finetune", "distill"))
        assert stage.kl is not None and stage.perplexity is not None and stage.bytes and stage.parameters
    assert report.quality is not None and report.stages[-1].kl == report.quality.kl.mean
