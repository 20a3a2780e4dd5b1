"""The base is compared with stock transformers before a run, once; what is found, and what it is found by."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from random_models import load_stock, make_model
from stock_here import answering, ask_here

from compress.errors import DscompressError, ModelError, VerificationError
from compress.evaluation import base as base_module
from compress.evaluation import stock
from compress.evaluation.base import check_base, continuations
from compress.evaluation.stock import Answer, Request
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.system.progress import Reporter

PROMPTS = ["The library"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model")


class Desk:
    """A base, and a stock transformers that counts what it is asked."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.cache = folder, folder.parent / "evaluations"
        self.requests: list[Request] = []
        self.change: Callable[[Answer], Answer] = lambda answer: answer
        self.memory: int | None = None
        self.dtype = torch.bfloat16
        monkeypatch.setattr(base_module, "asked", answering(self.ask))

    def ask(self, request: Request) -> Answer:
        self.requests.append(request)
        return self.change(ask_here(request))

    def context(self) -> Context:
        probe = torch.arange(1, 20)[None]
        return Context(torch.device("cpu"), self.dtype, None, probe, Reporter(quiet=True), False, self.memory)

    @property
    def kept(self) -> list[Path]:
        """What lies in the cache, but for locks."""
        return [path for path in self.cache.rglob("*") if path.suffix != ".lock"]

    def check(self, fresh: bool = False, prompts: list[str] | None = None) -> None:
        check_base(Checkpoint(self.folder), "id", self.context(), self.cache, prompts or [], fresh)


@pytest.fixture
def desk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(folder, monkeypatch)


def test_asked_once_for_a_base_and_its_side_files(desk: Desk) -> None:
    for count, again in ((1, desk.check), (1, desk.check), (2, lambda: desk.check(fresh=True))):
        again()
        assert len(desk.requests) == count
    desk.dtype = torch.float32
    desk.check()
    (desk.folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    desk.check()
    assert len(desk.requests) == 4


def test_one_request_gives_the_continuations_too(desk: Desk) -> None:
    desk.check(prompts=PROMPTS)
    base = Checkpoint(desk.folder)
    texts = continuations(base, "id", PROMPTS, desk.context(), desk.cache)
    assert len(desk.requests) == 1
    assert texts == ask_here(Request(str(desk.folder), "cpu", "bfloat16", prompts=PROMPTS)).continuations
    (desk.folder / "chat_template.jinja").write_text("{{ messages[0].content }} said")
    desk.check(prompts=PROMPTS)
    corrected = continuations(base, "id", PROMPTS, desk.context(), desk.cache)
    assert corrected == ask_here(Request(str(desk.folder), "cpu", "bfloat16", prompts=PROMPTS)).continuations != texts


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (
            lambda answer: Answer(answer.logits * 1.1, []),
            VerificationError,
            "FOLDER: transformers computes other logits from this folder than its tensors give when they are streamed "
            "(largest difference NUMBER, allowed NUMBER), so no figure would be right; save it anew with transformers "
            "(from_pretrained, then save_pretrained) and use that folder",
        ),
        (
            lambda answer: Answer(None, [], "KeyError: 'mine'"),
            ModelError,
            "FOLDER: transformers can't open this model (KeyError: 'mine'); mend the folder until "
            "AutoModelForCausalLM.from_pretrained does",
        ),
        (
            lambda answer: Answer(answer.logits, [], "TypeError: no"),
            ModelError,
            "FOLDER: transformers opens this model and can't generate with it (TypeError: no); mend or remove its "
            "generation_config.json, or set evaluate.prompts: []",
        ),
    ],
    ids=["other logits", "not opened", "no generation"],
)
def test_what_stops_a_run(
    change: Callable[[Answer], Answer], kind: type[DscompressError], said: str, desk: Desk
) -> None:
    desk.change = change
    with pytest.raises(kind) as caught:
        desk.check()
    pattern = re.escape(said).replace("FOLDER", re.escape(str(desk.folder))).replace("NUMBER", r"[\d.e-]+")
    assert re.fullmatch(pattern, str(caught.value))
    assert desk.kept == []


def test_a_base_that_does_not_fit_is_not_asked_and_nothing_is_kept(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Reporter, "say", lambda self, line: lines.append(line))
    desk.memory = 1
    desk.check()
    assert desk.requests == [] and desk.kept == []
    assert lines == [
        "the base was not compared with stock transformers: the stock loader needs about 0.0 GiB and 0.0 GiB are free; "
        "not asked"
    ]
    desk.memory = None
    desk.change = lambda answer: Answer(None, [], "torch.OutOfMemoryError: CUDA out of memory", short=True)
    desk.check()
    assert lines[-1] == (
        "the base was not compared with stock transformers: torch.OutOfMemoryError: CUDA out of memory"
    )
    assert desk.kept == []


def test_a_process_of_its_own_gives_logits_also_where_it_can_not_generate(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    tokens = list(range(1, 20))
    with stock.asked(Request(str(folder), "cpu", "float32", tokens, PROMPTS)) as wait:
        answer = wait()
    assert answer.failure is not None and answer.failure.startswith("TypeError: ")
    expected = load_stock(folder, torch.float32)(torch.tensor([tokens]), use_cache=False).logits[0]
    assert answer.logits is not None and torch.equal(answer.logits, expected)


def test_a_kept_loader_answers_one_request_after_another_and_is_replaced_where_it_fails(folder: Path) -> None:
    tokens = list(range(1, 20))
    expected = load_stock(folder, torch.float32)(torch.tensor([tokens]), use_cache=False).logits[0]

    def logits() -> torch.Tensor | None:
        answer = stock.ask(Request(str(folder), "cpu", "float32", tokens))
        return answer.logits

    with stock.kept_ready():
        assert stock._kept is not None
        (first,) = stock._kept
        for _ in range(2):
            found = logits()
            assert found is not None and torch.equal(found, expected)
        with stock.kept_ready():  # of a run in a sweep: the loader is the sweep's
            assert stock._kept == [first] and first.ready
        assert first.ready
        stock.start_anew()
        (second,) = stock._kept
        assert second is not first and not first.ready and second.ready
        first = second
        refused = stock.ask(Request(str(folder / "nothing"), "cpu", "float32", tokens))
        assert refused.failure is not None and refused.logits is None and not first.ready
        found = logits()
        assert found is not None and torch.equal(found, expected)
    assert stock._kept is None and not first.ready


def test_what_a_model_prints_is_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import builtins, json\n"
        "loads = json.loads\n"
        "def chatty(*given, **more):\n"
        "    print('done', flush=True)\n"
        "    return loads(*given, **more)\n"
        "json.loads = chatty\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = stock.ask(Request(str(folder), "cpu", "float32", [1, 2, 3], PROMPTS))
    assert answer.failure is None and len(answer.continuations) == 1 and answer.logits is not None
