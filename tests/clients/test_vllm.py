"""Every format that is written here, opened by a real vLLM: `make clients` runs it.

Each is made from the trained tiny model by rounding, since what is tested is how files are read and not how well they
were made. What vLLM says goes to vllm.json beside this file when all have run, and from there into the README.
"""

import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_here import answering, ask_here
from vllm_table import CASES, FILE, MODELS, TIMED, TINY, Case

from compress.evaluation import served
from compress.evaluation.served import Engine, examine, find_engine, serve
from compress.evaluation.verify import STOCK, own_logits, probe_tokens
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.recipe.load import load_recipe
from compress.records import Report
from compress.runs.runner import run
from compress.system.machine import processor, versions
from compress.system.progress import Reporter

pytestmark = [pytest.mark.clients, pytest.mark.timeout(1800)]
SHOWN = {"opened", "passed", "note", "prompt", "continuation", "agreed", "gap", "speed"}
PARTS = {"formats": CASES, "timed": TIMED}
Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    found = find_engine(os.environ.get("DSCOMPRESS_VLLM"))
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("bases")
    return {name: resolve_model(reference, None, work, print) for name, reference in MODELS.items()}


@pytest.fixture(scope="module")
def found(engine: Engine) -> Iterator[dict[str, Rows]]:
    """What each case came to; written when all have run, be it in several runs on one day."""
    rows: dict[str, Rows] = {"formats": {}, "timed": {}}
    yield rows
    cpu, flags = processor()
    date = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    head = {"program": "vLLM", "version": engine.version, "date": date, "cpu": cpu, "cpu_flags": flags}
    head |= {"transformers": versions()["transformers"], "threads": torch.get_num_threads()}
    kept = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    if all(kept.get(key) == value for key, value in head.items()):
        rows = {part: kept[part] | rows[part] for part in rows}
    if (set(rows["formats"]), set(rows["timed"])) == (set(CASES), set(TIMED)):
        ordered = {part: {name: rows[part][name] for name in names} for part, names in PARTS.items()}
        FILE.write_text(json.dumps(head | ordered, indent=1) + "\n", encoding="utf-8")


def context(base: Path) -> Context:
    tokens = probe_tokens(base, False)
    return Context(torch.device("cpu"), torch.bfloat16, None, tokens[None], Reporter(quiet=True), False)


def made(case: Case, base: Path, folder: Path, **more: Any) -> tuple[Path, Report | None]:
    """The checkpoint of a case, and its report; the base itself has none."""
    if not case.stages:
        return base, None
    recipe = {"name": "client", "model": str(base), "output": str(folder), "stages": case.stages, "evaluate": False}
    calibration = {"source": str(Path(__file__).parents[2] / "calibration" / "text" / "general_en.jsonl.gz")}
    calibration |= {"samples": 8, "sequence_length": 128}
    report = run(load_recipe(recipe | {"calibration": calibration} | more), device="cpu", reporter=Reporter(quiet=True))
    assert report is not None and report.verified is not None and report.verified.passed
    return folder, report


@pytest.fixture(autouse=True)
def _stock_result_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.evaluation.verify.asked", answering(ask_here))


@pytest.mark.parametrize("name", CASES)
def test_vllm_opens_it_and_computes_what_our_reader_does(
    name: str, engine: Engine, bases: dict[str, Path], found: dict[str, Rows], tmp_path: Path
) -> None:
    case = CASES[name]
    base = bases[case.model]
    result, report = made(case, base, tmp_path / "result")
    said, _ = examine(Checkpoint(result), engine, probe_tokens(base, False).tolist(), context(base))
    stock = report.verified.loader == STOCK if report and report.verified else True
    found["formats"][name] = {"transformers": stock} | said.model_dump(mode="json", include=SHOWN)
    assert (said.opened, said.passed) == (case.opens, case.opens and case.same), said


@pytest.mark.parametrize("name", TIMED)
def test_speed_beside_the_base(
    name: str, engine: Engine, bases: dict[str, Path], found: dict[str, Rows], tmp_path: Path
) -> None:
    case = TIMED[name]
    base = bases[case.model]
    _, report = made(case, base, tmp_path / "result", serve={"python": str(engine.python)})
    if report is not None:
        said = report.served
    else:
        arguments = probe_tokens(base, False).tolist(), engine, context(base), tmp_path, True
        said = serve(Checkpoint(base), Checkpoint(base), ("base", "base"), *arguments)
    assert said is not None and said.passed and said.speed is not None, said
    found["timed"][name] = said.model_dump(mode="json", include=SHOWN)


def scaled(folder: Path) -> None:
    """One matrix of one layer is read as a quarter larger than it is."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.v_proj.weight_scale"] *= 1.25
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def turned(folder: Path) -> None:
    """Positions are turned otherwise."""
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (folder / "config.json").write_text(json.dumps(config))


def shifted(folder: Path) -> None:
    """The zero points of one matrix are off by one."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_zero_point"] ^= 0x11111111
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("fault", [scaled, turned, shifted])
def test_what_is_read_wrongly_does_not_pass(
    fault: Any, engine: Engine, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM opens a changed copy, our reader what it was made from."""
    name = "the same, group 64, not symmetric" if fault is shifted else "the same, group 64"
    result, _ = made(CASES[name], bases[TINY], tmp_path / "result")
    changed = tmp_path / "changed"
    shutil.copytree(result, changed)
    fault(changed)
    monkeypatch.setattr(served, "own_logits", lambda _, *rest: own_logits(Checkpoint(result), *rest))
    tokens = probe_tokens(bases[TINY], False).tolist()
    said, _ = examine(Checkpoint(changed), engine, tokens, context(bases[TINY]))
    assert said.opened and not said.passed, said
