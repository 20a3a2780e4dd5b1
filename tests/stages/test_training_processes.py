"""Recipes that train, run by the command: killed and continued, shared by two processes, in chains of stages."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import killable
import pytest
import torch
from command import invoke
from killable import Ended, Moment
from quantized import opens
from random_models import make_model
from torch.distributed import TCPStore
from trained import apart, weights, write_text

from compress.system import distributed

KILLED = -int(signal.SIGKILL)
RUN = ["run", "recipe.yaml", "--device", "cpu"]
TRAINING = (
    "{kind: finetune, tokens: 1024, batch_size: 4, held_out: 3, learning_rate: 1e-3, save_every: 2, evaluate_every: 2}"  # noqa: E501
)
RECIPE = """\
name: trained
model: {model}
calibration: {{source: text.jsonl, samples: 8, sequence_length: 32}}
evaluate: false
output: out
stages:
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    threads, said = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    yield
    torch.set_num_threads(threads)
    os.environ.pop("OMP_NUM_THREADS") if said is None else os.environ.update(OMP_NUM_THREADS=said)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model", tie_word_embeddings=True)


def prepare(folder: Path, model: Path, *stages: str) -> Path:
    folder.mkdir(exist_ok=True)
    write_text(folder / "text.jsonl")
    lines = "".join(f"  - {stage}\n" for stage in stages or (TRAINING,))
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model) + lines)
    return folder


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    return found


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "out" / "train_log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def artefacts(folder: Path) -> set[str]:
    return {path.name for path in (folder / ".dscompress" / "stages").iterdir() if path.is_dir()}


class Process(killable.Process):
    """The command in a process of its own, which opens what it has made in that process too."""

    def __init__(
        self, folder: Path, *more: str, moment: Moment | None = None, environment: Mapping[str, str] | None = None,
        kill_in: int | None = None,
    ) -> None:  # fmt: skip
        environment = dict(environment or {})
        self.log = folder / f"log{environment.get('RANK', '')}.txt"
        self.pipe, theirs = killable.CONTEXT.Pipe()
        work = ([*RUN, *more], folder, self.log, moment, theirs, environment, kill_in)
        self._process = killable.CONTEXT.Process(target=_work, args=work)
        self._process.start()


def _work(*given: Any) -> None:
    *rest, kill_in = given
    torch.set_num_threads(1)
    if kill_in is not None:
        _kill_in(kill_in)
    distributed._GRACE = timedelta(seconds=1)
    killable._work(*rest)


def _kill_in(backward_pass: int) -> None:
    """Kill this process in front of a backward pass."""
    passed, backward = 0, torch.Tensor.backward

    def counted(self: Any, *rest: Any, **more: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == backward_pass:
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, *rest, **more)

    torch.Tensor.backward = counted  # type: ignore[assignment,method-assign]


def run(folder: Path, *more: str, moment: Moment | None = None) -> Ended:
    return Process(folder, *more, moment=moment).end()


@dataclass(frozen=True)
class Whole:
    """A run that was not stopped."""

    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Whole:
    folder = prepare(tmp_path_factory.mktemp("whole") / "run", model)
    ended = run(folder)
    assert ended.code == 0, ended.printed
    return Whole(folder)


def assert_same(folder: Path, whole: Whole) -> None:
    """Weights to the byte, the log but for the clock, and nothing half-written."""
    assert log(folder) == log(whole.folder)
    files = [(each / "out" / "model.safetensors").read_bytes() for each in (folder, whole.folder)]
    assert files[0] == files[1]
    for key in ("losses", "held_out", "best_step", "steps", "scored", "rolled_back", "optimizer"):
        assert report(folder)["stages"][0]["trained"][key] == report(whole.folder)["stages"][0]["trained"][key], key
    assert {file.name for file in (folder / "out").iterdir()} == {
        file.name for file in (whole.folder / "out").iterdir()
    }
    assert not list((folder / ".dscompress").rglob("*.part"))


# Killed and continued


def test_the_uninterrupted_run_measures_and_saves_as_it_is_told(whole: Whole) -> None:
    (stage,) = report(whole.folder)["stages"]
    trained = stage["trained"]
    assert [step for step, _ in trained["held_out"]] == [0, 2, 4, 6, 8]
    assert [line["step"] for line in log(whole.folder) if "loss" in line] == list(range(1, 9))
    assert report(whole.folder)["verified"]["passed"] is True
    assert trained["held_out"][-1][1] < trained["held_out"][0][1]


def killed_at(folder: Path, *moments: Moment) -> list[int]:
    """The step of the newest state behind each."""
    steps = []
    for moment in moments:
        ended = run(folder, moment=moment)
        assert ended.code == KILLED, (moment, ended.printed)
        assert not (folder / "out").exists()
        states = [path.name for path in (folder / ".dscompress" / "stages").glob("*.part/state-????????")]
        steps.append(int(max(states)[-8:]) if states else 0)
    return steps


def test_killed_again_and_again_while_it_trains(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model)
    steps = killed_at(
        folder,
        Moment("os.rename", r"/texts/.*meta\.json\.tmp -> "),  # text is packed
        Moment("open", r"train_log\.jsonl$", time=3),  # a step is done
        Moment("os.rename", r"best-00000002\.part -> "),
        Moment("open", r"state-00000002\.part/"),  # a state is being written
        Moment("os.rename", r"state-00000002 -> "),  # the next is there, and the one before goes
        Moment("os.rename", r"state-00000006\.part -> "),
    )
    assert steps == [0, 0, 0, 0, 4, 4]
    ended = run(folder)
    assert (ended.code, "continuing behind step 4 of 8" in ended.printed) == (0, True), ended.printed
    assert_same(folder, whole)


def test_killed_again_and_again_while_it_writes(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model)
    steps = killed_at(
        folder,
        Moment("os.rename", r"layer-00001\.tmp -> "),
        Moment("open", r"checkpoint/train_log\.jsonl$"),
        Moment("os.rename", r"/checkpoint -> .*/stages/"),
        Moment("os.rename", r"\.out\.part -> .*/out$"),
    )
    assert steps == [8, 8, 8, 0]
    ended = run(folder)
    assert (ended.code, "finetune: finished before" in ended.printed) == (0, True), ended.printed
    assert_same(folder, whole)


@pytest.mark.parametrize("moment", [0.3, 0.6])
def test_killed_at_some_moment(moment: float, model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model)
    ended = Process(folder).end(kill_after=moment * report(whole.folder)["seconds"])
    assert ended.code in (KILLED, 0)
    ended = run(folder)
    assert ended.code == 0, ended.printed
    assert_same(folder, whole)


def test_another_seed_or_text_makes_another_artefact_and_continues_nothing(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "run", model)
    assert run(folder, moment=Moment("os.rename", r"state-00000002 -> ")).code == KILLED
    begun = artefacts(folder)
    other = run(folder, "--set", "stages.0.seed=1")
    assert (other.code, "continuing" in other.printed) == (0, False)
    assert [line for line in log(folder) if "loss" in line] != [line for line in log(whole.folder) if "loss" in line]
    write_text(folder / "text.jsonl", seed=7)
    changed = run(folder)
    assert (changed.code, "continuing" in changed.printed) == (0, False)
    assert len(artefacts(folder) - begun) == 2
    write_text(folder / "text.jsonl")
    ended = run(folder)
    assert (ended.code, "continuing behind step 4 of 8" in ended.printed) == (0, True)
    assert_same(folder, whole)


def test_how_the_work_is_done_is_taken_from_a_finished_run(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    ended = run(folder, "--set", "stages.0.micro_batch=1", "--set", "stages.0.save_every=3")
    assert (ended.code, "finetune: finished before" in ended.printed) == (0, True)


# Two processes


def together(folder: Path, moment: Moment | None = None, kill_in: int | None = None) -> list[Ended]:
    """The command in two processes; the first may be killed at a moment, the second in front of a backward pass."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if moment is None else None
    port = free_port() if store is None else store.port
    processes = [
        Process(folder, moment=moment, environment=place(0, port, store)),
        Process(folder, environment=place(1, port, store), kill_in=kill_in),
    ]
    return [process.end() for process in processes]


def assert_told(ended: Ended) -> None:
    """In one line."""
    lines = [line for line in ended.printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run ended"), ended.printed
    assert "Traceback" not in ended.printed


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        port: int = tried.getsockname()[1]
        return port


def place(rank: int, port: int, store: TCPStore | None) -> dict[str, str]:
    """What a launcher puts into a process's environment."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    words = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": str(store is not None)}
    return words | {name: str(number) for name, number in numbers.items()}


def assert_near(folder: Path, whole: Whole) -> None:
    """But for sums of 16 bits in another order."""
    for found, wanted in zip(log(folder), log(whole.folder), strict=True):
        assert found.keys() == wanted.keys()
        assert list(found.values()) == pytest.approx(list(wanted.values()), rel=0.05 if "norm" in wanted else 1e-3)
    assert apart(weights(folder / "out"), weights(whole.folder / "out")) < 0.01


def test_two_processes_killed_and_taken_up_by_two_and_by_one(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model, TRAINING.replace("kind:", "checkpoint_activations: true, kind:"))
    first, second = together(folder, Moment("os.rename", r"state-00000004\.part -> "))
    assert (first.code, second.code) == (KILLED, 1)
    assert_told(second)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ended = together(folder)
    assert [each.code for each in ended] == [0, 0], ended
    assert "continuing behind step 2 of 8" in ended[0].printed and ended[1].printed == ""
    assert_near(folder, whole)
    alone = run(copy)
    assert (alone.code, "continuing behind step 2 of 8" in alone.printed) == (0, True)
    assert_near(copy, whole)


def test_a_process_that_is_killed_inside_a_step_is_told_of_in_one_line(model: Path, tmp_path: Path) -> None:
    """One waits for its gradients then."""
    first, second = together(prepare(tmp_path / "run", model), kill_in=5)
    assert (first.code, second.code) == (1, KILLED), first.printed
    assert_told(first)


# Chains

HEAL = "{tokens: 512, batch_size: 4, held_out: 2, learning_rate: 1e-3, evaluate_every: 2}"
STEPS = (
    "{kind: prune, target: {sparsity: 0.2, of: layers}, axes: [ffn], multiple_of: 8, importance: magnitude, "
    f"compensate: false, steps: 2, schedule: linear, heal: {HEAL}}}"
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path / "run"


def untied(folder: Path) -> Path:
    return make_model(folder, intermediate_size=128)


def test_steps_are_artefacts_of_their_own_killed_between_and_a_row_each(here: Path) -> None:
    prepare(here, untied(here.parent / "model"), STEPS)
    ended = run(here, moment=Moment("os.rename", r"setup-1\.json\.tmp -> "))  # the first is pruned, not healed
    assert ended.code == KILLED and len([name for name in artefacts(here) if not name.endswith(".part")]) == 1
    ended = run(here, moment=Moment("os.rename", r"/scores/.*\.tmp -> |layer-00000\.tmp -> ", time=3))
    assert ended.code == KILLED and "prune: finished before" in ended.printed
    ended = run(here)
    assert ended.code == 0, ended.printed
    assert len(artefacts(here)) == 4
    stages = report(here)["stages"]
    assert [stage["kind"] for stage in stages] == ["prune", "finetune"] * 2
    sizes = [stage["pruned"]["after"]["intermediate_size"] for stage in stages[::2]]
    assert 128 > sizes[0] > sizes[1]
    assert [stage["trained"]["tokens"] for stage in stages[1::2]] == [256, 256]
    assert json.loads((here / "out" / "config.json").read_text())["intermediate_size"] == sizes[1]
    page = (here / "out" / "report.md").read_text()
    assert page.count("finetune") >= 2


def test_a_smaller_student_with_a_tied_head_is_pruned_taught_and_opened(here: Path) -> None:
    shape = "{intermediate_size: 96, num_hidden_layers: 1, tie_word_embeddings: true}"
    teaching = HEAL.removeprefix("{")
    prepare(here, untied(here.parent / "model"), f"{{kind: distill, shape: {shape}, {teaching}")
    ran = invoke(*RUN)
    assert ran.exit_code == 0, ran.stderr
    stages = report(here)["stages"]
    assert [stage["kind"] for stage in stages] == ["prune", "distill"]
    assert stages[1]["trained"]["held_out"][-1][1] < stages[1]["trained"]["held_out"][0][1]
    written = weights(here / "out")
    assert "lm_head.weight" not in written and written["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    stock: Any = opens(here / "out")
    assert stock.lm_head.weight is stock.model.embed_tokens.weight
    assert report(here)["verified"]["passed"] and report(here)["compressed"]["parameters"] == sum(
        tensor.numel() for tensor in written.values()
    )


def test_pruned_healed_taught_and_quantized_in_one_run(here: Path) -> None:
    pruning = (
        f"{{kind: prune, shape: {{intermediate_size: 64}}, importance: magnitude, compensate: false, heal: {HEAL}}}"
    )
    teaching = f"{{kind: distill, losses: {{kl: 1, ce: 0.1}}, {HEAL.removeprefix('{')}"
    prepare(here, untied(here.parent / "model"), pruning, teaching, "{kind: quantize, bits: 4, group_size: 32}")
    text = (here / "recipe.yaml").read_text()
    measured = "evaluate: {text: text.jsonl, sequence_length: 32, windows: 2, prompts: []}"
    (here / "recipe.yaml").write_text(text.replace("evaluate: false", measured))
    ran = invoke(*RUN)
    assert ran.exit_code == 0, ran.stderr
    found = report(here)
    assert [stage["kind"] for stage in found["stages"]] == ["prune", "finetune", "distill", "quantize"]
    assert found["verified"]["passed"] and found["quality"]["kl"]["mean"] > 0
    assert "is trained on the text of the evaluation" in " ".join(found["warnings"])
    opens(here / "out")
    again = invoke(*RUN)
    assert again.exit_code == 0 and again.stderr.count("finished before") == 4
