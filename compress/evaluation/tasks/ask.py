"""Asks a checkpoint for its answers to tasks, in a process of its own, and reads what became of each item."""

import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.errors import DscompressError, NumericalError, RecipeError
from compress.evaluation.tasks.places import folder_of, identity_of
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import EvaluateSpec
from compress.system import interrupts
from compress.system.distributed import alone
from compress.system.locks import FileLock

ANSWER = "answer.json"
# Threads that spin while they wait for one that lost its core make small models several times slower beside other work.
_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Request:
    """What to ask.

    Args:
        model: checkpoint folder.
        tasks: names.
        files: folder of the user's own task files.
        limit: items of each task; None takes all.
        fewshot: examples before each; None takes the task's own number.
        chat: word prompts by the chat template.
        device: "cpu" or "cuda:0".
        dtype: "bfloat16", "float16" or "float32".
        trust_remote_code: as in transformers.
        streamed: layer by layer, by our reader, instead of stock transformers.
        folder: where answers are kept.
        identity: what they hang on beside the request.
    """

    model: str
    tasks: list[str]
    files: str | None
    limit: int | None
    fewshot: int | None
    chat: bool
    device: str
    dtype: str
    trust_remote_code: bool
    streamed: bool
    folder: str
    identity: list[Any]


@dataclass(frozen=True)
class Scored:
    """A model's scores in one task.

    Args:
        metric: of which they are the values.
        items: what was asked, as a digest, and its score.
        fewshot: examples before each item.
        version: the task's.
        scores: lm-eval's own, by task and by metric and filter.
    """

    metric: str
    items: list[tuple[str, float]]
    fewshot: int
    version: str
    scores: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Scores:
    """A model's scores in all tasks; `skipped` has those that were not run, and why; `batch` requests went together."""

    tasks: dict[str, Scored]
    skipped: dict[str, str]
    batch: int
    streamed: bool


def score(
    checkpoint: Checkpoint,
    identity: str,
    spec: EvaluateSpec,
    context: Context,
    cache: Path,
    streamed: bool,
    fresh: bool,
    title: str,
) -> Scores:
    """A checkpoint's scores in the tasks of an evaluation; answers that are kept are not asked for again.

    Args:
        checkpoint: dense or quantized.
        identity: its fingerprint.
        spec: names tasks.
        context: where to compute.
        cache: folder in which answers are kept.
        streamed: layer by layer, without its being held; tasks that generate are then skipped.
        fresh: forget what was kept.
        title: what is being done, for the user.

    Raises:
        RecipeError: tasks that can't be loaded, have no data here, or do not fit the model.
        NumericalError: log-likelihoods that are no numbers.
    """
    assert spec.tasks
    dtype = str(context.dtype).removeprefix("torch.")
    own = identity_of(identity, checkpoint.folder, dtype, context.device.type, streamed)
    folder = folder_of(cache, own)
    request = Request(
        str(checkpoint.folder), list(spec.tasks), spec.task_files, spec.limit, spec.fewshot, spec.chat,
        str(context.device), dtype, context.trust_remote_code, streamed, str(folder), own,
    )  # fmt: skip
    with FileLock(folder.with_name(f"{folder.name}.lock")) as lock:
        say = context.reporter.say
        lock.acquire(exclusive=True, waiting=lambda holder: say(f"waiting for {holder}, which asks the same model"))
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        answer = _answer(request, context, title)
    if "refused" in answer:
        raise RecipeError(answer["refused"].splitlines()) if answer["user"] else NumericalError(answer["refused"])
    rows = {name: row | {"items": [tuple(item) for item in row["items"]]} for name, row in answer["rows"].items()}
    tasks = {name: Scored(**row) for name, row in rows.items()}
    return Scores(tasks, answer["skipped"], answer["batch"], streamed)


def _answer(request: Request, context: Context, title: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch, tempfile.TemporaryFile() as said:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(asdict(request)), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "compress.evaluation.tasks.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=said, text=True, env=alone() | _WAITING,
        )  # fmt: skip
        try:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.write(str(file))
                process.stdin.close()
            _follow(process.stdout, context, title)
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
        if code:
            said.seek(0)
            raise _failed(code, said.read().decode(errors="replace").strip().splitlines())
        found: dict[str, Any] = json.loads((Path(scratch) / ANSWER).read_text(encoding="utf-8"))
        return found


def _follow(lines: Iterable[str], context: Context, title: str) -> None:
    """Show how far it is: a line has how many requests there are and how many are done; 0 begins another kind."""
    shown = 0
    with ExitStack() as bar:
        for line in lines:
            total, done = map(int, line.split())
            if not done:
                bar.close()
                advance, shown = bar.enter_context(context.reporter.task(title, total, "request")), 0
            for _ in range(shown, done):
                advance()
            shown = done
    interrupts.check()


def _failed(code: int, said: Sequence[str]) -> DscompressError:
    """What a process that ended with a code other than 0 means."""
    if code == -signal.SIGKILL:
        return DscompressError(
            "evaluating tasks was stopped by signal 9, most likely for want of memory; run again to continue"
        )
    reason = said[-1] if said else f"exit code {code}"
    return DscompressError(f"evaluating tasks failed: {reason}; run again to continue")
