"""Recipes that train, run by the command: killed and continued, shared by two processes, in chains of stages."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
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


@dataclass(frozen=True)
class Whole:
    """A run that was not stopped."""

    folder: Path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Whole:
    folder = prepare(tmp_path_factory.mktemp("whole") / "run", model)
    ended = killable.run(RUN, folder)
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


def test_killed_again_and_again(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model)
    moments = [
        Moment("open", r"/texts/.*/shard-00000"),  # text is packed
        Moment("os.rename", r"/texts/.*meta\.json\.tmp -> "),
        Moment("os.rename", r"setup-1\.json\.tmp -> "),
        Moment("open", r"train_log\.jsonl$", time=3),  # the second line is written: a step is done
        Moment("os.rename", r"best-00000002\.part -> "),
        Moment("os.rename", r"state-00000002\.part -> "),
        Moment("open", r"state-00000004\.part/"),  # the next state is being written
        Moment("shutil.rmtree", r"state-00000002$"),  # it is there, and the one before goes
        Moment("open", r"train_log\.jsonl$", time=3),
        Moment("os.rename", r"state-00000008\.part -> "),
        Moment("os.rename", r"layer-00000\.tmp -> "),  # trained; weights are written
        Moment("os.rename", r"layer-00001\.tmp -> "),
        Moment("open", r"outer\.tmp$"),
        Moment("open", r"checkpoint/train_log\.jsonl$"),
        Moment("os.rename", r"/checkpoint -> .*/stages/"),
        Moment("os.rename", r"\.out\.part -> .*/out$"),
    ]
    steps = []
    for moment in moments:
        ended = killable.run(RUN, folder, moment)
        assert ended.code == KILLED, (moment, ended.printed)
        assert not (folder / "out").exists()
        states = [path.name for path in (folder / ".dscompress" / "stages").glob("*.part/state-????????")]
        steps.append(int(max(states)[-8:]) if states else 0)
    assert steps[:15] == sorted(steps[:15]) and steps[8:11] == [4, 6, 8]
    ended = killable.run(RUN, folder)
    assert ended.code == 0, ended.printed
    assert_same(folder, whole)


@pytest.mark.parametrize("moment", [0.35, 0.6, 0.8])
def test_killed_at_some_moment(moment: float, model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model)
    ended = killable.Process(RUN, folder).end(kill_after=moment * report(whole.folder)["seconds"])
    assert ended.code in (KILLED, 0)
    ended = killable.run(RUN, folder)
    assert ended.code == 0, ended.printed
    assert_same(folder, whole)


def test_another_seed_or_text_makes_another_artefact_and_continues_nothing(
    model: Path, whole: Whole, tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "run", model)
    assert killable.run(RUN, folder, Moment("shutil.rmtree", r"state-00000002$")).code == KILLED
    begun = artefacts(folder)
    other = killable.run([*RUN, "--set", "stages.0.seed=1"], folder)
    assert (other.code, "continuing" in other.printed) == (0, False)
    assert [line for line in log(folder) if "loss" in line] != [line for line in log(whole.folder) if "loss" in line]
    write_text(folder / "text.jsonl", seed=7)
    changed = killable.run(RUN, folder)
    assert (changed.code, "continuing" in changed.printed) == (0, False)
    assert len(artefacts(folder) - begun) == 2
    write_text(folder / "text.jsonl")
    ended = killable.run(RUN, folder)
    assert (ended.code, "continuing behind step 4 of 8" in ended.printed) == (0, True)
    assert_same(folder, whole)


def test_how_the_work_is_done_is_taken_from_a_finished_run(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    ended = killable.run([*RUN, "--set", "stages.0.micro_batch=1", "--set", "stages.0.save_every=3"], folder)
    assert (ended.code, "finetune: finished before" in ended.printed) == (0, True)


# Two processes


def together(folder: Path, moment: Moment | None = None) -> list[Ended]:
    """The command in two processes; the first may be stopped at a moment."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if moment is None else None
    processes = [
        killable.Process(RUN, folder, None if rank else moment, place(rank, store.port if store else port, store))
        for port in [free_port()]
        for rank in range(2)
    ]
    return [process.end() for process in processes]


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
    """The losses of one process to 1e-5; weights to the 16 bits that they are stored in."""
    for found, wanted in zip(log(folder), log(whole.folder), strict=True):
        assert found.keys() == wanted.keys()
        assert list(found.values()) == pytest.approx(list(wanted.values()), rel=1e-5)
    assert apart(weights(folder / "out"), weights(whole.folder / "out")) < 0.01


def test_two_processes_killed_and_taken_up_by_two_and_by_one(model: Path, whole: Whole, tmp_path: Path) -> None:
    folder = prepare(tmp_path / "run", model, TRAINING.replace("kind:", "checkpoint_activations: true, kind:"))
    for moment, step in (
        (Moment("open", r"train_log\.jsonl$", time=5), 0),
        (Moment("os.rename", r"state-00000004\.part -> "), 2),
    ):
        first, second = together(folder, moment)
        assert (first.code, second.code) == (KILLED, 1)
        lines = [line for line in second.printed.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and lines[0].startswith("error: another process of this run ended"), second.printed
        assert "Traceback" not in second.printed
        assert ("continuing behind step" in first.printed) == (step > 0)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ended = together(folder)
    assert [each.code for each in ended] == [0, 0], ended
    assert "continuing behind step 2 of 8" in ended[0].printed and ended[1].printed == ""
    assert_near(folder, whole)
    alone = killable.run(RUN, copy)
    assert (alone.code, "continuing behind step 2 of 8" in alone.printed) == (0, True)
    assert_near(copy, whole)


def killed_inside(number: int, folder: Path, log_: Path, pipe: Connection, environment: dict[str, str]) -> None:
    """The command in a process that is killed in the middle of a step, where rank 0 waits for its gradients."""
    if environment["RANK"] == "1":
        passed = 0
        backward = torch.Tensor.backward

        def counted(self: Any, *rest: Any, **more: Any) -> Any:
            nonlocal passed
            passed += 1
            if passed == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(self, *rest, **more)

        torch.Tensor.backward = counted  # type: ignore[assignment,method-assign]
    killable._work(RUN, folder, log_, None, pipe, environment)


def test_a_process_that_is_killed_inside_a_step_is_told_of_in_one_line(model: Path, tmp_path: Path) -> None:
    folder, port = prepare(tmp_path / "run", model), free_port()
    processes = []
    for rank in range(2):
        _, theirs = killable.CONTEXT.Pipe()
        work = (5, folder, folder / f"log{rank}.txt", theirs, place(rank, port, None))
        processes.append(killable.CONTEXT.Process(target=killed_inside, args=work))
        processes[-1].start()
    for process in processes:
        process.join()
    printed = (folder / "log0.txt").read_text()
    assert [process.exitcode for process in processes] == [1, KILLED], printed
    lines = [line for line in printed.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run ended"), printed
    assert "Traceback" not in printed


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
    ended = killable.run(RUN, here, Moment("os.rename", r"setup-1\.json\.tmp -> "))  # the first is pruned, not healed
    assert ended.code == KILLED and len([name for name in artefacts(here) if not name.endswith(".part")]) == 1
    ended = killable.run(RUN, here, Moment("os.rename", r"/scores/.*\.tmp -> |layer-00000\.tmp -> ", time=3))
    assert ended.code == KILLED and "prune: finished before" in ended.printed
    ended = killable.run(RUN, here)
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
