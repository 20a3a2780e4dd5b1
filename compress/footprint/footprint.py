"""Which precision of a model fits where, what it costs and what makes it: before anything is downloaded."""

from dataclasses import asdict
from typing import Any

from compress.errors import UserError
from compress.footprint import records
from compress.footprint.activations import CHUNK
from compress.footprint.cache import Cache, cache_of
from compress.footprint.cards import ALL_FORMATS, CARDS, Card, find_card
from compress.footprint.load import CARD_COUNTS, Load
from compress.footprint.losses import measured
from compress.footprint.precisions import PRECISIONS, Precision, Weights, weights_of
from compress.footprint.recommend import Made, advise
from compress.footprint.subject import Subject, open_subject
from compress.footprint.training import training_of
from compress.system.units import parse_size

_CONTEXT = 8192
_UNITS = ("b", "k", "m", "g", "t")


def plan(
    model: str, *, gpu: str | None = None, memory: str | None = None, context: int | None = None, batch: int = 1
) -> records.Footprint:
    """What a model takes in every precision, which of them fits, and the recipe that makes it.

    From config.json and the headers of the weights alone; nothing is written.

    Args:
        model: folder, config.json, .gguf file, "package:<name>/<file>", or hub id, whose small files are fetched.
        gpu: name of a card or machine, loosely spelled.
        memory: memory that a model may fill, with its unit, instead of a card.
        context: tokens of a sequence, prompt and answer; None: 8192, or as many as the model has positions.
        batch: sequences at a time.

    Raises:
        UserError: an unknown card, a size without a unit, a context longer than the model's positions, a batch of none.
        ModelError: a model that is not there or that transformers does not know.
    """
    card = _card(gpu, memory)
    if batch < 1:
        raise UserError(f"--batch {batch}: is no number of sequences; use 1 or more")
    subject = open_subject(model)
    length = _context(context, subject)
    cache = cache_of(subject.config, model)
    rows, made = [], {}
    for precision in PRECISIONS:
        weights = weights_of(subject, precision)
        if isinstance(weights, Weights):
            kept = cache_of(weights.config, model)
            load = Load(weights.bytes, weights.read, kept, weights.config, precision.width)
            made[precision.name] = Made(load, weights.stages)
        rows.append(_row(precision, weights, made.get(precision.name), subject, card, length, batch))
    training, note = training_of(subject)
    return records.Footprint(
        model=_model(subject),
        context=length, batch=batch, chunk=CHUNK,
        card=None if card is None else _said(card),
        cache=_cache(cache, made["bf16"].load, length, batch),
        rows=tuple(rows),
        training=tuple(training), training_note=note,
        advice=None if card is None else advise(subject, rows, made, card, length, batch),
    )  # fmt: skip


def _card(gpu: str | None, memory: str | None) -> Card | None:
    """What is planned for; memory alone is a card without a name."""
    if gpu is not None and memory is not None:
        raise UserError("--gpu and --memory: say the same thing twice; give one of them")
    if gpu is not None:
        return find_card(gpu)
    if memory is None:
        return None
    found = parse_size(memory)
    if found is None or not memory.strip().lower().endswith(_UNITS):
        hint = f"; write {memory.strip()}GB" if found else "; write it like 24GB or 22.5GiB"
        raise UserError(f"--memory {memory}: has no unit{hint}" if found else f"--memory {memory}: is no size{hint}")
    return Card(memory.strip(), 0, found, 0.0, ALL_FORMATS, 1.0)


def _context(context: int | None, subject: Subject) -> int:
    positions = subject.positions
    if context is None:
        return _CONTEXT if positions is None else min(_CONTEXT, positions)
    if context < 1:
        raise UserError(f"--context {context}: is no number of tokens; use 1 or more")
    if positions is not None and context > positions:
        raise UserError(f"--context {context}: is more than the model's {positions} positions; use at most {positions}")
    return context


def _row(
    precision: Precision, weights: Weights | str, made: Made | None, subject: Subject, card: Card | None, context: int,
    batch: int,
) -> records.Row:  # fmt: skip
    said: dict[str, Any] = {
        "precision": precision.name, "made_by": precision.made, "openers": precision.openers,
        "format": precision.format,
        "about": precision.block is not None or (subject.refused is not None and precision.stage is not None),
    }  # fmt: skip
    if made is None or isinstance(weights, str):
        return records.Row(**said, problem=str(weights))
    load = made.load
    cost = measured(precision.name)
    runs = {name: card.keeps(precision.stage is not None) for name, card in CARDS.items()}
    said |= {
        "weights_bytes": load.weights, "read_bytes": load.read, "file_bytes": weights.file_bytes,
        "cache_bytes": load.kept(context, batch), "activation_bytes": load.activations(context, batch),
        "total_bytes": load.bytes(context, batch),
        "cards": {n: load.cards(each, context, batch) if runs[n] else None for n, each in CARDS.items()},
        "loss": None if cost is None else records.Loss(**asdict(cost)),
    }  # fmt: skip
    if card is not None:
        keeps = card.keeps(precision.stage is not None)
        said |= _on(load, card, context, batch, subject.positions) if keeps else {"fits": False}
        said["has_kernels"] = None if precision.format is None else precision.format in card.formats
    return records.Row(**said)


def _on(load: Load, card: Card, context: int, batch: int, positions: int | None) -> dict[str, Any]:
    """What hangs on the card."""
    found: dict[str, Any] = {
        "fits": load.bytes(context, batch) <= card.usable,
        "longest_context": load.longest(card.usable, batch, positions),
        "largest_batch": load.largest(card.usable, context),
    }
    if card.bandwidth and found["longest_context"]:
        seconds = load.seconds(context, card.bandwidth)
        found |= {"ms_per_token": 1000 * seconds, "tokens_per_second": 1 / seconds}
    return found


def _model(subject: Subject) -> records.Subject:
    return records.Subject(
        name=subject.name, model_type=str(subject.config.model_type), parameters=subject.parameters,
        active_parameters=subject.active, positions=subject.positions, stored_bytes=subject.stored, told=subject.told,
        notes=subject.notes,
    )  # fmt: skip


def _said(card: Card) -> records.Card:
    return records.Card(
        name=card.name, memory_bytes=card.memory, usable_bytes=card.usable, bandwidth=card.bandwidth or None,
        formats=tuple(sorted(card.formats)), keeps_codes=card.codes,
    )  # fmt: skip


def _cache(cache: Cache, load: Load, context: int, batch: int) -> records.Cache:
    expanded = 2 * cache.expanded * len(cache.layers) * context * batch
    return records.Cache(
        bytes=cache.bytes(context, batch), fp8_bytes=cache.bytes(context, batch, 1), bytes_per_token=cache.bytes(1),
        heads=cache.heads, shared_by=tuple(number for number in CARD_COUNTS if load.splits(number)),
        latent=cache.latent, expanded_bytes=expanded if cache.latent else None,
    )  # fmt: skip
