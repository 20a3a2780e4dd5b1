"""Several processes share a run: what they write, how they end, and that one killed stops the others.

On CPUs with gloo. Most processes are forks that get the environment a launcher gives; the launcher itself is started
where the test is about it.
"""

import json
import os
import socket
import subprocess
import sys
import threading
import time
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
from stock_here import asking_within
from torch.distributed import TCPStore
from transformers import AutoTokenizer

from compress.data.calibration import TokenSet, load_calibration
from compress.errors import DscompressError, UserError
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import bundled_dir
from compress.recipe.text import CalibrationSpec
from compress.system import distributed, launcher
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


def killing(module: str) -> str:
    """A sitecustomize.py that kills process 1 when it imports a module."""
    return f"""\
import os, signal, sys

def hook(event, values):
    if event == "import" and values[0] == "{module}":
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ.get("RANK") == "1":
    sys.addaudithook(hook)
"""


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
    return _answers(_answer, work, [variables(rank, world, port) for port in [free_port()] for rank in range(world)])


def failing_on_ranks(work: Callable[[int], Any], world: int) -> list[str]:
    """The errors that a function ends with in several processes; they know of the first one's as in a run."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    found: list[str] = _answers(_fail, work, [variables(rank, world, store.port, True) for rank in range(world)])
    return found


def _answers(target: Callable[..., None], work: Callable[[int], Any], environments: list[dict[str, str]]) -> list[Any]:
    answers = []
    for environment in environments:
        here, there = killable.CONTEXT.Pipe()
        killable.CONTEXT.Process(target=target, args=(work, environment, there), daemon=True).start()
        answers.append(here)
    return [here.recv() for here in answers]


def _fail(work: Callable[[int], Any], environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    distributed.join("cpu")
    try:
        work(distributed.rank())
    except DscompressError as error:
        pipe.send(f"{type(error).__name__}: {error}")
        distributed.failed(error, lambda error: None)


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


def _around(rank: int) -> Any:
    return {
        "among": (distributed.rank(), distributed.world(), distributed.here(), distributed.launched()),
        "sums": (distributed.total(3), distributed.all_reduce(torch.tensor([1.0])).tolist()),
        "rows": len(torch.arange(5)[distributed.rows(5)]),
        "gathered": (distributed.gather(rank), distributed.first(lambda: "made")),
        "threads": torch.get_num_threads(),
        "device": distributed.device(),
    }


def _in_one(rank: int) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # what it is among the others
    inside = distributed.on_first(lambda: _around(rank))
    return threads, inside, _around(rank)


def test_on_the_first_it_is_as_in_one_process() -> None:
    of_two = {"sums": (6, [2.0]), "rows": 3, "gathered": ([0, 1], "made"), "device": "cpu"}
    of_one = {"among": (0, 1, 1, False), "sums": (3, [1.0]), "rows": 5, "gathered": ([0], "made"), "device": "cpu"}
    for rank, ((threads, inside, after), leads, _, _) in enumerate(on_ranks(_in_one, 2)):
        assert inside == of_one | {"threads": threads}
        assert after == of_two | {"among": (rank, 2, 2, True), "threads": threads + 1}
        assert leads == (rank == 0)


def _raise(rank: int) -> Any:
    def work() -> None:
        raise UserError(f"by {rank}")

    distributed.on_first(work)


def test_a_failure_on_the_first_ends_the_others() -> None:
    assert failing_on_ranks(_raise, 3) == ["UserError: by 0"] + 2 * ["PeerError: another process of this run failed"]


def _shared(rank: int) -> Any:
    distributed._SHOWN = 0.1
    distributed.check_shared(Path("/dev/shm" if rank == 0 else "/"))


def test_a_folder_that_hosts_do_not_share_is_refused_by_the_first() -> None:
    host = socket.gethostname()
    refused, ended = failing_on_ranks(_shared, 2)
    assert refused.startswith(f"UserError: --work-dir /dev/shm: is another folder on {host} than on {host}; give ")
    assert ended == "PeerError: another process of this run failed"
    assert not [file for file in Path("/dev/shm").iterdir() if file.suffix == ".lock"]


def test_alone_nothing_happens() -> None:
    tensor = torch.ones(3)
    assert distributed.join("cuda:7") == "cuda:7"
    assert (distributed.rank(), distributed.world(), distributed.here()) == (0, 1, 1)
    assert (distributed.all_reduce(tensor), distributed.gather_rows(tensor, 3)) == (tensor, tensor)
    assert (distributed.rows(3), distributed.total(5), distributed.first(lambda: 2)) == (slice(None), 5, 2)
    assert (distributed.on_first(lambda: 3), distributed.gather("x"), distributed.device()) == (3, ["x"], None)
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


def test_a_stage_that_does_not_split_runs_in_the_first(folder: Path) -> None:
    """Killed, it ends the other; continued, it gives what one process gives."""
    options = [*UNMEASURED, "--set", "stages.0={kind: quantize, method: dynamic}"]
    first, second = together(folder, *options, moment=Moment("os.rename", r"layer-00002\.tmp -> "))
    assert (first.code, second.code) == (-9, 1)
    assert "error: another process of this run ended" in second.printed and "Traceback" not in second.printed
    ended = together(folder, *options)
    assert [each.code for each in ended] == [0, 0], ended
    assert "dynamic int8: runs in one of the 2 processes, and the others wait" in ended[0].printed
    assert "continuing behind 2 finished layers" in ended[0].printed and ended[1].printed == ""
    alone = killable.run([*RUN, *options, "--output", "one"], folder)
    assert (alone.code, "runs in one" in alone.printed) == (0, False)
    files = [(folder / output / "model.safetensors").read_bytes() for output in ("out", "one")]
    assert files[0] == files[1]
    assert json.loads((folder / "out" / "report.json").read_text())["stages"][0]["device"] == "cpu"


# Several hosts


def hosts(folder: Path, *arguments: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """The command as a user gives it on each of two hosts, which are both this machine; the first keeps the store."""
    options = [*UNMEASURED, *arguments, "--nnodes", "2", "--rdzv", f"127.0.0.1:{free_port()}"]
    command = [sys.executable, "-m", "compress.cli", *RUN, *options]
    variables, started = {**os.environ, **environment}, []
    for name in "ab":
        (folder / name).mkdir(exist_ok=True)
        with (folder / name / "log.txt").open("w") as log:
            started.append(subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=variables))
        while name == "a" and "1 of 2 hosts" not in (folder / "a" / "log.txt").read_text():
            assert started[0].poll() is None, (folder / "a" / "log.txt").read_text()
            time.sleep(0.05)
    codes = [process.wait() for process in started]
    return [
        subprocess.CompletedProcess(command, code, (folder / name / "log.txt").read_text())
        for name, code in zip("ab", codes, strict=True)
    ]


def test_two_hosts_share_a_run(folder: Path) -> None:
    support = folder / "support"
    support.mkdir()
    kept, came = hosts(folder, "--set", "calibration.samples=8", **asking_within("'RANK' in os.environ", support))
    assert (kept.returncode, came.returncode) == (0, 0), (kept.stdout, came.stdout)
    assert kept.stdout.count("gptq 4-bit: 6/6 layers") == 1
    assert came.stdout == "working for 127.0.0.1, which tells of the run\n"
    assert json.loads((folder / "out" / "report.json").read_text())["stages"][0]["device"] == "2 x cpu"


def test_a_process_killed_on_one_host_ends_the_other(folder: Path) -> None:
    (folder / "sitecustomize.py").write_text(killing("compress.report.write"))
    for done in hosts(folder, PYTHONPATH=str(folder)):
        killed = f"error: process 1 on {socket.gethostname()} was killed (SIGKILL); run the same command again to "
        assert (done.returncode, done.stdout.splitlines()[-1]) == (1, killed + "continue")
        assert len(done.stdout.splitlines()) == 2


def test_where_hosts_meet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launcher, "_ARRIVAL", 0.3)
    monkeypatch.setattr(launcher, "_ANSWER", 0.3)
    port, silent, other = free_port(), socket.create_server(("127.0.0.1", 0)), TCPStore("127.0.0.1", 0, None, True)
    busy, torchs = f"127.0.0.1:{silent.getsockname()[1]}", f"127.0.0.1:{other.port}"
    taken = "the port is in use by something else than a run of dscompress; choose a free one, the same on all hosts"
    for nodes, place, line in (
        (2, None, "--nnodes 2: add where they meet: --rdzv HOST:PORT, one of them and a free port there"),
        (1, "node:1", "--rdzv node:1: is where several hosts meet; say how many with --nnodes"),
        (2, "node.invalid:1", "--rdzv node.invalid:1: no host node.invalid is known here ("),
        (2, busy, f"--rdzv {busy}: {taken}"),
        (2, torchs, f"--rdzv {torchs}: {taken}"),
        (3, f"127.0.0.1:{port}", f"--nnodes 3: 1 of 3 hosts came to 127.0.0.1:{port} within 0 minutes; start the "),
        (2, "192.0.2.1:1", "--rdzv 192.0.2.1:1: nobody was there within 0 minutes ("),
    ):
        options = ["--quiet", "--nnodes", nodes] + (["--rdzv", place] if place else [])
        result = invoke("run", "recipe.yaml", "--device", "cpu", *options)
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"error: {line}")
    silent.close()


@pytest.mark.parametrize(
    "place", ["node", "node:", ":29500", "node:x", "node:0", "node:65536", "::1:29500", "n:+1", "n:٣"]
)
def test_where_hosts_meet_is_a_host_and_a_port(place: str) -> None:
    with pytest.raises(UserError, match="is no HOST:PORT; write it like node1:29500"):
        launcher.launch(1, "cpu", RUN, print, 2, place)


def test_hosts_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """One too many, and one that expects another number of them."""
    for name in ("_ARRIVAL", "_GRACE"):
        monkeypatch.setattr(launcher, name, 0.3)
    name = f"127.0.0.1:{free_port()}"
    first, second, third, fourth = (launcher._Meeting(name, size) for size in (2, 2, 2, 3))
    said: list[str] = []
    first._open()
    waiting = threading.Thread(target=lambda: first._arrive(said.append))
    waiting.start()
    second.here = third.here = fourth.here = False  # else they would keep the same store, in the same process
    second._open()
    second._arrive(said.append)
    waiting.join()
    assert (first.place()["local_addr"], second.keeps, first.place()["local_addr"] < second.place()["local_addr"]) == (
        "127.0.0.1", False, True,
    )  # fmt: skip
    assert said[-1] == "working for 127.0.0.1, which tells of the run"
    third._open()
    with pytest.raises(UserError, match=f"--rdzv {name}: 2 hosts are there already, as --nnodes says; wait for "):
        third._arrive(print)
    with pytest.raises(UserError, match=f"--nnodes 3: at {name} 2 hosts meet; give all the same number"):
        fourth._open()
    assert first._leave(2, "first ended") is None
    other = second._leave(1, "second ended")
    assert other is not None and (str(other), other.exit_code) == ("first ended", 2)


# Mistakes and accidents


def test_a_mistake_is_told_once(folder: Path) -> None:
    """Rank 0 alone looks for the model, each finds the rest; the one that is first tells."""
    for mistake, line in (
        ("model=package:nothing/here", "error: model: package:nothing/here: package nothing is not installed; "),
        ("calibration.samples=1", "error: calibration: 1 sequences are fewer than the 2 processes; "),
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
    (folder / "sitecustomize.py").write_text(killing("compress.stages.quantize.solve"))
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
        launcher.launch(2, "cpu", RUN, print)
