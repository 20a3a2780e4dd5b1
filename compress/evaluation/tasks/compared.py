"""Base and result on the same items of the same tasks, as the report has them."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from compress.errors import UserError
from compress.evaluation.paired import LEVEL, Comparison, compare_scores, holm
from compress.evaluation.tasks.ask import Scored, Scores, score
from compress.evaluation.verify import stock_refusal
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import EvaluateSpec
from compress.task_records import Task, TaskDecision, Verdict

_EXACT = "McNemar's exact test, two-sided, on all items of all tasks at once"
_SIGNS = "two-sided sign-flip test on the differences of all items of all tasks at once"


def base_scores(
    base: Checkpoint, base_id: str, spec: EvaluateSpec, context: Context, cache: Path, fresh: bool, stock: bool = True
) -> Scores:
    """The base's scores, which come first: what is wrong with a task shows before anything else is computed.

    Args:
        base: the original.
        base_id: its fingerprint.
        spec: names tasks.
        context: where to compute.
        cache: folder in which answers are kept.
        fresh: forget what was kept.
        stock: whether the stock loader opens the result too; else both are streamed.

    Raises:
        UserError: a task that can't be loaded, has no data here, or does not fit the model.
    """
    refusal = stock_refusal(base, context.device, context.dtype, context.max_memory) if stock else None
    if refusal is not None:
        context.reporter.say(f"tasks are computed layer by layer: {refusal}")
    return score(base, base_id, spec, context, cache, not stock or refusal is not None, fresh, "tasks of the base")


def task_records(
    base: Checkpoint,
    base_id: str,
    before: Scores,
    result: Checkpoint,
    key: str,
    spec: EvaluateSpec,
    context: Context,
    cache: Path,
    fresh: bool,
) -> tuple[dict[str, Task], TaskDecision | None]:
    """Each task's record and the decision over all, computed alike for both models.

    Args:
        base: the original.
        base_id: its fingerprint.
        before: its scores.
        result: what became of it.
        key: fingerprint of that.
        spec: names tasks.
        context: where to compute.
        cache: folder in which answers are kept.
        fresh: forget what was kept.

    Raises:
        UserError: the two were not asked the same.
    """
    refusal = stock_refusal(result, context.device, context.dtype, context.max_memory)
    if refusal is not None and not before.streamed:
        context.reporter.say(f"tasks are computed layer by layer: {refusal}")
        before = score(base, base_id, spec, context, cache, True, False, "tasks of the base")
    after = score(result, key, spec, context, cache, before.streamed, fresh, "tasks of the result")
    for name, why in after.skipped.items():
        context.reporter.warn(f"{name} was not run: it {why}")
    return compared(before, after, str(context.dtype).removeprefix("torch."), spec.chat)


def compared(base: Scores, result: Scores, dtype: str, chat: bool) -> tuple[dict[str, Task], TaskDecision | None]:
    """Each task's record, and the decision over all; None for that where no task was run.

    Args:
        base: scores of the base.
        result: scores of the result.
        dtype: in what both were computed.
        chat: whether prompts were worded by the chat template.

    Raises:
        UserError: the two were not asked the same.
    """
    assert base.streamed == result.streamed, "computed alike"
    found: dict[str, tuple[Scored, Comparison]] = {}
    for name, one in base.tasks.items():
        other = result.tasks.get(name)
        asked = None if other is None else [item for item, _ in other.items]
        if other is None or asked != [item for item, _ in one.items] or one.metric != other.metric:
            raise UserError(
                f"tasks: {name}: base and result were not asked the same items, so no difference would mean "
                "anything; see whether the task's data or the result's tokenizer has changed, then run again"
            )
        found[name] = one, compare_scores([value for _, value in one.items], [value for _, value in other.items])
    if not found:
        return {}, None
    corrected = holm([comparison.p_value for _, comparison in found.values()])
    tasks = {
        name: _task(scored, comparison, p_value)
        for (name, (scored, comparison)), p_value in zip(found.items(), corrected, strict=True)
    }
    return tasks, _decision(base, result, _protocol(base, dtype, chat))


def _task(scored: Scored, comparison: Comparison, corrected: float) -> Task:
    return Task(
        base=comparison.base, compressed=comparison.compressed, delta=comparison.delta, ci95=comparison.ci95,
        p_value=comparison.p_value, n=comparison.items, metric=scored.metric, flips=comparison.flips,
        smallest=comparison.smallest, holm=corrected, fewshot=scored.fewshot, version=scored.version,
    )  # fmt: skip


def _decision(base: Scores, result: Scores, protocol: str) -> TaskDecision:
    """The one test over everything."""
    before, after = (_all(scores.tasks) for scores in (base, result))
    pooled = compare_scores(before, after)
    verdict: Verdict = "no difference shown"
    if pooled.p_value <= LEVEL:
        verdict = "worse" if pooled.delta < 0 else "better"
    binary = set(before) | set(after) <= {0.0, 1.0}
    return TaskDecision(
        verdict=verdict, n=pooled.items, delta=pooled.delta, ci95=pooled.ci95, p_value=pooled.p_value,
        flips=pooled.flips, smallest=pooled.smallest, level=LEVEL, method=_EXACT if binary else _SIGNS,
        protocol=protocol, skipped=result.skipped,
    )  # fmt: skip


def _all(tasks: Mapping[str, Scored]) -> list[float]:
    return [value for scored in tasks.values() for _, value in scored.items]


def _protocol(scores: Scores, dtype: str, chat: bool) -> str:
    how = "our layer loop" if scores.streamed else "stock transformers, opened in a process of its own"
    together = "one request at a time" if scores.batch == 1 else f"up to {scores.batch} requests at a time"
    words = "with the chat template" if chat else "without a chat template"
    return f"Prompts and scoring by lm-eval {version('lm_eval')}, {words}; answered by {how}, in {dtype}, {together}."
