"""What a run says of its result: opened again, compared with the base, asked the same prompts, timed.

Figures are kept in the work folder by fingerprints, so that no run measures the same twice.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress import records
from compress.data.calibration import TokenSet, load_windows
from compress.errors import CalibrationError
from compress.evaluation.base import continuations, texts_file
from compress.evaluation.compare import CODE_VERSION, compare
from compress.evaluation.served import difference, serve
from compress.evaluation.speed import compare_speed
from compress.evaluation.tasks.ask import Scores
from compress.evaluation.tasks.compared import task_records
from compress.evaluation.verify import opening
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.facts import facts_of
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import parameter_count
from compress.recipe.schema import PROSE, EvaluateSpec
from compress.records import read_record
from compress.served_records import Served
from compress.stages.contract import Plan
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint
from compress.system.locks import made_once
from compress.system.memory import available
from compress.system.programs import Engine
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the largest number in a list.",
    "A train leaves at 9:40 and arrives at 11:15. How long is the journey?",
)


def prompts_of(spec: EvaluateSpec | None) -> list[str]:
    """What both models are asked to continue."""
    return [] if spec is None else list(PROMPTS if spec.prompts is None else spec.prompts)


def read_windows(
    spec: EvaluateSpec, tokenizer: "PreTrainedTokenizerBase", length: int, reporter: Reporter
) -> list[TokenSet]:
    """The windows of an evaluation's texts, of so many tokens each.

    Raises:
        CalibrationError: a text that can't be used.
    """
    found = []
    for text in spec.texts(chats=bool(tokenizer.chat_template)):
        named = spec.text is not None or text == PROSE  # nobody asked for the others
        try:
            windows = load_windows(text, tokenizer, sequence_length=length, windows=spec.windows)
        except CalibrationError as error:
            if named:
                raise
            reporter.warn(f"not measured on chats: {error}")
            continue
        for warning in windows.warnings if named else ():
            reporter.warn(warning)
        found.append(windows)
    return found


def answers(cache: Path) -> Path:
    """Where a work folder keeps answers to tasks; `cache` is where it keeps figures."""
    return cache.with_name("answers")


@dataclass(frozen=True)
class Found:
    """What the opened checkpoint said: whether it is what was computed, and texts beside the base's, or why none."""

    verified: records.Verified
    generations: list[records.Generation]
    note: str | None


@dataclass(frozen=True)
class Measurement:
    """Base and result of a run.

    Args:
        base: the model as it was.
        base_id: its identity.
        result: what the stages have made.
        key: fingerprint of the result.
        context: where to compute, whom to tell.
        cache: folder in which figures are kept.
        fresh: measure anew.
    """

    base: Checkpoint
    base_id: str
    result: Checkpoint
    key: str
    context: Context
    cache: Path
    fresh: bool

    @contextmanager
    def opening(self, spec: EvaluateSpec | None) -> Iterator[Callable[[Tensor], Found]]:
        """Opens the written checkpoint; what is given holds it against the logits [S, V] of the model in memory.

        Inside, the stock loader may be at work already: it continues the prompts in the same breath.
        """
        context = self.context
        context.reporter.say("verifying: opening the checkpoint again")
        record = read_record(self.result.folder)
        assert record is not None, "a stage's artefact has one"
        tokens = torch.tensor(record.probe.tokens)  # the base's tokenizer may have been changed since
        prompts, note = self._prompts(spec)
        kept = texts_file(self.cache, self.result, self.key, prompts, context)
        missing = prompts if self.fresh or not kept.is_file() else []
        if missing:
            context.reporter.say(f"generating: {len(prompts)} prompts with each model")

        def found(expected: Tensor) -> Found:
            opened = wait(expected)
            self._tell(opened.verified)
            if note is not None:
                return Found(opened.verified, [], note)
            answer = opened.answer
            if missing and answer is not None and answer.failure is None:
                write_text(kept, json.dumps(answer.continuations))
            elif missing and answer is not None:
                return Found(opened.verified, [], f"the stock loader failed: {answer.failure}")
            return Found(opened.verified, *self._generations(prompts))

        with opening(
            self.result.folder, tokens, context.device, context.dtype, context.trust_remote_code, context.max_memory,
            missing,
        ) as wait:  # fmt: skip
            yield found

    def _tell(self, verified: records.Verified) -> None:
        say, warn = self.context.reporter.say, self.context.reporter.warn
        if not verified.passed:
            warn(f"the written checkpoint was not verified by {verified.loader}: {verified.note or 'it differs'}")
        elif verified.note:
            say(f"verified by the {verified.loader}: {verified.note}")

    def quality(self, windows: TokenSet) -> records.Quality:
        """Perplexity, divergence and agreement on an evaluation's windows."""
        key = fingerprint(self.base_id, self.key, windows.sha256, str(self.context.dtype), CODE_VERSION)
        found = self.cache / f"{key}.json"
        say = self.context.reporter.say
        with made_once(found, lambda holder: say(f"waiting for {holder}, which evaluates the same")) as missing:
            if not (missing or self.fresh):
                return records.Quality.model_validate_json(found.read_text(encoding="utf-8"))
            views = DequantizedCheckpoint(self.base), DequantizedCheckpoint(self.result)
            compared = compare(*views, windows, self.context, self.cache, self.base_id)
            quality = records.Quality.model_validate(compared)
            write_text(found, quality.model_dump_json())
            return quality

    def _prompts(self, spec: EvaluateSpec | None) -> tuple[list[str], str | None]:
        """What both models are to continue, or why nothing."""
        context = self.context
        if spec is None:
            return [], "evaluation is turned off"
        stock = facts_of(self.result.config).stock
        if stock is not None:
            return [], stock
        needed = int(parameter_count(self.base) * context.dtype.itemsize * 1.3)
        free = available(context.device, context.max_memory)
        if needed > free:
            return [], f"not enough memory to hold a whole model: {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
        prompts = prompts_of(spec)
        return prompts, None if prompts else "the recipe has no prompts"

    def _generations(self, prompts: list[str]) -> tuple[list[records.Generation], str | None]:
        """Continuations by both models, or why there are none."""
        texts = []
        for checkpoint, name in ((self.base, self.base_id), (self.result, self.key)):
            answer = continuations(checkpoint, name, prompts, self.context, self.cache)
            if isinstance(answer, str):
                return [], answer
            texts.append(answer)
        rows = zip(prompts, *texts, strict=True)
        return [records.Generation(prompt=p, base=b, compressed=c) for p, b, c in rows], None

    def with_tasks(self, quality: records.Quality, spec: EvaluateSpec, before: Scores) -> records.Quality:
        """The same with what both models did in the evaluation's tasks; `before` are the base's scores."""
        tasks, decision = task_records(
            self.base, self.base_id, before, self.result, self.key, spec, self.context, answers(self.cache), self.fresh
        )
        return quality.model_copy(update={"tasks": tasks, "task_decision": decision})

    def speed(self) -> tuple[records.Speed | None, str | None]:
        """How fast both run where the result's format is one that a CPU computes in integers; else nothing."""
        if not facts_of(self.result.config).runs_on_cpu or self.context.device.type != "cpu":
            return None, None
        return compare_speed(self.base, self.result, self.key, self.context, self.cache, self.fresh)

    def served(self, engine: Engine | str) -> Served:
        """What vLLM makes of the result: that it refuses it, or differs, is a warning."""
        record, warn = read_record(self.result.folder), self.context.reporter.warn
        assert record is not None, "a stage's artefact has one"
        names, tokens = (self.base_id, self.key), record.probe.tokens
        served = serve(self.base, self.result, names, tokens, engine, self.context, self.cache, self.fresh)
        which = f"{served.engine} {served.version}"
        if served.opened and not served.passed:
            what = "opens the result and differs by more than rounding explains"
            warn(f"{which} {what}: {difference(served)}; do not serve it there")
        elif not served.opened and isinstance(engine, Engine):
            warn(f"{which} does not open the result: {served.note}")
        return served


def with_figures(
    stage: records.Stage, measured: Measurement, quality: records.Quality | None, plan: Plan
) -> records.Stage:
    """A stage's record with the size of what it made, and how far that is from the recipe's model."""
    assert plan.shapes is not None
    figures: dict[str, float | int | None] = {
        "parameters": parameter_count(plan.shapes),
        "bytes": measured.result.bytes,
    }
    if quality is not None:
        figures |= {"perplexity": quality.perplexity.compressed, "kl": quality.kl.mean}
    return stage.model_copy(update=figures)


def calibration_of(tokens: TokenSet | None) -> records.Calibration | None:
    """The record of the text that was calibrated on."""
    if tokens is None:
        return None
    return records.Calibration(
        name=tokens.name, source=Path(tokens.source).name, licence=tokens.licence, sequences=tokens.sequences,
        sequence_length=tokens.sequence_length, tokens=tokens.count, sha256=tokens.sha256,
    )  # fmt: skip
