"""A run that is stopped at any moment continues, to the very bytes of a run that was not."""

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL
from typing import Any

import killable
import pytest
from command import invoke
from killable import Moment
from random_models import make_model
from safetensors import deserialize

from compress.recipe.schema import bundled_dir

# The gptq layout is verified in the run's own process; nothing of another process then outlives a kill.
RECIPE = """\
name: tiny
model: {model}
calibration: {{source: {text}, samples: 8, sequence_length: 64}}
evaluate: false
output: out
stages:
  - {{kind: quantize, group_size: 64, format: gptq}}
"""
RUN = ["run", "recipe.yaml", "--device", "cpu"]
KILLED = -int(SIGKILL)
KILLS = 10
_random = random.Random(2)
MOMENTS = [(kill + _random.random()) / KILLS for kill in range(KILLS)]  # shares of a run's time, one in every tenth


@dataclass(frozen=True)
class Whole:
    """A run that was not stopped: what it wrote, and how long it took."""

    output: Path
    seconds: float


def prepare(folder: Path, model: Path) -> Path:
    text = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model, text=text))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many layers, and little in each."""
    return make_model(tmp_path_factory.mktemp("models") / "six", num_hidden_layers=6, intermediate_size=128)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Whole:
    folder = prepare(tmp_path_factory.mktemp("whole"), model)
    assert killable.run(["--version"], folder).code == 0  # starts the server: the next one's time is a run's alone
    start = time.monotonic()
    ended = killable.run(RUN, folder)
    assert ended.code == 0, ended.printed
    return Whole(folder / "out", time.monotonic() - start)


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    return prepare(tmp_path, model)


def stage(folder: Path) -> dict[str, Any]:
    """The report's entry of the one stage."""
    (only,) = json.loads((folder / "out" / "report.json").read_text())["stages"]
    assert isinstance(only, dict)
    return only


def assert_same(output: Path, whole: Whole) -> None:
    """Every tensor's bytes, and every file that a loader reads; nothing half-written beside the output."""
    files = [(folder / "model.safetensors").read_bytes() for folder in (output, whole.output)]
    found, expected = (dict(deserialize(file)) for file in files)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if found[name] != tensor] == []  # dtype, shape and bytes
    assert files[0] == files[1]
    for name in ("config.json", "quantize_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (output / name).read_bytes() == (whole.output / name).read_bytes()
    assert {file.name for file in output.iterdir()} == {file.name for file in whole.output.iterdir()}
    assert {file.name for file in output.parent.iterdir()} == {".dscompress", "log.txt", "out", "recipe.yaml"}
    assert not list((output.parent / ".dscompress").rglob("*.part"))


def finish(folder: Path, whole: Whole) -> str:
    """Give the command again and compare; returns what it printed."""
    ended = killable.run(RUN, folder)
    assert ended.code == 0, ended.printed
    assert_same(folder / "out", whole)
    return ended.printed


@pytest.mark.parametrize("moment", MOMENTS, ids="{:.2f}".format)
def test_killed_at_a_random_moment(folder: Path, whole: Whole, moment: float) -> None:
    stopped = killable.Process(RUN, folder).end(kill_after=moment * whole.seconds)
    assert stopped.code in (KILLED, 0)  # 0: this run was faster than the first
    finish(folder, whole)


def test_killed_again_and_again(folder: Path, whole: Whole) -> None:
    moments = [
        Moment("os.rename", r"environment\.json\.tmp -> "),  # a stage is begun
        Moment("open", r"layer-00000\.tmp$"),  # a layer's file is written and not yet safe on disk
        Moment("os.rename", r"layer-00002\.tmp -> "),  # ... and without its name
        Moment("open", r"outer\.tmp$"),
        Moment("open", r"checkpoint/model\.safetensors$"),  # layers are merged
        Moment("open", r"layer-00003\.safetensors$", time=2),  # ... half of them
        Moment("os.rename", r"checkpoint/config\.json\.tmp -> "),
        Moment("os.rename", r"\.probe\.tmp -> .*/stages/"),
        Moment("os.rename", r"/checkpoint -> .*/stages/"),  # the stage gets its name
        Moment("shutil.rmtree", r"[0-9a-f]\.part$"),  # ... and its scraps are removed
        Moment("os.link", r"\.out\.part/model\.safetensors$"),  # the output is put together
        Moment("open", r"\.out\.part/.*report\.json"),
        Moment("os.rename", r"\.out\.part -> .*/out$"),  # ... and gets its name
    ]
    for moment in moments:
        ended = killable.run(RUN, folder, moment)
        assert ended.code == KILLED, (moment, ended.printed)
        assert not (folder / "out").exists()
    finish(folder, whole)


def test_finished_layers_are_not_computed_again(folder: Path, whole: Whole) -> None:
    process = killable.Process(RUN, folder, Moment("os.rename", r"layer-00004\.tmp -> "))
    assert process.end().code == KILLED
    (lock,) = (folder / ".dscompress" / "stages").glob("*.lock")
    assert lock.read_text().startswith(f"process {process.pid} since ")  # a dead process's lock is in nobody's way
    assert "continuing behind 4 finished layers" in finish(folder, whole)
    assert stage(folder)["resumed_layers"] == 4
    assert [layer["layer"] for layer in stage(folder)["layers"]] == [0, 1, 2, 3, 4, 5]


def test_a_finished_run_is_not_repeated_unless_asked(folder: Path, whole: Whole) -> None:
    assert "finished before" not in finish(folder, whole)
    first = stage(folder)
    assert (first["cached"], first["resumed_layers"]) == (False, 0)
    made = (folder / "out" / "model.safetensors").stat()
    printed = finish(folder, whole)
    assert "quantize: finished before" in printed
    assert "gptq 4-bit" not in printed
    assert stage(folder) == {**first, "cached": True}
    assert (folder / "out" / "model.safetensors").stat().st_ino == made.st_ino  # the same file, not only the same bytes
    fresh = killable.run([*RUN, "--fresh"], folder)
    assert (fresh.code, "gptq 4-bit: 6/6 layers" in fresh.printed) == (0, True)
    assert_same(folder / "out", whole)
    assert (stage(folder)["cached"], stage(folder)["resumed_layers"]) == (False, 0)


def test_fresh_does_not_continue(folder: Path, whole: Whole) -> None:
    assert killable.run(RUN, folder, Moment("os.rename", r"layer-00002\.tmp -> ")).code == KILLED
    ended = killable.run([*RUN, "--fresh"], folder)
    assert (ended.code, "continuing" in ended.printed) == (0, False)
    assert_same(folder / "out", whole)


def test_interrupted_says_how_to_continue(folder: Path, whole: Whole) -> None:
    ended = killable.run(RUN, folder, Moment("os.rename", r"layer-00002\.tmp -> ", SIGINT))
    assert ended.code == 130
    assert ended.printed.endswith("\ninterrupted; run the same command again to continue where it stopped\n")
    assert "Traceback" not in ended.printed
    assert "continuing behind" in finish(folder, whole)


def test_two_at_once(folder: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch) -> None:
    process = killable.Process(RUN, folder, Moment("os.rename", r"layer-00001\.tmp -> ", signal=None))
    assert process.pipe.recv() == "here"
    monkeypatch.chdir(folder)
    second = invoke(*RUN)
    assert second.exit_code == 2
    assert second.stderr.startswith(f"error: {folder}/out: being written by process {process.pid} since ")
    process.pipe.send("go on")
    assert process.end().code == 0
    assert_same(folder / "out", whole)


def test_killed_in_the_evaluation(folder: Path, whole: Whole) -> None:
    evaluated = [*RUN, "--set", "evaluate={sequence_length: 64, windows: 4}"]
    for moment in (
        Moment("os.rename", r"evaluations/\w+\.tmp -> "),  # the base's hidden states
        Moment("os.rename", r"evaluations/\w+\.json\.tmp -> "),  # the figures
    ):
        ended = killable.run(evaluated, folder, moment)
        assert ended.code == KILLED, (moment, ended.printed)
    assert killable.run(evaluated, folder).code == 0
    assert_same(folder / "out", whole)
    continued = json.loads((folder / "out" / "report.json").read_text())["quality"]
    assert killable.run([*evaluated, "--fresh", "--work-dir", "other"], folder).code == 0
    uninterrupted = json.loads((folder / "out" / "report.json").read_text())["quality"]
    assert continued == uninterrupted


def test_a_static_8_bit_run_continues(tmp_path: Path, model: Path) -> None:
    """Scales of inputs and of the cache, and folded norms, are taken up again."""
    stage = "{kind: quantize, method: static, dtype: fp8, smooth: 0.5, kv_cache: fp8}"
    written = []
    for name, moments in (("whole", []), ("killed", [r"layer-00002\.tmp$", r"layer-00004\.tmp$", r"outer\.tmp$"])):
        (tmp_path / name).mkdir()
        folder = prepare(tmp_path / name, model)
        recipe = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(recipe.replace("{kind: quantize, group_size: 64, format: gptq}", stage))
        for path in moments:
            assert killable.run(RUN, folder, Moment("open", path)).code == KILLED
        ended = killable.run(RUN, folder)
        assert ended.code == 0, ended.printed
        report = json.loads((folder / "out" / "report.json").read_text())
        assert report["verified"]["passed"] and report["stages"][0]["resumed_layers"] == (6 if moments else 0)
        written.append([(folder / "out" / file).read_bytes() for file in ("model.safetensors", "config.json")])
    assert written[0] == written[1]


def prepare_pruning(folder: Path, model: Path) -> Path:
    """The recipe with 64 of 128 channels left before it quantizes."""
    folder.mkdir()
    prepare(folder, model)
    recipe = (folder / "recipe.yaml").read_text()
    pruning = "stages:\n  - {kind: prune, shape: {intermediate_size: 64}, importance: greedy}\n"
    (folder / "recipe.yaml").write_text(recipe.replace("stages:\n", pruning))
    return folder


def test_pruning_and_quantizing_killed_again_and_again(tmp_path: Path, model: Path) -> None:
    uninterrupted = prepare_pruning(tmp_path / "whole", model)
    assert killable.run(RUN, uninterrupted).code == 0
    folder = prepare_pruning(tmp_path / "killed", model)
    moments = [
        Moment("os.rename", r"/scores/.*/layer-00002\.tmp -> "),  # channels of three layers are ranked
        Moment("os.rename", r"/stages/.*/layer-00001\.tmp -> "),  # one layer is pruned
        Moment("open", r"/stages/.*/outer\.tmp$"),
        Moment("os.rename", r"/checkpoint -> .*/stages/"),  # the pruned model gets its name
        Moment("os.rename", r"/stages/.*/layer-00003\.tmp -> "),  # three layers are quantized
        Moment("os.rename", r"\.out\.part -> .*/out$"),
    ]
    for moment in moments:
        ended = killable.run(RUN, folder, moment)
        assert ended.code == KILLED, (moment, ended.printed)
        assert not (folder / "out").exists()
    finish(folder, Whole(uninterrupted / "out", 0))
    report = json.loads((folder / "out" / "report.json").read_text())
    assert [(stage["kind"], stage["resumed_layers"]) for stage in report["stages"]] == [("prune", 6), ("quantize", 3)]
    assert json.loads((folder / "out" / "config.json").read_text())["intermediate_size"] == 64


def test_fresh_ranks_channels_anew(tmp_path: Path, model: Path) -> None:
    folder, printed = prepare_pruning(tmp_path / "run", model), []
    for arguments in (RUN, [*RUN, "--fresh"]):
        ended = killable.run(arguments, folder, Moment("os.rename", r"/stages/.*/layer-00000\.tmp -> "))
        assert ended.code == KILLED
        printed.append("rank by greedy: 6/6 layers" in ended.printed)
    assert printed == [True, True]
