"""Typed records of a checkpoint as a serving engine runs it: `served` in report.json."""

from typing import Annotated

from pydantic import Field

from compress.record_types import Count, Typed

_Rate = Annotated[float, Field(gt=0)]


class Apart(Typed):
    """How far log-probabilities of `tokens` tokens are from our reader's in float32, nats.

    `rounding` is how far our reader in the engine's own precision is from it, on average; `mean` may be `tolerance`.
    """

    tokens: Count
    max: float
    mean: float
    rounding: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the engine computes the same model; False for NaN too."""
        return self.mean <= self.tolerance


class ServedPace(Typed):
    """Medians of one sequence at a time. Bytes are the process's, or the GPU's, with a cache of `cache_bytes`.

    `waited` is the share of its time that a thread stood ready while something else had the core.
    """

    prefill_tokens_per_second: _Rate
    decode_tokens_per_second: _Rate
    loaded_bytes: Count
    peak_bytes: Count
    waited: Annotated[float, Field(ge=0)]


class ServedSpeed(Typed):
    """Base and result, one after the other, `rounds` times each behind a round to warm up."""

    prompt_tokens: Count
    new_tokens: Count
    rounds: Count
    threads: Count
    cache_bytes: Count
    base: ServedPace
    compressed: ServedPace

    @property
    def busy(self) -> bool:
        """Whether other work slowed them so much that the figures say little."""
        return max(self.base.waited, self.compressed.waited) > 0.05


class Served(Typed):
    """The finished checkpoint in a real engine, beside our reader.

    `opened` is False where the engine is missing or refuses, and `note` says why, in the engine's own words where it
    has any; a note beside an opened one says what was left out. `continuation` is about the tokens by which the engine
    went on greedily: the first `agreed` are those that our reader ranks first, and the next is `gap` nats behind.
    """

    engine: str
    version: str | None = None
    device: str | None = None
    dtype: str | None = None
    opened: bool
    passed: bool
    note: str | None = None
    prompt: Apart | None = None
    continuation: Apart | None = None
    agreed: Count | None = None
    gap: float | None = None
    speed: ServedSpeed | None = None
