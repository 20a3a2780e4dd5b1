"""Evaluates the tasks of one request on one checkpoint, in a process of its own, as `ask` starts it.

lm-eval loads the tasks, words the prompts and scores the answers; what is here chooses each task's metric and writes
down every item's score. What is read of lm-eval's results is checked against the items.

    python -m compress.evaluation.tasks.worker < PATH_OF_REQUEST
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import DscompressError, UserError
from compress.evaluation.tasks.ask import ANSWER, Request
from compress.evaluation.tasks.names import folders_of, own_tasks, read_task_file
from compress.system.distributed import end_with_parent
from compress.system.fingerprint import fingerprint

_PREFERRED = ("acc_norm", "acc", "exact_match")
_GPU_LOGITS = 4 * 2**30  # bytes of logits that one pass may put out
_MOST_ROWS = 64
_TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 32768}  # after which answers are written down
_STREAMED_AT_ONCE = 2**31  # bytes of hidden states, likewise
INLINE = "dscompress"


@dataclass(frozen=True)
class Row:
    """A line of the report: a task, or a group whose score lm-eval makes of all its items alike.

    Args:
        name: as the recipe or the group calls it.
        leaves: names of its tasks.
        metric: of which the score is the mean.
    """

    name: str
    leaves: list[str]
    metric: str


def main() -> None:
    """In the new process: read the request, evaluate, write the answer."""
    end_with_parent()
    path = Path(sys.stdin.read().strip())
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no part of the answer
    request = Request(**json.loads(path.read_text(encoding="utf-8")))

    def progress(total: int, done: int) -> None:
        print(total, done, file=lines, flush=True)

    try:
        found: dict[str, Any] = evaluate(request, progress)
    except DscompressError as error:
        found = {"refused": str(error), "user": isinstance(error, UserError)}
    (path.parent / ANSWER).write_text(json.dumps(found), encoding="utf-8")


def evaluate(request: Request, progress: Any) -> dict[str, Any]:
    """Each row's metric, score and items; see `compress.evaluation.tasks.ask`."""
    import torch
    from lm_eval.evaluator import simple_evaluate
    from transformers.utils.logging import disable_progress_bar

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    disable_progress_bar()
    files = None if request.files is None else Path(request.files)
    manager = _manager(request.tasks, files)
    found = _load(request.tasks, files, manager)
    rows = [row for each in found for row in _rows(each)]
    skipped = _skipped(found) if request.streamed else {}
    rows = [row for row in rows if not skipped.keys() & {*row.leaves}]
    leaves = {leaf.task_name: leaf for each in found for leaf in _leaves(each)}
    if not rows:
        return {"rows": {}, "skipped": skipped, "batch": 1}
    model = _model(request, progress)
    with torch.no_grad():
        results: Any = simple_evaluate(
            model=model, tasks=[leaves[name] for row in rows for name in row.leaves], num_fewshot=request.fewshot,
            limit=request.limit, bootstrap_iters=0, task_manager=manager, apply_chat_template=request.chat,
        )  # fmt: skip
    return {"rows": {row.name: _scores(row, results) for row in rows}, "skipped": skipped, "batch": model.used_rows}


def _manager(names: Sequence[str], files: Path | None) -> Any:
    """What knows the tasks of these names, and no more than needed."""
    from lm_eval.tasks import TaskManager

    own = own_tasks(files)
    folders = folders_of([stock for name in names for stock in _stock_needed(name, own)])
    paths = [*(folders or ()), *(() if files is None else (files,))]
    return TaskManager(include_path=[str(path) for path in paths], include_defaults=folders is None)


def _stock_needed(name: str, own: Mapping[str, Path]) -> Iterator[str]:
    """What lm-eval's own files must define for this name: nothing for a task of the user's."""
    file = own.get(name)
    if file is None or _is_member(name, file):
        yield name
    elif (content := read_task_file(file)).get("group") == name:
        members = content.get("task")
        for member in members if isinstance(members, list) else ():
            inner = member.get("task", member.get("group")) if isinstance(member, dict) else member
            if isinstance(inner, str) and inner != name:
                yield from _stock_needed(inner, own)


def _is_member(name: str, file: Path) -> bool:
    """Whether a task file defines a task within a group: one of lm-eval's own, read from somewhere else."""
    content = read_task_file(file)
    return name not in (content.get("task"), content.get("group"))


def _load(names: Sequence[str], files: Path | None, manager: Any) -> list[Any]:
    """Tasks and groups of lm-eval, their data read; all that can't be is told at once.

    Raises:
        UserError: naming them.
    """
    own, found, problems = own_tasks(files), [], []
    for name in names:
        try:
            loaded = manager.load([_spec(name, own.get(name))])
        except Exception as error:  # tasks run code and readers of any kind
            problems.append(f"tasks: {name} can't be loaded: {_reason(error, _source(name, manager))}")
            continue
        tops = [group for group in loaded["groups"].values() if group.name == name]
        found += tops or list(loaded["tasks"].values())
    doubled = [leaf.task_name for each in found for leaf in _leaves(each)]
    for name in sorted({name for name in doubled if doubled.count(name) > 1}):
        problems.append(f"tasks: {name} is in two of {', '.join(names)}; keep one")
    if problems:
        raise UserError("\n".join(problems))
    return found


def _spec(name: str, file: Path | None) -> Any:
    """What lm-eval is asked for: a name; for a member of a group in the user's files, that group with it alone."""
    if file is None or not _is_member(name, file):
        return name
    from lm_eval.tasks._yaml_loader import load_yaml  # here functions are read too

    whole = load_yaml(file, resolve_func=True)
    return {
        "group": INLINE,
        "task": [each for each in whole["task"] if isinstance(each, dict) and each["task"] == name],
    }


def _source(name: str, manager: Any) -> str | None:
    """The data set of a task of lm-eval's own."""
    entry = manager.task_index.get(name)
    path = entry.cfg.get("dataset_path") if entry is not None and entry.cfg else None
    return path if isinstance(path, str) else None


def _reason(error: Exception, source: str | None) -> str:
    said = f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(".")
    if isinstance(error, OSError):  # of the hub and of the file system alike
        data = f"its data set ({source})" if source else "its data"
        return (
            f"{data} is not here and can't be fetched ({said}); run it once with a connection, or name a folder of "
            "task files that read local data (task_files)"
        )
    return f"{said}; leave it out"


def _leaves(item: Any) -> list[Any]:
    found: list[Any] = item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item]
    return found


def _rows(item: Any) -> Iterator[Row]:
    """What the report has for a task or a group.

    Raises:
        UserError: a task that has no score per item.
    """
    if not hasattr(item, "get_all_tasks"):
        yield Row(item.task_name, [item.task_name], _metric(item))
        return
    leaves = _leaves(item)
    metrics = {_metric(leaf) for leaf in leaves}
    pooled = {
        each.metric
        for each in item.aggregate_metric_list or ()
        if each.weight_by_size and getattr(each.aggregation, "__name__", each.aggregation) == "mean"
    }
    if len(metrics) == 1 and metrics <= pooled:
        yield Row(item.name, [leaf.task_name for leaf in leaves], metrics.pop())
        return
    for child in item:
        yield from _rows(child)


def _metric(task: Any) -> str:
    """The metric of a task: a mean over items of which more is better; accuracy by length before plain accuracy."""
    better: Any = task.higher_is_better()
    means = [name for name, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    means = [name for name in means if better.get(name, True)]
    if not means:
        raise UserError(
            f"tasks: {task.task_name}: its metrics ({', '.join(task.aggregation())}) are no means over items "
            "of which more is better, so items can't be compared; leave it out (evaluate.text measures perplexity)"
        )
    return next((name for name in _PREFERRED if name in means), means[0])


def _skipped(found: Sequence[Any]) -> dict[str, str]:
    """Tasks that a model which is not held can't do, and why."""
    why = "generates text, which takes a whole model in memory"
    return {
        leaf.task_name: why
        for each in found
        for leaf in _leaves(each)
        if leaf.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood")
    }


def _model(request: Request, progress: Any) -> Any:
    import torch
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig, AutoTokenizer

    from compress.evaluation.tasks.kept import KeptLM

    trust = request.trust_remote_code
    config: Any = AutoConfig.from_pretrained(request.model, trust_remote_code=trust)
    device = torch.device(request.device)
    text: Any = getattr(config, "text_config", None) or config

    def rows(longest: int) -> int:
        if request.streamed or device.type == "cpu":
            return 1
        return max(1, min(_MOST_ROWS, _GPU_LOGITS // (longest * int(text.vocab_size) * 4)))

    tokenizer: Any = AutoTokenizer.from_pretrained(request.model, trust_remote_code=trust)
    if request.chat and not tokenizer.chat_template:
        raise UserError("chat: the model has no chat template; leave it out")
    at_once = _STREAMED_AT_ONCE // (text.hidden_size * 4) if request.streamed else _TOKENS_AT_ONCE[device.type]
    return KeptLM(
        tokenizer, resolve_max_length(config),
        lambda: _backend(request, device), Path(request.folder), request.identity, rows, at_once, progress,
    )  # fmt: skip


def _backend(request: Request, device: Any) -> Any:
    import torch

    from compress.evaluation.compare import open_view
    from compress.evaluation.tasks.backends import Stock, Streamed
    from compress.formats.dequantized import DequantizedCheckpoint
    from compress.model.checkpoint import Checkpoint

    dtype = getattr(torch, request.dtype)
    if not request.streamed:
        return Stock(request.model, request.device, dtype, request.trust_remote_code)
    view = DequantizedCheckpoint(Checkpoint(Path(request.model)))
    return Streamed(open_view(view, device, dtype, request.trust_remote_code))


def _scores(row: Row, results: Any) -> dict[str, Any]:
    """A row's items, by digests of what was asked, and lm-eval's own scores of its tasks."""
    items: list[tuple[str, float]] = []
    scores = {}
    for leaf in row.leaves:
        samples = [sample for sample in results["samples"][leaf] if row.metric in sample["metrics"]]
        used = samples[0]["filter"] if samples else None
        samples = sorted((s for s in samples if s["filter"] == used), key=lambda sample: sample["doc_id"])
        if len(samples) != len({sample["doc_id"] for sample in results["samples"][leaf]}):
            raise UserError(f"tasks: {leaf}: not every item has a score ({row.metric}); leave it out")
        values = [float(sample[row.metric]) for sample in samples]
        items += zip([_digest(leaf, sample) for sample in samples], values, strict=True)
        own = {k: v for k, v in results["results"][leaf].items() if "," in k and isinstance(v, float | int)}
        assert abs(own[f"{row.metric},{used}"] - sum(values) / len(values)) < 1e-9, "lm-eval's own score"
        scores[leaf] = own
    first = row.leaves[0]
    return {
        "metric": row.metric if used in (None, "none") else f"{row.metric} ({used})",
        "items": items,
        "scores": scores,
        "fewshot": results["n-shot"][first],
        "version": str(results["versions"][first]),
    }


def _digest(leaf: str, sample: Any) -> str:
    return fingerprint(leaf, sample["doc_hash"], sample["target_hash"], sample["prompt_hash"])


if __name__ == "__main__":
    main()
