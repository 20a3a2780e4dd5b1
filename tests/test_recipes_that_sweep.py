"""Every bundled recipe with a sweep, made by its name on a model and a text that are small."""

from pathlib import Path

import pytest
import yaml
from command import invoke
from random_models import two_wide_layers
from workers_here import Here

from compress.recipe.schema import bundled_dir
from compress.sweeps.prepare import read_sweep

TEXT = f"{{source: {bundled_dir('calibration') / 'text' / 'general_en.jsonl.gz'}, samples: 4, sequence_length: 64}}"
# What is smaller beside the text, and which points come out.
RECIPES = {
    "prune_sweep": (["stages.0.target.sparsity=0.1,0.2"], ["sparsity=0.1", "sparsity=0.2"]),
    "precision_matrix": ([], ["fp8", "int8", "int4", "int3"]),
    "bits_and_sparsity": ([], ["pruned_int4", "pruned_int8", "int4", "int3"]),
}


def test_all_are_run_here() -> None:
    sweeping = {
        path.stem for path in bundled_dir("recipes").glob("*.yaml") if "sweep" in yaml.safe_load(path.read_text())
    }
    assert sweeping == RECIPES.keys()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_wide_layers(tmp_path_factory.mktemp("models") / "small")


@pytest.mark.parametrize("name", RECIPES)
def test_it_runs(name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.sweeps.driver.LocalWorkers", Here)
    over, points = RECIPES[name]
    options = [f"calibration={TEXT}", "evaluate.sequence_length=64", "evaluate.windows=2", "evaluate.prompts=[]"]
    arguments = [each for option in options for each in ("--set", option)]
    arguments += [each for option in over for each in ("--over", option)]
    result = invoke("sweep", name, "--model", model, "--device", "cpu", *arguments)
    assert result.exit_code == 0, result.stderr
    sweep = read_sweep(tmp_path / "outputs" / name)
    assert sweep is not None
    assert [(point.name, point.status) for point in sweep.points] == [(point, "done") for point in points]
    assert all({"bytes", "kl", "perplexity"} <= point.figures.keys() for point in sweep.points)
    for suffix in ("html", "md", "png", "json"):
        assert (tmp_path / "outputs" / name / f"sweep.{suffix}").stat().st_size
