"""What every test shares: an offline environment, set before any library reads it, and a small trained model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished import FinishedRun

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# Two threads wherever the tests run: small matrices gain nothing from more, and sums are split the same way.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# ... that sleep while they wait for each other. Those that spin take the processor from whom they wait for where others
# are at work too, as in `make test`: once, on two busy cores, four times the processor time and twice the clock's.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FINISHED_RECIPE = """\
name: finished
model: org/replaced-by-model
calibration: general_en_small
stages:
  - {kind: quantize, bits: 3, group_size: 64, overrides: {"*.down_proj": {bits: 8}}}
evaluate: {text: wikitext2, sequence_length: 128, windows: 4, prompts: ["The library"]}
output: replaced-by-output
"""


@pytest.fixture(scope="session", autouse=True)
def _stock_here() -> Iterator[None]:
    """Every run compares its base and its result with stock transformers; tests ask it in their own process."""
    with pytest.MonkeyPatch.context() as patch:
        from stock_here import asked_here  # here, so that the environment is set before anything is imported

        patch.setattr("compress.evaluation.base.asked", asked_here)
        patch.setattr("compress.evaluation.verify.asked", asked_here)
        yield


@pytest.fixture(scope="module")
def stock_process() -> Iterator[None]:
    """Results are opened by stock transformers in a process of its own, as users' are."""
    with pytest.MonkeyPatch.context() as patch:
        from compress.evaluation import stock  # likewise

        patch.setattr("compress.evaluation.verify.asked", stock.asked)
        yield


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """A trained Llama of 6M parameters in bfloat16: hidden 256, 6 layers, tied embeddings. To change it, copy it."""
    return Path(__file__).parent / "models" / "tiny-wiki-llama"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> FinishedRun:
    """The tiny model quantized, verified and evaluated by the command. To change something, copy it."""
    from command import invoke  # here, so that the environment is set before anything is imported

    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(FINISHED_RECIPE)
    output, work = folder / "result", folder / "work"
    arguments = ["run", str(folder / "recipe.yaml"), "--model", str(tiny_model), "--device", "cpu"]
    arguments += ["--output", str(output), "--work-dir", str(work), "--set", "stages.0.bits=4"]
    arguments += ["--set", "calibration.samples=8", "--set", "calibration.sequence_length=128"]
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    return FinishedRun(arguments, output, work, report, result.stdout, result.stderr)
