"""Several processes share a run: what they write, how they end, and that one killed stops the others.

On CPUs with gloo. Most processes are forks that get the environment a launcher gives; the launcher itself is started
where the test is about it.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import killable
import pytest
import torch
from command import invoke
from killable import Ended, Moment
from quantized import quantize
from safetensors.torch import load_file
from torch.distributed import TCPStore
from transformers import AutoTokenizer

from compress.data.calibration import TokenSet, load_calibration
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import CalibrationSpec, bundled_dir
from compress.system import distributed
from compress.system.compute import pick_dtype
from compress.system.progress import Reporter

TEXT = bundled_dir("calibration") / "text" / "general_en.jsonl.gz"
SAMPLES, LENGTH = 15, 128  # of two processes, one gets a sequence more
RECIPE = f"""\
name: tiny
model: {{model}}
calibration: {{{{source: {TEXT}, samples: {SAMPLES}, sequence_length: {LENGTH}}}}}
evaluate: {{{{sequence_length: 128, windows: 8, prompts: []}}}}
output: out
stages:
  - {{{{kind: quantize, group_size: 64}}}}
"""
RUN = ["run", "recipe.yaml", "--device", "cpu"]
UNMEASURED = ["--set", "evaluate=false"]
Codes = dict[str, torch.Tensor]


def variables(rank: int, world: int, port: int, agent: bool = False) -> dict[str, str]:
    """What a launcher puts into a process's environment; with an `agent`, the processes' store is not rank 0's."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    words = {"MASTER_ADDR": "localhost", "TORCHELASTIC_USE_AGENT_STORE": str(agent)}
    return words | {name: str(number) for name, number in numbers.items()}


def free_port() -> int:
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        port: int = tried.getsockname()[1]
        return port


def together(folder: Path, *arguments: str, moment: Moment | None = None) -> list[Ended]:
    """The command in two processes; the first may be stopped at a moment, with nothing to tell the other of it."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False) if moment is None else None
    port = free_port() if store is None else store.port
    processes = [
        killable.Process(
            [*RUN, *arguments], folder, None if rank else moment, variables(rank, 2, port, store is not None)
        )
        for rank in range(2)
    ]
    return [process.end() for process in processes]


def launch(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it."""
    command = [sys.executable, "-m", "compress.cli", *RUN, "--nproc", "2", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def prepare(folder: Path, model: Path) -> Path:
    (folder / "recipe.yaml").write_text(RECIPE.format(model=model))
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path) -> Path:
    return prepare(tmp_path, tiny_model)


@dataclass(frozen=True)
class Finished:
    """What a run's processes left, and how they ended."""

    output: Path
    ended: list[Ended]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.output / "report.json").read_text())
        return report


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Finished:
    folder = prepare(tmp_path_factory.mktemp("two"), tiny_model)
    ended = together(folder)
    assert [each.code for each in ended] == [0, 0], ended
    return Finished(folder / "out", ended)


@pytest.fixture(scope="module")
def one(two: Finished) -> Finished:
    """One process beside two, whose work it does not take."""
    ended = killable.run([*RUN, "--output", "one"], two.output.parent)
    assert (ended.code, "finished before" in ended.printed, "continuing" in ended.printed) == (0, False, False)
    return Finished(two.output.with_name("one"), [ended])


def codes(file: Path) -> Codes:
    """The 4-bit codes of every matrix."""
    packed = {name: tensor for name, tensor in load_file(file).items() if name.endswith("weight_packed")}
    return {n: torch.stack([t.contiguous().view(torch.uint8) >> s & 15 for s in (0, 4)]) for n, t in packed.items()}


def differing(one: Codes, other: Codes, within: str = "") -> float:
    """Share of the codes that differ."""
    assert one.keys() == other.keys()
    return float(torch.cat([(one[n] != other[n]).flatten() for n in one if within in n]).float().mean())


# The parts


def on_ranks(work: Callable[[int], Any], world: int) -> list[Any]:
    """What a function answers in each of several processes that have joined."""
    port, answers = free_port(), []
    for rank in range(world):
        here, there = killable.CONTEXT.Pipe()
        killable.CONTEXT.Process(target=_answer, args=(work, variables(rank, world, port), there), daemon=True).start()
        answers.append(here)
    return [here.recv() for here in answers]


def _answer(work: Callable[[int], Any], environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    assert distributed.join("cpu") == "cpu"
    answer = work(distributed.rank())
    alone = distributed.leave()
    pipe.send((answer, alone, distributed.world(), "RANK" in os.environ))


def _share(rank: int) -> Any:
    matrices = [torch.arange(4.0 * rows).view(rows, 4) for rows in (1, 2, 3, 5, 7, 12)]
    shares = [matrix[distributed.rows(len(matrix))] for matrix in matrices]
    whole = [distributed.gather_rows(share, len(matrix)) for share, matrix in zip(shares, matrices, strict=True)]
    return (
        [len(share) for share in shares],
        all(torch.equal(found, matrix) for found, matrix in zip(whole, matrices, strict=True)),
        distributed.all_reduce(torch.tensor([1.0, 10.0 * rank])).tolist(),
        distributed.total(rank + 1),
        distributed.first(lambda: f"from {rank}"),
    )


def test_shares_sums_and_what_rank_0_makes() -> None:
    each = ([1, 1, 1, 2, 3, 4], True, [3.0, 30.0], 6, "from 0")
    assert on_ranks(_share, 3) == [(each, rank == 0, 1, False) for rank in range(3)]


def test_alone_nothing_happens() -> None:
    tensor = torch.ones(3)
    assert distributed.join("cuda:7") == "cuda:7"
    assert (distributed.rank(), distributed.world(), distributed.here()) == (0, 1, 1)
    assert (distributed.all_reduce(tensor), distributed.gather_rows(tensor, 3)) == (tensor, tensor)
    assert (distributed.rows(3), distributed.total(5), distributed.first(lambda: 2)) == (slice(None), 5, 2)
    assert distributed.leave()


# A run


def test_the_codes_are_those_of_one_process(two: Finished, one: Finished, tmp_path: Path, tiny_model: Path) -> None:
    """Until a code differs, by rounding; from there on as much as when one process sums in another order."""
    spec = CalibrationSpec(source=str(TEXT), samples=SAMPLES, sequence_length=LENGTH)
    tokens = load_calibration(spec, AutoTokenizer.from_pretrained(tiny_model)).tokens
    order = torch.cat([torch.arange(0, SAMPLES, 2), torch.arange(1, SAMPLES, 2)])
    calibration, device = TokenSet(tokens[order], "text", "text", None), torch.device("cpu")
    dtype = pick_dtype(device, torch.bfloat16)
    context = Context(device, dtype, calibration, tokens[:1, :8], Reporter(quiet=True), False)
    quantize(WeightOnlyStage(kind="quantize", group_size=64), Checkpoint(tiny_model), tmp_path, context)
    reordered = codes(tmp_path / "checkpoint" / "model.safetensors")
    alone, found = (codes(each.output / "model.safetensors") for each in (one, two))
    assert differing(alone, found, "layers.0.self_attn") < 1e-3
    assert differing(alone, found, "layers.5.") < differing(alone, reordered, "layers.5.") + 0.1


def test_the_model_is_as_good_and_loads(two: Finished, one: Finished) -> None:
    assert two.report["quality"]["kl"]["mean"] < 1.1 * one.report["quality"]["kl"]["mean"]
    assert two.report["verified"]["passed"] and "AutoModelForCausalLM" in two.report["verified"]["loader"]
    assert two.report["calibration"] == one.report["calibration"]
    (stage,) = two.report["stages"]
    (alone,) = one.report["stages"]
    assert (stage["device"], alone["device"]) == ("2 x cpu", "cpu")
    for found, expected in zip(stage["layers"][0]["modules"], alone["layers"][0]["modules"], strict=True):
        assert (found["name"], found["shape"]) == (expected["name"], expected["shape"])
        assert found["error"] == pytest.approx(expected["error"], rel=0.05)


def test_only_the_first_process_writes_and_speaks(two: Finished) -> None:
    assert two.ended[1].printed == ""
    assert two.ended[0].printed.count("gptq 4-bit: 6/6 layers") == 1
    here = {file.name for file in two.output.parent.iterdir()} - {"one", "log.txt"}
    assert here == {".dscompress", "log0.txt", "log1.txt", "out", "recipe.yaml"}


def test_killed_and_continued(two: Finished, folder: Path) -> None:
    first, second = together(folder, *UNMEASURED, moment=Moment("os.rename", r"layer-00002\.tmp -> "))
    assert (first.code, second.code) == (-9, 1)  # the second neither waits nor goes on
    lines = [line for line in second.printed.splitlines() if line.startswith("error:")]  # torch has more to say
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run ended")
    assert "Traceback" not in second.printed
    first, second = together(folder, *UNMEASURED, moment=Moment("os.rename", r"\.out\.part -> .*/out$"))
    assert (first.code, second.code) == (-9, 0)  # the stage is done, and the second not needed
    assert "continuing behind 2 finished layers" in first.printed
    ended = together(folder, *UNMEASURED)
    assert [each.code for each in ended] == [0, 0], ended
    assert "quantize: finished before" in ended[0].printed
    files = [(each / "model.safetensors").read_bytes() for each in (folder / "out", two.output)]
    assert files[0] == files[1]


# Mistakes and accidents


def test_a_mistake_is_told_once(folder: Path) -> None:
    """Rank 0 alone looks for the model, each finds the rest; the one that is first tells."""
    for mistake, line in (
        ("model=package:nothing/here", "error: model: package:nothing/here: package nothing is not installed; "),
        ("calibration.samples=1", "error: calibration: 1 sequences are fewer than the 2 processes; "),
        ("stages.0={kind: quantize, method: dynamic}", "error: stages.0: dynamic int8 runs in one process and "),
        ("bits=4", "error: --set bits=4: "),
    ):
        ended = together(folder, "--set", mistake)
        assert [each.code for each in ended] == [2, 2], ended
        printed = "".join(each.printed for each in ended)
        assert [text for text in printed.splitlines() if text.startswith("error:")] == [printed.splitlines()[-1]]
        assert printed.splitlines()[-1].startswith(line)
        assert "Traceback" not in printed


def test_the_launcher_hands_on_mistakes(folder: Path) -> None:
    """Rank 0 alone looks for the model, and the other waits for it."""
    done = launch(folder, "--model", "package:nothing/here", "--quiet")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: model: package:nothing/here: package nothing is not installed; ")


def test_the_launcher_ends_all_when_one_is_killed(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text("""\
import os, signal, sys

def hook(event, values):
    if event == "import" and values[0] == "compress.stages.quantize.solve":
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1":
    sys.addaudithook(hook)
""")
    done = launch(folder, "--quiet", PYTHONPATH=str(folder))
    killed = "error: process 1 of 2 was killed (SIGKILL); run the same command again to continue\n"
    assert (done.returncode, done.stdout, done.stderr.splitlines(keepends=True)[-1]) == (1, "", killed)


def test_devices_of_several_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    count = torch.cuda.device_count()
    for device, line in (
        ("cuda", f"--nproc 99: this machine has {count} GPUs; use that many at most, or --device cpu"),
        ("cuda:0", "--device cuda:0: each of several processes takes a GPU of its own; use cuda, cpu or auto"),
    ):
        result = invoke("run", "recipe.yaml", "--device", device, "--nproc", 99)
        assert (result.exit_code, result.stderr) == (2, f"error: {line}\n")
    for name, value in variables(0, 2, 1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.UserError, match="a launcher has started this process already"):
        distributed.launch(2, "cpu", RUN)
