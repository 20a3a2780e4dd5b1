"""As served: a stand-in for vLLM's environment answers, refuses, dies, hangs; what becomes of that in the run."""

import json
import shutil
import stat
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from desk import RUN, Desk
from random_models import load_stock, make_model, random_tokens

from compress.errors import RecipeError
from compress.evaluation import served, vllm_client
from compress.evaluation.served import VLLM, Engine, check_served, examine, find_engine, serve
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.load import load_recipe
from compress.records import Report
from compress.served_records import Apart, Served
from compress.system.programs import run_client
from compress.system.progress import Reporter

CPU = torch.device("cpu")
TOKENS = random_tokens(1, 24, 5)[0].tolist()
PACE = {
    "prefill_tokens_per_second": 900.0,
    "decode_tokens_per_second": 40.0,
    "loaded_bytes": 10**9,
    "peak_bytes": 2 * 10**9,
    "waited": 0.0,
}
# vLLM as a module: what the client uses of it, computed by transformers.
STAND_IN = """
import torch
from types import SimpleNamespace as Some
from transformers import AutoModelForCausalLM
class SamplingParams:
    def __init__(self, **how): self.__dict__.update(how)
class LLM:
    def __init__(self, model, dtype, **how):
        assert how["max_model_len"] >= 32 and how["enforce_eager"] and not how["enable_prefix_caching"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    @torch.no_grad()
    def generate(self, prompts, how, use_tqdm):
        tokens, said = list(prompts[0]["prompt_token_ids"]), []
        first = len(tokens)
        for _ in range(how.max_tokens):
            rows = self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
            tokens.append(int(rows[-1].argmax()))
            said.append({tokens[-1]: Some(logprob=float(rows[-1].max()))})
        known = [None] + [{t: Some(logprob=float(rows[i, t]))} for i, t in enumerate(tokens[1:first])]
        return [Some(prompt_logprobs=known, outputs=[Some(token_ids=tokens[first:], logprobs=said)])]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def answer(model: Path) -> dict[str, Any]:
    """What stock transformers says in bfloat16."""
    return answer_of(model)


def context(**more: Any) -> Context:
    return Context(CPU, torch.bfloat16, None, torch.tensor([TOKENS]), Reporter(quiet=True), False, **more)


def program(path: Path, body: str) -> Path:
    """An executable that stands in for the interpreter: its arguments are the client, a request and an answer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nif [ "$2" = --version ]; then echo 0.32.0; exit; fi\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def answering(path: Path, answer: dict[str, Any]) -> Engine:
    """An environment that always gives this answer, and notes that it was asked."""
    file = path.with_suffix(".answer")
    python = program(path, f'echo asked >> {path}.log; cp {file} "$3"')
    file.write_text(json.dumps(answer))
    return Engine(python, "0.32.0")


def is_gone(process: int) -> bool:
    """Whether a process has ended, which after a signal takes a moment."""
    status = Path(f"/proc/{process}/status")
    for _ in range(500):
        with suppress(OSError):
            if "State:\tZ" not in status.read_text():
                time.sleep(0.01)
                continue
        return True
    return False


def times_asked(engine: Engine) -> int:
    log = engine.python.with_name(f"{engine.python.name}.log")
    return len(log.read_text().splitlines()) if log.is_file() else 0


def answer_of(folder: Path, new: int = 48, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """What stock transformers says, in the client's words."""
    stock, tokens = load_stock(folder, dtype), list(TOKENS)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(stock(torch.tensor([tokens])).logits[0, -1].argmax()))
        rows = stock(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    said = [float(rows[i, token]) for i, token in enumerate(tokens[1:])]
    first = len(TOKENS) - 1
    return {
        "version": "0.32.0", "device": "cpu", "logprobs": said[:first], "continuation": tokens[len(TOKENS) :],
        "continuation_logprobs": said[first:], "pace": PACE,
    }  # fmt: skip


# What is compared


def test_the_client_and_our_reader_agree_where_vllm_computes_as_transformers(tmp_path: Path, model: Path) -> None:
    """The client runs in a process where `import vllm` finds a stand-in that computes by stock transformers."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "vllm" / "platforms.py").write_text("class current_platform:\n    device_type = 'cpu'\n")
    (tmp_path / "vllm-0.32.0.dist-info").mkdir()
    (tmp_path / "vllm-0.32.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    engine = find_engine(str(python))
    assert engine == Engine(python, "0.32.0")
    timing = {"prompt_tokens": 32, "new_tokens": 2, "rounds": 1}
    found, pace = examine(Checkpoint(model), engine, TOKENS, context(), timing)
    assert found.opened and found.passed, found
    assert found.prompt is not None and found.continuation is not None and pace is not None
    assert (found.prompt.tokens, found.continuation.tokens) == (23, 48)
    assert found.prompt.mean == pytest.approx(found.prompt.rounding)  # it rounds where our reader does
    assert set(pace) == set(PACE) and min(pace[name] for name in PACE if name != "waited") > 0


def test_differences_are_from_our_reader_in_float32(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    found, _ = examine(Checkpoint(model), answering(tmp_path / "python", answer), TOKENS, context())
    exact = load_stock(model, torch.float32)
    tokens = TOKENS + answer["continuation"]
    with torch.no_grad():
        rows = exact(torch.tensor([tokens])).logits[0].log_softmax(-1)
    wanted = rows[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]
    apart = (torch.tensor(answer["logprobs"] + answer["continuation_logprobs"]) - wanted).abs()
    for part, mine in ((found.prompt, apart[:23]), (found.continuation, apart[23:])):
        assert part is not None
        assert (part.mean, part.max) == pytest.approx((float(mine.mean()), float(mine.max())), abs=1e-4)
        assert part.tolerance == max(served.TOLERANCE * part.rounding, served.FLOOR)
    best = rows[23:-1].argmax(-1)
    other = (best != torch.tensor(answer["continuation"])).nonzero()
    assert found.agreed == (int(other[0]) if len(other) else 48)
    assert (found.gap is None) == (not len(other))


def test_a_first_other_token_is_told_with_its_gap(tmp_path: Path, model: Path) -> None:
    answer = answer_of(model, dtype=torch.float32)
    unlikely = (answer["continuation"][5] + 1) % 4096
    answer["continuation"][5] = unlikely
    found, _ = examine(Checkpoint(model), answering(tmp_path / "python", answer), TOKENS, context())
    tokens = TOKENS + answer["continuation"][:5]
    with torch.no_grad():
        last = load_stock(model, torch.float32)(torch.tensor([tokens])).logits[0, -1]
    assert found.agreed == 5
    assert found.gap == pytest.approx(float(last.max() - last[unlikely]), abs=1e-3)
    assert not found.passed  # its log-probability is not what our reader gives to that token


def test_another_model_does_not_pass(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    other = make_model(tmp_path / "other", rope_theta=20000.0)
    found, _ = examine(Checkpoint(other), answering(tmp_path / "python", answer), TOKENS, context())
    assert found.opened and not found.passed
    assert "differ by" in served.difference(found)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_no_numbers_never_pass(tmp_path: Path, model: Path, answer: dict[str, Any], value: float) -> None:
    answer = answer | {"logprobs": [*answer["logprobs"][:-1], value]}
    found, _ = examine(Checkpoint(model), answering(tmp_path / "python", answer), TOKENS, context())
    assert (found.opened, found.passed, found.prompt) == (True, False, None)
    assert served.difference(found) == "it gives log-probabilities that are no numbers"
    assert Served.model_validate_json(found.model_dump_json()) == found


def test_no_more_tokens_than_the_model_has_positions(tmp_path: Path, model: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(model, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 32}
    (short / "config.json").write_text(json.dumps(config))
    engine = Engine(program(tmp_path / "python", f'cp "$2" {tmp_path}/asked; exit 1'), "0.32.0")
    examine(Checkpoint(short), engine, TOKENS, context())
    asked = json.loads((tmp_path / "asked").read_text())
    assert len(asked["tokens"]) + asked["new_tokens"] <= asked["positions"] <= 32


def test_apart_passes_up_to_its_tolerance_and_never_nan() -> None:
    assert Apart(tokens=1, max=0.2, mean=0.1, rounding=0.04, tolerance=0.1).passed
    assert not Apart(tokens=1, max=0.2, mean=0.11, rounding=0.04, tolerance=0.1).passed
    assert not Apart(tokens=1, max=0.2, mean=float("nan"), rounding=0.04, tolerance=0.1).passed


# What goes wrong


FAILURES = {
    "refuses": (
        """echo '{"version": "0.32.0", "failure": "ValueError: no kernel for 3 bits"}' > "$3" """,
        "ValueError: no kernel for 3 bits",
    ),
    "dies without a word": ("exit 3", "ended without an answer"),
    "dies with words": ("echo loading; echo 'Bus error' >&2; exit 1", "ended without an answer (Bus error)"),
    "is killed": ("echo loading; kill -9 $$", "stopped by signal 9 (loading)"),
    "says much": (
        f"""echo '{{"failure": "ValueError: {"x" * 900}"}}' > "$3" """,
        f"ValueError: {'x' * (served._LONGEST - 16)} ...",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_what_vllm_said_is_quoted(tmp_path: Path, model: Path, case: str) -> None:
    body, note = FAILURES[case]
    engine = Engine(program(tmp_path / "python", body), "0.32.0")
    found, pace = examine(Checkpoint(model), engine, TOKENS, context())
    assert (found.opened, found.passed, found.note, pace) == (False, False, note, None)
    check = check_served(model, engine, CPU, torch.bfloat16, False)
    assert (check.passed, check.detail) == (False, f"vLLM 0.32.0: does not open it: {note}")


def test_one_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    python = program(tmp_path / "python", f"sleep 300 & echo $! > {tmp_path}/child; sleep 300")
    start = time.monotonic()
    answer = run_client(python, VLLM.client, {}, 0.5, {})
    assert answer == {"failure": "no answer in 0 s, so it was stopped"}
    assert time.monotonic() - start < 30
    child = int((tmp_path / "child").read_text())
    assert is_gone(child)


def test_an_interruption_ends_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = program(tmp_path / "python", f"echo $$ > {tmp_path}/group; sleep 300")
    usual = subprocess.Popen.wait

    def wait(self: Any, timeout: float | None = None) -> int:
        if timeout is None:
            return usual(self)
        while not (tmp_path / "group").is_file() or not (tmp_path / "group").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        run_client(python, VLLM.client, {}, 60, {})
    assert is_gone(int((tmp_path / "group").read_text()))


def test_where_memory_is_short_nothing_is_started(tmp_path: Path, model: Path) -> None:
    engine = answering(tmp_path / "python", {"failure": "asked"})
    found, _ = examine(Checkpoint(model), engine, TOKENS, context(max_memory=2**30))
    assert found.note == "it needs about 2.0 GiB and 1.0 GiB are free; not asked"
    assert times_asked(engine) == 0


def test_environments_without_vllm_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_engine(sys.executable) == (
        f"{sys.executable}: has no vLLM; name the Python of an environment that has it, or run make clients in a clone"
    )
    broken = tmp_path / "broken"
    broken.write_text("no program")
    broken.chmod(0o755)
    said = find_engine(str(broken))
    assert isinstance(said, str) and said.startswith(f"{broken}: can't be started (")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.system.programs.CLONE", tmp_path)
    assert find_engine(None) == (
        f"vLLM is not installed here and there is no .venv-vllm in {tmp_path}; run make clients in a clone, or name "
        "the Python of an environment that has it"
    )
    python = program(tmp_path / ".venv-vllm" / "bin" / "python", "exit 1")
    assert find_engine(None) == Engine(python, "0.32.0")


def test_an_error_without_words_is_told_by_its_line() -> None:
    with pytest.raises(AssertionError) as caught:
        assert not TOKENS
    caught.value.args = ()
    assert vllm_client.words_of(caught.value).startswith("AssertionError: assert not TOKENS (test_served.py:")
    assert vllm_client.words_of(ValueError("two\n  lines")) == "ValueError: two lines"


# In a run


def serving(tmp_path: Path, model: Path, result: Path, engine: Engine | str, fresh: bool = False) -> Served:
    names, cache = ("base", "result"), tmp_path / "cache"
    return serve(Checkpoint(model), Checkpoint(result), names, TOKENS, engine, context(), cache, fresh)


def test_base_and_result_are_timed_and_asked_once(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    engine = answering(tmp_path / "python", answer)
    found = serving(tmp_path, model, model, engine)
    assert found.passed and found.speed is not None and found.note is None
    assert found.speed.base.decode_tokens_per_second == found.speed.compressed.decode_tokens_per_second == 40
    assert (found.speed.prompt_tokens, found.speed.new_tokens) == (111, 16)  # all positions that it has, but one
    assert times_asked(engine) == 2
    assert serving(tmp_path, model, model, engine) == found and times_asked(engine) == 2
    assert serving(tmp_path, model, model, engine, fresh=True) == found and times_asked(engine) == 4
    newer = Engine(engine.python, "0.33.0")
    assert serving(tmp_path, model, model, newer).version == "0.33.0" and times_asked(engine) == 6


def test_what_a_busy_machine_gave_and_what_was_refused_is_not_kept(
    tmp_path: Path, model: Path, answer: dict[str, Any]
) -> None:
    busy = answering(tmp_path / "busy", answer | {"pace": PACE | {"waited": 0.4}})
    for count in (2, 4):
        found = serving(tmp_path, model, model, busy)
        assert found.speed is not None and found.speed.busy and times_asked(busy) == count
    refusing = answering(tmp_path / "refusing", {"failure": "ValueError: no"})
    for count in (1, 2):
        assert not serving(tmp_path, model, model, refusing).opened and times_asked(refusing) == count


def test_a_base_that_is_not_opened_leaves_the_verdict(tmp_path: Path, model: Path, answer: dict[str, Any]) -> None:
    file = answering(tmp_path / "answer", answer).python.with_suffix(".answer")
    failure = """echo '{"failure": "OSError: no"}' > "$3" """
    body = f"""if grep -q '"new_tokens": 1,' "$2"; then {failure}; else cp {file} "$3"; fi"""
    found = serving(tmp_path, model, model, Engine(program(tmp_path / "python", body), "0.32.0"))
    assert found.passed and found.speed is None
    assert found.note == "speed was not compared, for it does not open the base: OSError: no"


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    return Desk(tmp_path, ExitStack())


QUICK = [*RUN, "--set", "stages.0.format=gptq"]  # verified in this process


def report_of(desk: Desk) -> Report:
    return Report.model_validate_json(desk.file("out/report.json").read_text())


def test_a_run_ends_well_where_vllm_refuses(desk: Desk) -> None:
    line = "ValueError: Unsupported quantization config: bits=4"
    answering(desk.file("env/python"), {"version": "0.32.0", "failure": line})
    done = invoke(*QUICK, "--set", "serve.python=env/python")
    assert done.exit_code == 0, done.stderr
    found = report_of(desk).served
    assert found is not None and (found.opened, found.passed, found.note) == (False, False, line)
    assert f"served      vLLM 0.32.0 does not open it: {line}\n" in done.stdout
    assert f"warning: vLLM 0.32.0 does not open the result: {line}\n" in done.stderr
    for name in ("report.md", "report.html"):
        text = desk.file(f"out/{name}").read_text()
        assert "As served" in text and line in text


def test_a_run_ends_well_without_vllm_and_says_so_before_it_computes(desk: Desk) -> None:
    done = invoke(*QUICK, "--set", f"serve.python={sys.executable}")
    assert done.exit_code == 0, done.stderr
    note = (
        f"{sys.executable}: has no vLLM; name the Python of an environment that has it, or run make clients in a clone"
    )
    assert done.stderr.index(f"warning: serve: {note}\n") < done.stderr.index("verifying")
    assert f"served      vLLM was not asked: {note}\n" in done.stdout
    assert report_of(desk).served == Served(engine="vLLM", opened=False, passed=False, note=note)


def test_a_run_without_serve_asks_nobody(desk: Desk) -> None:
    done = invoke(*QUICK)
    assert done.exit_code == 0 and "served" not in done.stdout
    assert report_of(desk).served is None and "As served" not in desk.file("out/report.md").read_text()


def test_something_else_is_a_loud_warning(desk: Desk) -> None:
    said = {"logprobs": 63 * [-1.0], "continuation": 48 * [7], "continuation_logprobs": 48 * [-1.0]}
    answering(desk.file("env/python"), {"version": "0.32.0", "device": "cpu", "pace": PACE} | said)
    done = invoke(*QUICK, "--set", "serve.python=env/python")
    assert done.exit_code == 0, done.stderr
    found = report_of(desk).served
    assert found is not None and found.opened and not found.passed
    assert "warning: vLLM 0.32.0 opens the result and differs by more than rounding explains: log-p" in done.stderr
    assert "served      vLLM 0.32.0 on a CPU opens it and DIFFERS: " in done.stdout
    assert "do not serve it there" in desk.file("out/report.html").read_text()


def test_verify_asks_vllm_too(desk: Desk, model: Path) -> None:
    python = answering(desk.file("env/python"), {"version": "0.32.0", "failure": "ValueError: no"}).python
    done = invoke("verify", model, "--device", "cpu", "--serve", python)
    assert done.exit_code == 1
    assert done.stdout.endswith("FAIL served: vLLM 0.32.0: does not open it: ValueError: no\nFAIL\n")
    missing = invoke("verify", model, "--device", "cpu", "--serve", sys.executable)
    assert missing.exit_code == 2 and missing.stdout == ""
    assert missing.stderr == (
        f"error: --serve {sys.executable}: {sys.executable}: has no vLLM; name the Python of an environment that has "
        "it, or run make clients in a clone\n"
    )


# In a recipe


def recipe(folder: Path, serve: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(f"name: a\nmodel: org/m\noutput: out\nstages: [{{kind: quantize}}]\nserve: {serve}\n")
    return file


@pytest.mark.parametrize(("written", "on"), [("true", True), ("false", False), ("null", False), ("{}", True)])
def test_serve_is_a_switch(tmp_path: Path, written: str, on: bool) -> None:
    found = load_recipe(str(recipe(tmp_path, written))).serve
    assert (found is not None) == on
    assert found is None or found.python is None


def test_an_interpreter_starts_at_the_recipe_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    found = load_recipe(str(recipe(tmp_path, "{python: env/python}"))).serve
    assert found is not None and found.python == str(tmp_path / "env" / "python")


@pytest.mark.parametrize(
    ("written", "line"),
    [
        ("{python: nowhere/python}", "nowhere/python: no such file; the folder"),
        ("{python: env}", "env: is no program; name an environment's bin/python, or use serve: true"),
        ("{pyton: env}", "serve.pyton: unknown key; did you mean python?"),
        ("maybe", "serve:"),
    ],
)
def test_mistakes_in_serve(tmp_path: Path, written: str, line: str) -> None:
    (tmp_path / "env").mkdir()
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(recipe(tmp_path, written)))
    assert len(caught.value.problems) == 1 and line in caught.value.problems[0]
    assert caught.value.problems[0].startswith(f"{tmp_path / 'r.yaml'}:5: serve")
