"""Speed beside the base in bf16: measured in processes of their own, by turns, once, and only where it means much."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from command import invoke
from quantized import quantize
from random_models import make_model, random_tokens

from compress.evaluation import speed, stock, verify
from compress.evaluation.stock import Answer, Request, Timing
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightActivationStage
from compress.records import Report
from compress.system import extras, machine
from compress.system.progress import Reporter

needs_torchao = pytest.mark.skipif(extras.torchao_problem() is not None, reason="torchao is not installed")
RECIPE = """\
name: cpu
model: replaced
stages: [{kind: quantize, method: dynamic, weight_rounding: rtn, format: torchao}]
evaluate: {text: wikitext2, sequence_length: 64, windows: 1, prompts: []}
output: replaced
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(make_model(tmp_path_factory.mktemp("speed") / "base"))


def context(max_memory: int | None = None) -> Context:
    return Context(torch.device("cpu"), torch.bfloat16, None, random_tokens(1, 8), Reporter(True), False, max_memory)


Asked = Callable[..., list[Request]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Answers with invented figures, prefill and decode of one process after the other; notes who was asked."""

    def install(*figures: tuple[float, float], waited: float = 0.0) -> list[Request]:
        requests: list[Request] = []

        def ask(request: Request) -> Answer:
            prefill, decode = figures[len(requests) % len(figures)]
            requests.append(request)
            pace = {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode}
            return Answer(
                None, [], pace=pace | {"loaded_bytes": 1000 * len(requests), "peak_bytes": 9000, "waited": waited}
            )

        monkeypatch.setattr(speed, "ask", ask)
        return requests

    return install


def test_a_process_of_its_own_measures(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is its own: not that of the process which asks and holds more."""
    started: list[Any] = []
    usual = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        started.append(command)
        return usual(command, **options)

    monkeypatch.setattr(stock.subprocess, "Popen", start)
    ballast = torch.ones(300_000_000)
    answer = stock.ask(Request(str(base.folder), "cpu", "bfloat16", timing=Timing(16, 4, 1)))
    assert answer.failure is None and answer.pace is not None and answer.continuations == []
    assert len(started) == 1 and started[0][-1] == "compress.evaluation.stock"
    figures = answer.pace
    assert figures.pop("waited") >= 0 and len(figures) == 4 and min(figures.values()) > 0
    assert 50e6 < figures["loaded_bytes"] <= figures["peak_bytes"] < ballast.nbytes


def test_base_and_result_by_turns_and_the_median_of_the_rounds(
    base: Checkpoint, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "_ROUNDS", 3)
    result = Checkpoint(make_model(tmp_path / "result", num_hidden_layers=1))
    figures = [(100.0, 10.0), (60.0, 5.0), (104.0, 10.1), (61.0, 5.1), (99.0, 10.2), (62.0, 5.2)]
    requests = asked(*figures)
    found, note = speed.compare_speed(base, result, "key", context(), tmp_path / "cache", False)
    assert found is not None and note is None
    assert [Path(request.model) for request in requests] == 3 * [base.folder, result.folder]
    assert {(request.device, request.dtype) for request in requests} == {("cpu", "bfloat16")}
    for made, start in ((found.base, 0), (found.compressed, 1)):
        assert made.prefill_tokens_per_second == median(each[0] for each in figures[start::2])
        assert made.decode_tokens_per_second == median(each[1] for each in figures[start::2])
        assert made.loaded_bytes == 1000 * (start + 3) and made.peak_bytes == 9000
    assert (found.cpu, found.cpu_flags) == machine.processor()
    assert (found.threads, found.rounds) == (torch.get_num_threads(), 3)
    assert found.prompt_tokens + found.new_tokens == 128 and found.new_tokens == 16  # all positions that it has


@pytest.mark.parametrize(
    ("positions", "expected"), [(None, (512, 16)), (2048, (512, 16)), (512, (496, 16)), (8, (7, 1))]
)
def test_no_more_tokens_than_the_model_has_positions(
    base: Checkpoint, positions: int | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(base.config, "max_position_embeddings", positions)
    timing = speed._timing(base)
    assert (timing.prompt_tokens, timing.new_tokens) == expected


def test_the_same_is_measured_once(
    base: Checkpoint, asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked((100.0, 10.0), (60.0, 5.0))
    first = speed.compare_speed(base, base, "key", context(), tmp_path / "cache", False)
    assert len(requests) == 4
    assert speed.compare_speed(base, base, "key", context(), tmp_path / "cache", False) == first
    assert len(requests) == 4
    speed.compare_speed(base, base, "another", context(), tmp_path / "cache", False)
    assert len(requests) == 8
    speed.compare_speed(base, base, "key", context(), tmp_path / "cache", True)
    assert len(requests) == 12
    monkeypatch.setattr(speed, "processor", lambda: ("another CPU", []))
    found, _ = speed.compare_speed(base, base, "key", context(), tmp_path / "cache", False)
    assert len(requests) == 16 and found is not None and found.cpu == "another CPU"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    speed.compare_speed(base, base, "key", context(), tmp_path / "cache", False)
    assert len(requests) == 20 and requests[-1].timing is not None and requests[-1].timing.threads == 77


def test_what_a_busy_machine_gave_is_not_kept(base: Checkpoint, asked: Asked, tmp_path: Path) -> None:
    requests = asked((100.0, 10.0), waited=0.3)
    for count in (4, 8):
        found, _ = speed.compare_speed(base, base, "key", context(), tmp_path / "cache", False)
        assert found is not None and found.busy and len(requests) == count


def test_where_memory_is_short_nothing_is_started(base: Checkpoint, asked: Asked, tmp_path: Path) -> None:
    requests = asked((1.0, 1.0))
    found, note = speed.compare_speed(base, base, "key", context(2**28), tmp_path, False)
    assert found is None and note == "the base in bfloat16 needs about 0.7 GiB and 0.2 GiB are free"
    assert requests == []


def test_a_loader_that_fails_is_told(base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ask", lambda request: Answer(None, [], "ValueError: no"))
    found, note = speed.compare_speed(base, base, "key", context(), tmp_path, False)
    assert found is None and note == "the stock loader failed: ValueError: no"
    assert list(tmp_path.iterdir()) == []


@needs_torchao
@pytest.mark.parametrize(("bits", "dtype"), [(8, "bfloat16"), (4, "float16")])
def test_a_result_runs_in_bf16_where_it_can(tmp_path: Path, asked: Asked, bits: int, dtype: str) -> None:
    requests = asked((100.0, 10.0), (60.0, 5.0))
    half = Checkpoint(make_model(tmp_path / "half", dtype=torch.float16))
    stage = WeightActivationStage(kind="quantize", method="dynamic", bits=bits, weight_rounding="rtn", format="torchao")
    with torch.no_grad():
        quantize(stage, half, tmp_path / "work", context())
    found, _ = speed.compare_speed(
        half, Checkpoint(tmp_path / "work" / "checkpoint"), "key", context(), tmp_path / "cache", False
    )
    assert found is not None and (found.base.dtype, found.compressed.dtype) == ("bfloat16", dtype)
    assert [request.dtype for request in requests] == 2 * ["bfloat16", dtype]


@pytest.fixture
def loader_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify with our reader: the stock loader takes seconds to start, and has no part in this."""
    monkeypatch.setattr(verify, "stock_refusal", lambda *arguments: "not asked here")


@needs_torchao
@pytest.mark.usefixtures("loader_not_asked")
def test_a_torchao_run_reports_it_and_a_second_one_does_not_measure(
    base: Checkpoint, asked: Asked, tmp_path: Path
) -> None:
    requests = asked((100.0, 10.0), (60.0, 5.0))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    arguments = [
        "run",
        tmp_path / "recipe.yaml",
        "--model",
        base.folder,
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
    ]
    for _ in range(2):
        done = invoke(*arguments)
        assert done.exit_code == 0, done.stderr
        assert len(requests) == 4
        report = Report.model_validate_json((tmp_path / "out" / "report.json").read_text())
        assert report.speed is not None and report.speed_note is None
        assert "speed       No faster than bf16 on this CPU: prefill 0.60x, decode 0.50x.\n" in done.stdout
    assert [Path(request.model) == base.folder for request in requests] == [True, False, True, False]
    off = invoke(*arguments, "--set", "evaluate=null")
    assert off.exit_code == 0, off.stderr
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (written["speed"], written["speed_note"], written["quality"]) == (None, None, None)
    assert len(requests) == 4 and "speed" not in off.stdout


@pytest.mark.usefixtures("loader_not_asked")
def test_another_format_is_not_measured(base: Checkpoint, asked: Asked, tmp_path: Path) -> None:
    requests = asked((1.0, 1.0))
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("torchao", "compressed-tensors"))
    done = invoke("run", tmp_path / "recipe.yaml", "--model", base.folder, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["quality"] and requests == [] and (report["speed"], report["speed_note"]) == (None, None)
    assert "speed" not in done.stdout and "Speed" not in (tmp_path / "out" / "report.md").read_text()
