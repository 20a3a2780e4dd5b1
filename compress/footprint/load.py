"""What a model in a precision takes on one card or on several that share it, and how much of a context fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.footprint.activations import CHUNK, activation_bytes
from compress.footprint.cache import Cache
from compress.footprint.cards import Card

CARD_COUNTS = (1, 2, 4, 8)
MOST_SEQUENCES = 4096


@dataclass(frozen=True)
class Load:
    """A model in a precision.

    Args:
        weights: bytes in memory.
        read: of them, what one token needs.
        cache: what its tokens leave behind.
        config: of the text model.
        width: bytes of a number in the cache and in activations: 2, or 4 where the model runs in float32.
    """

    weights: int
    read: int
    cache: Cache
    config: Any
    width: int = 2

    def kept(self, context: int, batch: int) -> int:
        """Bytes of the cache."""
        return self.cache.bytes(context, batch, self.width)

    def activations(self, context: int, batch: int) -> int:
        """Bytes of a step: a chunk of a prompt, with a logit row for each sequence."""
        return activation_bytes(self.config, min(CHUNK, context * batch), min(batch, CHUNK)) * self.width // 2

    def bytes(self, context: int, batch: int, cards: int = 1) -> int:
        """In each of several cards: weights are split, the cache by its heads, activations not at all."""
        cache = self.kept(context, batch) * self.cache.share(cards)
        return int(self.weights / cards + cache) + self.activations(context, batch)

    def splits(self, cards: int) -> bool:
        """Whether its heads can be shared by so many: query heads evenly, key-value heads evenly or each by several."""
        heads, keys = int(self.config.num_attention_heads), self.cache.heads
        return heads % cards == 0 and (self.cache.latent or keys % cards == 0 or cards % keys == 0)

    def longest(self, usable: int, batch: int, positions: int | None) -> int:
        """Tokens of the longest context that fits; 0: none does."""
        return _most(lambda context: self.bytes(context, batch) <= usable, positions or 1 << 24)

    def largest(self, usable: int, context: int) -> int:
        """Sequences of the largest batch that fits, up to 4096; 0: not even one."""
        return _most(lambda batch: self.bytes(context, batch) <= usable, MOST_SEQUENCES)

    def cards(self, card: Card, context: int, batch: int) -> int | None:
        """How many of a card hold it; None: not eight, or they can't share it."""
        for count in CARD_COUNTS if card.joins else (1,):
            if self.splits(count) and self.bytes(context, batch, count) <= card.usable:
                return count
        return None

    def seconds(self, context: int, bandwidth: float) -> float:
        """The least that one token of one sequence can take: its weights and the cache are read once."""
        return (self.read + self.kept(context, 1)) / bandwidth


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to a limit that fits, where all smaller ones do; 0: none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
