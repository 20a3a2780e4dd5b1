"""Tasks: lm-eval's own command gives the same scores, streamed or stock; answers are kept; what can't be is refused."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from tasks_here import answer_here
from transformers import AutoTokenizer

from compress.errors import NumericalError, UserError
from compress.evaluation.tasks.ask import Request, Scored, Scores, score
from compress.evaluation.tasks.compared import compared
from compress.evaluation.tasks.kept import Kept, KeptLM
from compress.evaluation.tasks.names import folders_of, task_problems
from compress.evaluation.tasks.worker import evaluate
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import EvaluateSpec
from compress.system.progress import Reporter

FILES = Path(__file__).parent.parent / "data" / "tasks"
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries that lm-eval brings


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Single requests to a small model gain nothing from a second thread, and lose where both wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def request(model: Path, folder: Path, *names: str, **others: Any) -> Request:
    folder.mkdir(exist_ok=True)
    plain = Request(
        str(model), list(names), str(FILES), 6, None, False, "cpu", "float32", False, False, str(folder), ["a model"]
    )
    return replace(plain, **others)


def ask(asked: Request) -> dict[str, Any]:
    """What the process of its own finds, here."""
    return evaluate(asked, lambda total, done: None)


def answers(folder: Path) -> dict[str, Any]:
    return {key: answer for file in folder.glob("*.jsonl") for key, answer in Kept(file).answers.items()}


def context_of(dtype: torch.dtype) -> Context:
    return Context(torch.device("cpu"), dtype, None, torch.zeros((1, 2), dtype=torch.long), Reporter(quiet=True), False)


@pytest.fixture(scope="module")
def in_bf16(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """The tiny model's scores, in bfloat16, by the process of its own."""
    spec = EvaluateSpec(tasks=["endings", "hellaswag", "last_words", "sums"], task_files=str(FILES), limit=6)
    folder = tmp_path_factory.mktemp("kept")
    return score(Checkpoint(tiny_model), "id", spec, context_of(torch.bfloat16), folder, False, False, "tasks")


def test_lm_evals_own_command_gives_the_same_scores(in_bf16: Scores, tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--limit", "6"]
    command += ["--model_args", f"pretrained={tiny_model},dtype=bfloat16", "--include_path", str(FILES)]
    command += ["--tasks", "endings,local,last_words,sums", "--output_path", str(tmp_path), "--log_samples"]
    idle = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, env=idle)
    found = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    for name in ("endings", "hellaswag", "last_words", "sums"):
        ours = in_bf16.tasks[name].scores[name]
        assert ours == {key: found[name][key] for key in ours}
        samples = next(tmp_path.rglob(f"samples_{name}_*.jsonl")).read_text().splitlines()
        metric = in_bf16.tasks[name].metric.split(" ")[0]
        theirs = sorted((sample["doc_id"], sample[metric]) for sample in map(json.loads, samples))
        assert [value for _, value in in_bf16.tasks[name].items] == [value for _, value in theirs]
    assert {"acc,none", "acc_norm,none"} <= in_bf16.tasks["endings"].scores["endings"].keys()


def test_what_the_report_says_of_a_task(in_bf16: Scores) -> None:
    metrics = {name: (task.metric, task.version, task.fewshot, len(task.items)) for name, task in in_bf16.tasks.items()}
    assert metrics["endings"] == ("acc_norm", "2.0", 0, 6)
    assert metrics["hellaswag"][0] == "acc_norm"
    assert metrics["last_words"] == ("acc", "1.0", 0, 6)
    assert metrics["sums"][:1] == ("exact_match",)
    assert in_bf16.batch == 1
    assert len({item for item, _ in in_bf16.tasks["endings"].items}) == 6


def test_a_streamed_model_answers_as_the_stock_one(tiny_model: Path, tmp_path: Path) -> None:
    tasks = ("endings", "last_words", "sums")
    stock = ask(request(tiny_model, tmp_path / "stock", *tasks[:2]))
    streamed = ask(request(tiny_model, tmp_path / "streamed", *tasks, streamed=True))
    assert streamed["skipped"] == {"sums": "generates text, which takes a whole model in memory"}
    assert streamed["rows"] == stock["rows"]
    one, other = answers(tmp_path / "stock"), answers(tmp_path / "streamed")
    assert one.keys() == other.keys()
    assert len(one) == 4 * 6 + 6
    for key in one:
        assert other[key][0] == pytest.approx(one[key][0], abs=1e-3)
        assert other[key][1] == one[key][1]


def test_a_group_that_lm_eval_scores_as_one_is_one_row(tiny_model: Path, tmp_path: Path) -> None:
    """Its metric must be that of all members; `endings` has acc_norm, so the pair falls into two."""
    apart = ask(request(tiny_model, tmp_path, "pair", limit=3))
    assert list(apart["rows"]) == ["endings", "last_words"]
    files = tmp_path / "files"
    files.mkdir()
    for name in ("rows.py", "lambada.jsonl", "last_words.yaml"):
        (files / name).write_bytes((FILES / name).read_bytes())
    (files / "again.yaml").write_text("include: last_words.yaml\ntask: again\n")
    (files / "both.yaml").write_text("group: both\ntask: [last_words, again]\naggregate_metric_list: [{metric: acc}]\n")
    both = ask(request(tiny_model, tmp_path, "both", limit=3, files=str(files)))
    assert list(both["rows"]) == ["both"]
    assert len(both["rows"]["both"]["items"]) == 6
    assert set(both["rows"]["both"]["scores"]) == {"last_words", "again"}


def test_killed_at_any_moment_what_was_answered_is_not_asked_again(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = EvaluateSpec(tasks=["endings"], task_files=str(FILES), limit=24)
    code = f"""
from pathlib import Path
import torch
from compress.evaluation.tasks.ask import score
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import EvaluateSpec
from compress.system.progress import Reporter
spec = EvaluateSpec.model_validate_json({spec.model_dump_json()!r})
probe = torch.zeros((1, 2), dtype=torch.long)
context = Context(torch.device("cpu"), torch.float32, None, probe, Reporter(quiet=True), False)
score(Checkpoint(Path({str(tiny_model)!r})), "id", spec, context, Path({str(tmp_path)!r}), False, False, "tasks")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.rglob("*.jsonl")):
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9, "it was at work"
    time.sleep(0.5)
    [file] = tmp_path.rglob("*.jsonl")
    with file.open("ab") as torn:
        torn.write(b'{"cut off')
    before = Kept(file).answers
    assert 0 < len(before) < 4 * 24
    arguments = Checkpoint(tiny_model), "id", spec, context_of(torch.float32)
    resumed = score(*arguments, tmp_path, False, False, "tasks")
    assert Kept(file).answers.items() >= before.items()
    assert sum(len(json.loads(line)) for line in file.read_text().splitlines()) == 4 * 24, "each once"
    monkeypatch.setattr("compress.evaluation.tasks.ask._answer", answer_here)
    assert resumed == score(*arguments, tmp_path / "uninterrupted", False, False, "tasks")


class Counting:
    """A backend whose answers are made up."""

    def __init__(self, value: float = -1.0, until: int = 1 << 30) -> None:
        self.value, self.until = value, until
        self.asked: list[list[Any]] = []

    def answer(self, kind: str, requests: Sequence[Any], rows: int) -> list[Any]:
        if len(self.asked) == self.until:
            raise KeyboardInterrupt
        self.asked.append([request[0] for request in requests])
        return [(self.value - len(request[0][1]), False) for request in requests]


def kept_model(
    tiny_model: Path, folder: Path, backend: Counting, rows: Callable[[int], int], positions: int = 64
) -> KeptLM:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return KeptLM(tokenizer, positions, lambda: backend, folder, ["a model"], rows, 40, lambda total, done: None)


def requests(count: int, task: str = "one") -> list[Instance]:
    return [
        Instance("loglikelihood", {}, ("The library" + " of the town" * (n % 5), f" number {n}"), 0, (task, n, 1))
        for n in range(count)
    ]


@pytest.mark.parametrize("rows", [1, 3])
def test_an_interrupted_task_goes_on_with_the_same_company(rows: int, tiny_model: Path, tmp_path: Path) -> None:
    whole, first, second = Counting(), Counting(until=2), Counting()
    (tmp_path / "whole").mkdir()
    expected = kept_model(tiny_model, tmp_path / "whole", whole, lambda _: rows).loglikelihood(requests(20))
    with pytest.raises(KeyboardInterrupt):
        kept_model(tiny_model, tmp_path, first, lambda _: rows).loglikelihood(requests(20))
    resumed = kept_model(tiny_model, tmp_path, second, lambda _: rows)
    assert resumed.loglikelihood(requests(20)) == expected
    assert first.asked + second.asked == whole.asked
    assert expected == [(-1.0 - len(f" number {n}"), False) for n in range(20)]


def test_one_at_a_time_answers_are_shared_by_limits_and_several_at_a_time_not(tiny_model: Path, tmp_path: Path) -> None:
    for rows, left in ((1, 5), (3, 25)):
        for count in (20, 25):
            backend = Counting()
            kept_model(tiny_model, tmp_path, backend, lambda _, rows=rows: rows).loglikelihood(requests(count))
        assert sum(map(len, backend.asked)) == left


def test_log_likelihoods_that_are_no_numbers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A model of NaN would score 100 % wherever the first choice is right."""
    for value in (float("nan"), float("-inf")):
        (tmp_path / str(value)).mkdir()
        model = kept_model(tiny_model, tmp_path / str(value), Counting(value), lambda _: 1)
        with pytest.raises(NumericalError, match=f"one: the model's log-likelihood of an item is {value}"):
            model.loglikelihood(requests(3))


def test_items_that_do_not_fit_are_refused_before_anything_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    backend = Counting()
    model = kept_model(tiny_model, tmp_path, backend, lambda _: 1, positions=12)
    with pytest.raises(
        UserError, match="two: item [0-9] takes .* tokens and the model has 12 positions; use fewer examples"
    ):
        model.loglikelihood([*requests(1), *requests(5, "two")])
    assert backend.asked == []
    writes = Instance("generate_until", {}, ("The library", {"until": ["x"], "max_gen_toks": 15}), 0, ("three", 0, 1))
    with pytest.raises(UserError, match="three: item 0 takes 1[0-9] tokens"):
        model.generate_until([writes])


def test_examples_that_do_not_fit_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"tasks: endings: item \d+ takes 1,\d+ tokens and the model has 1,024 positions"
    ):
        ask(request(tiny_model, tmp_path, "endings", fewshot=30, limit=2))
    assert not list(tmp_path.glob("*.jsonl"))


def test_prompts_by_the_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat: the model has no chat template; leave it out"):
        ask(request(tiny_model, tmp_path / "kept", "endings", chat=True))
    chatting = _with_noise(tiny_model, tmp_path / "chatting", 0)
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    (chatting / "chat_template.jinja").write_text(template)
    plain, worded = (
        ask(request(chatting, tmp_path / f"{chat}", "endings", limit=3, chat=chat))["rows"]["endings"]["items"]
        for chat in (False, True)
    )
    assert not {item for item, _ in plain} & {item for item, _ in worded}, "another prompt is another item"


def test_a_task_without_data_is_refused_by_name(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        ask(request(tiny_model, tmp_path, "arc_easy", "openbookqa", "endings"))
    lines = str(caught.value).splitlines()
    assert [line.partition(" can't")[0] for line in lines] == ["tasks: arc_easy", "tasks: openbookqa"]
    assert "its data set (allenai/ai2_arc) is not here and can't be fetched" in lines[0]
    assert lines[0].endswith("or name a folder of task files that read local data (task_files)")


def test_a_task_without_a_score_for_each_item_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name in ("rows.py", "lambada.jsonl", "last_words.yaml"):
        (tmp_path / "files" / name).write_bytes((FILES / name).read_bytes())
    (tmp_path / "files" / "texts.yaml").write_text(
        "include: last_words.yaml\ntask: texts\nmetric_list:\n"
        "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    )
    with pytest.raises(UserError, match=r"texts: its metrics \(perplexity\) are no means over items"):
        ask(request(tiny_model, tmp_path, "texts", files=str(tmp_path / "files")))


def test_a_task_that_is_named_twice_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="endings is in two of pair, endings; keep one"):
        ask(request(tiny_model, tmp_path, "pair", "endings"))


def test_unknown_tasks_get_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert task_problems(["endings", "hellaswag", "mmlu", "ai2_arc"], FILES, "evaluate.tasks") == []
    assert task_problems(["enddings", "arc_eesy"], FILES, "evaluate.tasks") == [
        f"evaluate.tasks: enddings is no task of lm-eval or of {FILES}; did you mean endings?",
        f"evaluate.tasks: arc_eesy is no task of lm-eval or of {FILES}; did you mean arc_easy?",
    ]
    assert task_problems(["arc_easy", "arc_easy"], None, "--tasks") == ["--tasks: arc_easy is there twice; keep one"]
    assert task_problems(["a"], Path("/nowhere"), "--tasks") == ["--tasks: /nowhere: no such folder of task files"]
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    assert task_problems(["arc_easy"], None, "evaluate.tasks") == [
        "evaluate.tasks: lm_eval is not installed; pip install 'dscompress[tasks]'"
    ]


def test_only_plain_tasks_are_looked_for_in_their_folder_alone() -> None:
    folders = folders_of(["hellaswag", "arc_easy"])
    assert folders is not None
    assert [folder.name for folder in folders] == ["arc", "hellaswag"]
    assert folders_of(["hellaswag", "mmlu"]) is None
    assert folders_of(["ai2_arc"]) is None


def scores(*values: float, metric: str = "acc", items: str = "item") -> Scores:
    task = Scored(metric, [(f"{items} {n}", value) for n, value in enumerate(values)], 0, "1.0", {})
    return Scores({"one": task, "two": task}, {}, 1, False)


def test_models_that_were_asked_something_else_are_not_compared() -> None:
    for other in (scores(1.0, items="another"), scores(1.0, metric="f1"), scores(1.0, 1.0), Scores({}, {}, 1, False)):
        with pytest.raises(UserError, match="one: base and result were not asked the same items"):
            compared(scores(1.0), other, "float32", False)


def test_one_decision_over_all_tasks() -> None:
    base = scores(*[1.0] * 100)
    same, decision = compared(base, base, "float32", False)
    assert decision is not None
    assert (decision.verdict, decision.n, decision.p_value) == ("no difference shown", 200, 1.0)
    assert same["one"].delta == 0.0
    damaged = scores(*[0.0] * 6, *[1.0] * 94)
    tasks, decision = compared(base, damaged, "float32", False)
    assert decision is not None
    assert (decision.verdict, decision.flips, decision.delta) == ("worse", (12, 0), -0.06)
    assert decision.p_value == pytest.approx(2 / 2**12)
    assert tasks["one"].holm == pytest.approx(2 * 2 / 2**6)
    back = compared(damaged, base, "float32", False)[1]
    assert back is not None
    assert back.verdict == "better"
    between, decision = compared(scores(*[0.5] * 40), scores(*[0.4] * 40), "float32", False)
    assert decision is not None
    assert (decision.verdict, decision.method[:19]) == ("worse", "two-sided sign-flip")


def test_a_model_damaged_on_purpose_is_found(tiny_model: Path, tmp_path: Path) -> None:
    """It knows in which order words come, until noise is added to its weights; little noise is not called a loss."""
    noisy = {share: _with_noise(tiny_model, tmp_path / f"{share}", share) for share in (0.002, 0.6)}
    spec = {"tasks": ["word_order"], "limit": None}
    found = {
        share: _scores(request(model, tmp_path / "kept", **spec, identity=[share])) for share, model in noisy.items()
    }
    base = _scores(request(tiny_model, tmp_path / "kept", **spec))
    tasks, decision = compared(base, found[0.6], "float32", False)
    assert decision is not None
    assert tasks["word_order"].base > 0.8
    assert tasks["word_order"].n == 48
    assert (decision.verdict, decision.p_value < 0.01) == ("worse", True)
    assert decision.delta <= -(decision.smallest or 1) / 2
    close = compared(base, found[0.002], "float32", False)[1]
    assert close is not None
    assert close.verdict == "no difference shown"


def _with_noise(model: Path, folder: Path, share: float) -> Path:
    """A copy of a model with normal noise in its matrices, of this share of their own size."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * share
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def _scores(asked: Request) -> Scores:
    rows = ask(asked)["rows"]
    return Scores({name: Scored(**row) for name, row in rows.items()}, {}, 1, False)
