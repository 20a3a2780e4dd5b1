"""What stages that train did, as reports show it: on what, how long, how fast, and what came of it."""

from dataclasses import dataclass

from compress.records import Report, Trained, TrainedText
from compress.report import chain
from compress.report.figures import change, number, percent
from compress.report.paths import without_folders
from compress.system.units import count

MOST_PASSES = 4  # more of them over one text hurt: https://arxiv.org/abs/2305.16264

TEXT_HEADS = ["Text", "Licence", "Tokens in it", "Passes", "Tokens trained on"]


@dataclass(frozen=True)
class TrainedView:
    """One stage that trained.

    Args:
        number: of the stage, counted from 1.
        title: of its section.
        words: what came of it, in a sentence or two.
        facts: rows of (label, value).
        texts: rows of `TEXT_HEADS`.
        note: on repeated text; empty where none was.
        cautions: what speaks against the result.
        trained: the record.
    """

    number: int
    title: str
    words: str
    facts: list[tuple[str, str]]
    texts: list[list[str]]
    note: str
    cautions: list[str]
    trained: Trained


def trained_views(report: Report) -> list[TrainedView]:
    """Every stage that trained, in order."""
    several = len(report.stages) > 1
    views = []
    for index, stage in enumerate(report.stages):
        trained = stage.trained
        if trained is None:
            continue
        where = f": stage {index + 1}, {chain.words(report, index)}" if several else ""
        repeated = [f"{_name(text)} was gone through {text.passes:.3g} times" for text in _repeated(trained)]
        note = f"{'; '.join(repeated)}. Up to {MOST_PASSES} passes cost little, more hurt." if repeated else ""
        views.append(
            TrainedView(
                index + 1, f"What was trained{where}", _outcome(trained), _facts(trained),
                [_text_row(text) for text in trained.texts], note, _cautions(trained), trained,
            )
        )  # fmt: skip
    return views


def texts_of(report: Report) -> list[tuple[str, str | None, int]]:
    """(name, licence, tokens trained on) of every text, those of several stages added up."""
    found: dict[tuple[str, str | None], int] = {}
    for stage in report.stages:
        for text in stage.trained.texts if stage.trained else []:
            key = (_name(text), text.licence)
            found[key] = found.get(key, 0) + _trained_on(text)
    return [(*key, tokens) for key, tokens in found.items()]


def teachers_of(report: Report) -> list[str]:
    """Names of the teachers that are not the recipe's own model, each once."""
    found = [stage.trained.teacher for stage in report.stages if stage.trained]
    return list(dict.fromkeys(without_folders(each) for each in found if each and not _is_base(each, report)))


def _is_base(teacher: str, report: Report) -> bool:
    return teacher in ("base", report.base.model)


def _outcome(trained: Trained) -> str:
    text = f"{count(trained.trainable)} parameters were trained on {count(trained.tokens)} tokens"
    if trained.best_step == 0:
        return f"{text}, and nothing came of it."
    kept = dict(trained.held_out).get(_kept(trained))
    if not trained.held_out or kept is None:
        return f"{text}."
    before = trained.held_out[0][1]
    return f"{text}; the loss on held-out text went from {number(before)} to {number(kept)} ({change(before, kept)})."


def _kept(trained: Trained) -> int:
    """The step whose weights were kept."""
    return trained.steps if trained.best_step is None else trained.best_step


def _facts(trained: Trained) -> list[tuple[str, str]]:
    batch = trained.batch_size * trained.sequence_length
    scored = percent(trained.scored / trained.tokens) if trained.tokens else "–"
    times = "once, at step" if len(trained.rolled_back) == 1 else f"{len(trained.rolled_back)} times, at steps"
    held = [] if trained.best_step is None else ["the best on held-out text"]
    rows: list[tuple[str, str | None]] = [
        ("Loss", trained.loss),
        ("Teacher", _teacher(trained.teacher)),
        ("Tokens", f"{count(trained.tokens)}, {count(trained.scored)} of them scored ({scored})"),
        ("Steps", f"{trained.steps:,} of {trained.planned_steps:,} planned"),
        ("Stopped early", trained.stopped),
        ("Batch", f"{trained.batch_size} sequences of {trained.sequence_length:,} tokens ({count(batch)} tokens)"),
        ("Learning rate", f"{number(trained.learning_rate)} at its peak"),
        ("Optimizer", trained.optimizer),
        ("Trainable parameters", count(trained.trainable)),
        ("Weights kept", ", ".join([f"those of step {_kept(trained):,}", *held])),
        ("Rolled back", f"{times} {_listed(trained.rolled_back)}" if trained.rolled_back else None),
        ("Zeros kept", count(trained.zeros_kept) if trained.zeros_kept else None),
        ("Speed", _with_unit(trained.tokens_per_second, "tokens/s")),
        ("Arithmetic used (MFU)", None if trained.mfu is None else f"{percent(trained.mfu)} of the device's peak"),
        ("Cached predictions", _with_unit(trained.cached_bytes_per_token, "bytes per token")),
    ]
    return [(label, value) for label, value in rows if value is not None]


def _teacher(name: str | None) -> str | None:
    return "the base model" if name == "base" else None if name is None else str(without_folders(name))


def _listed(steps: list[int]) -> str:
    *others, last = (f"{step:,}" for step in steps)
    return f"{', '.join(others)} and {last}" if others else last


def _with_unit(value: float | None, unit: str) -> str | None:
    return None if value is None else f"{value:,.0f} {unit}" if value >= 99.95 else f"{value:.3g} {unit}"


def _text_row(text: TrainedText) -> list[str]:
    return [_name(text), text.licence or "–", count(text.tokens), f"{text.passes:.3g}", count(_trained_on(text))]


def _name(text: TrainedText) -> str:
    return str(without_folders(text.name))


def _trained_on(text: TrainedText) -> int:
    return round(text.tokens * text.passes)


def _repeated(trained: Trained) -> list[TrainedText]:
    return [text for text in trained.texts if round(text.passes, 2) > 1]


def _cautions(trained: Trained) -> list[str]:
    lines = []
    if trained.best_step == 0:
        lines.append(
            "No step was better on held-out text than the weights before training, which were kept: lower the learning "
            "rate, or train on other text."
        )
    often = [_name(text) for text in trained.texts if round(text.passes, 2) > MOST_PASSES]
    if often:
        lines.append(
            f"More than {MOST_PASSES} passes over {', '.join(often)} hurt, for the model learns it by heart: give more "
            "text, or fewer tokens."
        )
    return lines
