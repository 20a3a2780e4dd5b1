"""What to do: the precision that fits and costs least, and the bundled recipe that makes it.

The order is that of the measured losses; where two were not measured on the same model, finer comes before coarser.
"""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress.footprint.cards import CARDS, Card
from compress.footprint.load import Load
from compress.footprint.records import Advice, Loss, Row
from compress.footprint.subject import Subject
from compress.recipe.prune import PruneStage
from compress.recipe.quantize import WeightOnlyStage
from compress.system.units import size

ORDER = (
    "bf16", "int8", "fp8", "int4 g64", "int4 g128", "int3 g64", "int3 g128", "pruned 25 %, int4", "pruned 40 %, int4",
)  # fmt: skip
_AS_IT_IS = "bf16"
_LENGTH = 2048  # of the bundled recipes' evaluation


@dataclass(frozen=True)
class Made:
    """A precision that the model can have.

    Args:
        load: what it takes.
        stages: of a recipe, that make it.
    """

    load: Load
    stages: Sequence[Any]


RECIPES: Mapping[str, str] = {"int8": "8b_int8_dynamic", "fp8": "8b_fp8_dynamic"}
_FOUR, _CHAIN = "8b_int4_gptq", "8b_edge_chain"  # of all others: weights alone, or pruned before


def advise(
    subject: Subject, rows: Sequence[Row], made: Mapping[str, Made], card: Card, context: int, batch: int
) -> Advice:
    """What to do on a card with this context and batch.

    Args:
        subject: the model.
        rows: of every precision.
        made: of those that the model can have, what they take and the stages that make them.
        card: to fit.
        context: tokens of a sequence.
        batch: sequences.
    """
    by_name = {row.precision: row for row in rows}
    able = [by_name[name] for name in ORDER if by_name[name].problem is None and _runs(by_name[name], card)]
    fitting = [row for row in able if row.fits]
    wanted = f"{context} tokens x {batch}"
    if not fitting:
        return Advice(text=_nothing(subject, able, made, card, context, batch, wanted))
    best = fitting[0]
    if best.precision == _AS_IT_IS:
        return Advice(
            text=f"bf16 fits {card.name} with {wanted}: nothing has to be compressed", precision=best.precision
        )
    text = f"{best.precision}: {size(best.total_bytes or 0)} of {size(card.usable)} with {wanted}; {_cost(best.loss)}"
    if subject.refused is not None:
        text += f". dscompress does not compress this model for now: {subject.refused}"
        return Advice(text=text, precision=best.precision)
    stages = made[best.precision].stages
    recipe = RECIPES.get(best.precision, _FOUR if len(stages) == 1 else _CHAIN)
    settings = tuple(_settings(stages))
    command = _command(subject, best.precision, recipe, settings)
    return Advice(text=text, precision=best.precision, recipe=recipe, settings=settings, command=command)


def slug(model: str, precision: str) -> str:
    """A name for the result."""
    stem = model.rstrip("/").rpartition("/")[2].removesuffix(".gguf").removesuffix(".json")
    return re.sub(r"[^a-z0-9.]+", "_", f"{stem} {precision}".lower()).strip("_.")


def _runs(row: Row, card: Card) -> bool:
    """Whether what opens this precision on the card keeps it as small as it is written, and multiplies it."""
    return row.precision == _AS_IT_IS or (card.codes and row.has_kernels is not False)


def _cost(loss: Loss | None) -> str:
    if loss is None:
        return "what it costs was not measured: read the report"
    least, most = f"{loss.least:.3g}", f"{loss.most:.3g}"
    figures = least if least == most else f"{least} to {most}"
    return f"KL {figures} where it was measured ({loss.model}); read the report for this model"


def _settings(stages: Sequence[Any]) -> Iterator[str]:
    """In what the stages differ from those of the bundled recipe."""
    quantize, at = stages[-1], 0
    if isinstance(stages[0], PruneStage):
        target, at = stages[0].target, 2  # distilled between
        assert target is not None
        yield f"stages.0.target={{sparsity: {target.sparsity:g}, of: {target.of}}}"
        yield f"stages.0.axes=[{', '.join(stages[0].over)}]"
    if isinstance(quantize, WeightOnlyStage):
        yield from (f"stages.{at}.bits={quantize.bits}" for _ in range(quantize.bits != 4))
        yield from (f"stages.{at}.group_size={quantize.group_size}" for _ in range(quantize.group_size != 128))
        yield from (f"stages.{at}.format={quantize.format}" for _ in range(quantize.format != "compressed-tensors"))


def _command(subject: Subject, precision: str, recipe: str, settings: Sequence[str]) -> str:
    """The bundled recipe with this model; one that is known by its config alone has to be named."""
    positions = subject.positions
    if positions is not None and positions < _LENGTH:
        settings = [*settings, f"evaluate.sequence_length={positions}"]
    model = "MODEL" if subject.told == "config" else subject.name
    words = ["dscompress", "run", recipe, "--model", model, "--output", f"outputs/{slug(subject.name, precision)}"]
    return shlex.join([*words, *(word for each in settings for word in ("--set", each))])


def _nothing(
    subject: Subject, able: Sequence[Row], made: Mapping[str, Made], card: Card, context: int, batch: int, wanted: str
) -> str:
    """By how much nothing fits, and what would."""
    least = min(able, key=lambda row: row.total_bytes or 0)
    load, ways = made[least.precision].load, []
    over = size((least.total_bytes or 0) - card.usable)
    text = (
        f"nothing fits {card.name} with {wanted}: the smallest that it runs, {least.precision}, is {over} over the "
        f"{size(card.usable)} that a model may fill"
    )
    if subject.refused is not None:
        text += f" (and dscompress does not compress this model for now: {subject.refused})"
    if least.longest_context:
        ways.append(f"--context {least.longest_context}")
    if batch > 1 and least.largest_batch:
        ways.append(f"--batch {least.largest_batch}")
    if (count := load.cards(card, context, batch)) is not None:
        ways.append(f"{count} such cards")
    if load.bytes(context, batch) - load.kept(context, batch) // 2 <= card.usable:
        ways.append("an fp8 cache")
    if not card.codes:
        ways.append("one of llama.cpp's types, which dscompress does not write yet")
    larger = [
        each
        for each in CARDS.values()
        if each.codes
        and (least.format is None or least.format in each.formats)
        and load.cards(each, context, batch) == 1
    ]
    if larger:
        ways.append(f"one {min(larger, key=lambda each: each.usable).name}")
    return f"{text}; what would: {', or '.join(ways)}" if ways else f"{text}; no card that plan knows does"
