"""A plan as lines and tables for people. The figures are those of its record; nothing is reckoned here."""

from collections.abc import Sequence

from compress.footprint.cards import CARDS
from compress.footprint.load import CARD_COUNTS, MOST_SEQUENCES
from compress.footprint.records import Footprint, Loss, Row
from compress.system.units import count, size

HEADS = (
    "", "weights", "KV cache", "activations", "total", "context", "batch", "ms/token", "tokens/s", "KL", "opened by",
)  # fmt: skip
_NOT = "not measured"
CARD_NOTE = (
    "how many of a card hold it together: 1, 2, 4 or 8; -: not eight, its heads can't be shared, or what runs there "
    "unpacks it to 16 bits; *: the card has no kernels for it (fp8 is unpacked, bf16 becomes float16)"
)


def model_lines(found: Footprint) -> list[str]:
    """What is planned, and on what."""
    model, cache = found.model, found.cache
    told = {"headers": "from the weights' headers", "gguf": "from the file's header", "config": "from its config"}
    active = f", {count(model.active_parameters)} active" if model.active_parameters != model.parameters else ""
    stored = "" if model.stored_bytes is None else f", stored as {size(model.stored_bytes)}"
    lines = [
        f"model      {model.name}: {model.model_type}, {model.parameters:,} parameters{active}{stored} "
        f"({told[model.told]})"
    ]
    lines += [f"           {note}" for note in model.notes]
    if (card := found.card) is not None:
        speed = "" if card.bandwidth is None else f", {card.bandwidth / 1e9:,.0f} GB/s"
        part = (
            f", of which a model may fill {size(card.usable_bytes)}" if card.usable_bytes != card.memory_bytes else ""
        )
        lines.append(f"card       {card.name}: {size(card.memory_bytes)}{part}{speed}")
    heads = "one latent for all heads" if cache.latent else f"{cache.heads} key-value heads"
    if len(cache.shared_by) > 1:
        heads += f", model shared by {' or '.join(map(str, cache.shared_by[1:]))} cards"
    lines.append(
        f"KV cache   {size(cache.bytes)} for {found.context} tokens x {found.batch} ({heads}), "
        f"{size(cache.fp8_bytes)} in fp8"
    )
    if cache.expanded_bytes is not None:
        lines.append(
            f"           the latent, as vLLM and transformers 5.23 keep it; with keys and values of each head it is "
            f"{size(cache.expanded_bytes)}"
        )
    return lines


def table_rows(found: Footprint) -> list[tuple[str, ...]]:
    """A row for each precision that the model can have."""
    return [_row(row) for row in found.rows if row.problem is None]


def _row(row: Row) -> tuple[str, ...]:
    about = "~" if row.about else ""
    return (
        row.precision,
        f"{about}{size(row.weights_bytes or 0)}",
        size(row.cache_bytes or 0),
        size(row.activation_bytes or 0),
        f"{about}{size(row.total_bytes or 0)}",
        "" if row.longest_context is None else str(row.longest_context or "-"),
        "" if row.largest_batch is None else _batch(row.largest_batch),
        "" if row.ms_per_token is None else f"{row.ms_per_token:.3g}",
        "" if row.tokens_per_second is None else _rate(row.tokens_per_second),
        _loss(row),
        row.openers,
    )


def _batch(largest: int) -> str:
    return f"{largest}+" if largest == MOST_SEQUENCES else str(largest or "-")


def _rate(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.3g}"


def _loss(row: Row) -> str:
    if row.precision in ("fp32", "bf16"):
        return "0"
    return _NOT if row.loss is None else _range(row.loss)


def _range(loss: Loss) -> str:
    least, most = f"{loss.least:.3g}", f"{loss.most:.3g}"
    return least if least == most else f"{least}-{most}"


def notes(found: Footprint) -> list[str]:
    """What the figures stand on, and which rows are missing."""
    models = sorted({row.loss.model for row in found.rows if row.loss is not None and row.problem is None})
    lines = [
        f"weights as vLLM keeps them (transformers unpacks 4-bit codes to 16 bits); prompts in chunks of {found.chunk} "
        f"tokens (--max-num-batched-tokens), logits of {found.batch}",
        "ms/token: the least that bandwidth allows one sequence; tokens/s: the most",
        f"KL: from the base, nats a token, as measured on {', '.join(models) or 'nothing'}; another model loses "
        "another amount",
    ]
    if any(row.about and row.problem is None for row in found.rows):
        lines.append("~: about; embeddings and head are in 16 bits here, and in a .gguf file in fewer")
    lines += [f"{row.precision}: {row.problem}" for row in found.rows if row.problem is not None]
    if found.card is not None and not found.card.keeps_codes:
        lines.append(
            f"what opens int8, fp8, int4 and int3 on {found.card.name} unpacks them to 16 bits: no figures for them"
        )
    elif found.card is not None:
        slow = [row.precision for row in found.rows if row.has_kernels is False and row.problem is None]
        lines += (
            [f"no kernels on {found.card.name} for {'; '.join(slow)} (fp8 is unpacked, bf16 becomes float16)"]
            if slow
            else []
        )
    return lines


def card_rows(found: Footprint) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of who holds what: how many of a card it takes, with a * where a card has no kernels."""
    rows = [row for row in found.rows if row.problem is None and row.precision != "fp32"]
    heads = ("", *(row.precision.replace(", ", " ").replace(" %", "%").replace(" ", "\n") for row in rows))
    return heads, [(name, *(_cell(row, name) for row in rows)) for name in CARDS]


def _cell(row: Row, name: str) -> str:
    number = row.cards[name]
    foreign = row.format is not None and row.format not in CARDS[name].formats
    return "-" if number is None else f"{number}*" if foreign else str(number)


def training_rows(found: Footprint) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows of what training takes in each GPU."""
    heads = ("training, in each GPU", *(f"{number} GPU{'s' if number > 1 else ''}" for number in CARD_COUNTS))
    return heads, [(each.way, *(size(each.bytes[number]) for number in CARD_COUNTS)) for each in found.training]


def advice_lines(found: Footprint) -> Sequence[str]:
    """What to do."""
    if (advice := found.advice) is None:
        return [
            "advice     give --gpu NAME or --memory 24GB, and plan says which of these fits and which recipe makes it"
        ]
    lines = [f"advice     {advice.text}"]
    return lines if advice.command is None else [*lines, f"           {advice.command}"]
