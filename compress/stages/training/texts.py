"""The text of a training stage: packed once in the work folder, and mixed into batches."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from compress.data.mixture import Mixture, whole_shares, words
from compress.data.training import PackedText, pack, text_key
from compress.errors import UserError
from compress.loop.context import Context
from compress.model.tokenizer import load_tokenizer
from compress.recipe.text import TrainingText
from compress.recipe.train import TrainStage
from compress.stages.training.plan import steps_of
from compress.system import distributed
from compress.system.locks import FileLock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def texts_of(spec: TrainStage) -> list[TrainingText]:
    """The texts of a stage whose plan has filled them in."""
    assert isinstance(spec.data, list)
    texts = [text for text in spec.data if isinstance(text, TrainingText)]
    return [text.model_copy(update={"seed": text.seed + spec.seed}) for text in texts]


def keys_of(spec: TrainStage, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """What each text is known by."""
    wanted = _sequences(spec)
    return [
        text_key(text, tokenizer, length=text.length, sequences=most, assistant_only=spec.assistant_only)
        for text, most in zip(texts_of(spec), wanted, strict=True)
    ]


def _sequences(spec: TrainStage) -> list[int]:
    """How many sequences each text is asked for: its share of the steps', and what is held out."""
    texts = texts_of(spec)
    assert spec.batch_size is not None
    total = _skipped(spec) + steps_of(spec.tokens, spec.batch_size, texts[0].length) * spec.batch_size
    shares = whole_shares([text.weight for text in texts])
    return [-(-total * share // sum(shares)) + spec.held_out + 1 for share in shares]


def _skipped(spec: TrainStage) -> int:
    """Sequences that earlier steps have taken."""
    assert spec.batch_size is not None
    length = texts_of(spec)[0].length
    return steps_of(spec.after, spec.batch_size, length) * spec.batch_size if spec.after else 0


def mixture_of(spec: TrainStage, folder: Path, context: Context, held: ExitStack) -> Mixture:
    """Pack the texts, by rank 0, and mix them; `held` keeps others from deleting them.

    Raises:
        CalibrationError: a text that can't be read, or is too short.
        OutputError: no room in the work folder.
    """
    assert context.work is not None and spec.batch_size is not None
    tokenizer = load_tokenizer(folder, context.trust_remote_code)
    keys = distributed.first(lambda: keys_of(spec, tokenizer))
    texts, wanted = texts_of(spec), _sequences(spec)

    def packed(number: int) -> PackedText:
        return pack(
            texts[number], tokenizer, length=texts[number].length, sequences=wanted[number],
            assistant_only=spec.assistant_only, folder=context.work / "texts" / keys[number],  # type: ignore[operator]
            key=keys[number], reporter=context.reporter,
        )  # fmt: skip

    distributed.first(lambda: [packed(number).sequences for number in range(len(texts))])
    found = [packed(number) for number in range(len(texts))]
    for each in found:
        held.enter_context(in_use(each.folder, context))
    for text in found:
        for line in text.warnings:
            context.reporter.warn(line)
    weights = [text.weight for text in texts]
    return Mixture(
        found, weights, seed=spec.seed, batch_size=spec.batch_size, held_out=spec.held_out, skipped=_skipped(spec)
    )


def planned_steps(spec: TrainStage, mixture: Mixture, context: Context) -> int:
    """How many steps there are, by what the recipe says of a text that is too short; repeats are said."""
    steps = steps_of(spec.tokens, mixture.batch_size, mixture.sequence_length)
    if spec.exhausted == "stop":
        there = mixture.steps_before_exhausted()
        if not there:
            raise UserError(
                f"exhausted: stop, and the text has no {mixture.batch_size} sequences of {mixture.sequence_length} "
                "tokens for a step; add text, use a smaller batch_size, or exhausted: wrap"
            )
        if there < steps:
            context.reporter.warn(
                f"training: the text has tokens for {there} steps and not {steps}; training stops there, as exhausted: "
                "stop says"
            )
            steps = there
    for line in words(mixture.passes(steps)):
        context.reporter.warn(f"training: {line}")
    return steps


def in_use(folder: Path, context: Context) -> FileLock:
    """A lock that this process shares with others that read a folder of the work folder."""
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    lock.acquire(exclusive=False, waiting=lambda holder: context.reporter.say(f"waiting for {holder}"))
    return lock
