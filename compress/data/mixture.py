"""Several texts as one stream of batches: which sequences a step takes follows from its number alone.

So training that is continued, or split over other processes, sees what it would have seen. The texts' shares are kept
slot by slot: after any number of sequences, each text has had its share of them to within one. Inside a text, the first
pass goes through the sequences as they were packed, which is in an order of the text's seed; each further one goes in
an order drawn anew. What is held out are a text's first sequences, and a longer pack of a text begins with a shorter
one: so several stages hold out the same, and can read on where an earlier one stopped.
"""

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import TypeAlias

import torch
from torch import Tensor

from compress.data.training import Batch, PackedText
from compress.errors import CalibrationError

CODE_VERSION = 1  # raised when the same texts give other batches
LONGEST_CYCLE = 1 << 16  # slots until the order of the texts repeats
FEW_PASSES = 4

Place: TypeAlias = tuple[int, int]  # of a sequence: the number of its text, and its own in it


class Mixture:
    """Batches from packed texts, by weight.

    Args:
        texts: of one sequence length.
        weights: each text's share of the sequences, beside the others'. Shares that are no simple ratio are rounded to
            65,536ths.
        seed: of the order inside the texts, from the second pass on.
        batch_size: B, sequences of a step.
        held_out: sequences that are in no batch, over all texts: at least one of each text that has two, and no more
            than a tenth of it.
        skipped: sequences that earlier steps have taken, before step 0.

    Attributes:
        names: of the texts, each once.

    Raises:
        CalibrationError: texts of several sequence lengths.
    """

    def __init__(
        self,
        texts: Sequence[PackedText],
        weights: Sequence[float],
        *,
        seed: int,
        batch_size: int,
        held_out: int,
        skipped: int = 0,
    ) -> None:
        other = next((text for text in texts if text.sequence_length != texts[0].sequence_length), None)
        if other is not None:
            raise CalibrationError(
                f"{texts[0].name} has sequences of {texts[0].sequence_length} tokens and {other.name} of "
                f"{other.sequence_length}; give all texts one sequence_length"
            )
        self.texts = list(texts)
        self.batch_size = batch_size
        self.sequence_length = texts[0].sequence_length
        self.names = _distinct([text.name for text in texts])
        self._seed, self._skipped = seed, skipped
        self._shares = whole_shares(weights)
        self._cycle = cycle(self._shares)
        self._before = [_running_count(self._cycle, number) for number in range(len(texts))]
        counts = held_counts([text.sequences for text in texts], self._shares, held_out)
        self._held = counts
        self._trained = [text.sequences - count for text, count in zip(texts, counts, strict=True)]
        self._order = lru_cache(maxsize=2 * len(texts))(self._draw_order)

    def indices(self, step: int) -> list[Place]:
        """Which sequences a step takes, counted from 0: B of them."""
        first = self._skipped + step * self.batch_size
        taken = [self._taken(number, first) for number in range(len(self.texts))]
        found = []
        for slot in range(first, first + self.batch_size):
            number = self._cycle[slot % len(self._cycle)]
            passed, place = divmod(taken[number], self._trained[number])
            found.append((number, int(self._order(number, passed)[place])))
            taken[number] += 1
        return found

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        return self.read(self.indices(step))

    def held_out(self) -> list[Place]:
        """The sequences that are in no batch, the first ones of each text."""
        return [(number, index) for number, held in enumerate(self._held) for index in range(held)]

    def read(self, places: Sequence[Place]) -> Batch:
        """Some sequences, in the order in which they are asked for."""
        shape = (len(places), self.sequence_length)
        batch = Batch(
            torch.empty(shape, dtype=torch.int64),
            torch.empty(shape, dtype=torch.int32),
            torch.empty(shape, dtype=torch.bool),
        )
        for number, text in enumerate(self.texts):
            rows = [row for row, (of, _) in enumerate(places) if of == number]
            if not rows:
                continue
            part = text.read([places[row][1] for row in rows])
            parts = ((batch.tokens, part.tokens), (batch.documents, part.documents), (batch.scored, part.scored))
            for whole, own in parts:
                whole.numpy()[rows] = own.numpy()  # torch would wake a thread on each core for so little
        return batch

    def passes(self, steps: int) -> dict[str, float]:
        """How often each text has been gone through after so many steps, skipped sequences included, by its name."""
        slots = self._skipped + steps * self.batch_size
        taken = [self._taken(number, slots) for number in range(len(self.texts))]
        return {name: count / all_ for name, count, all_ in zip(self.names, taken, self._trained, strict=True)}

    def tokens(self, steps: int) -> int:
        """Tokens of so many steps, repeats counted."""
        return steps * self.batch_size * self.sequence_length

    def steps_before_exhausted(self) -> int:
        """The most steps in which no sequence comes twice."""
        most = sum(self._trained) // self.batch_size
        return bisect_right(range(1, most + 1), 1.0, key=lambda steps: max(self.passes(steps).values()))

    def _taken(self, number: int, slots: int) -> int:
        """Sequences of a text in the first slots."""
        cycles, rest = divmod(slots, len(self._cycle))
        return cycles * self._before[number][-1] + self._before[number][rest]

    def _draw_order(self, number: int, passed: int) -> Tensor:
        """The order in which a pass goes through a text's sequences, without those held out."""
        order = torch.arange(self._held[number], self.texts[number].sequences)
        if not passed:
            return order
        digest = hashlib.sha256(f"{self._seed}:{number}:{passed}".encode()).digest()
        drawn = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        return order[torch.randperm(len(order), generator=drawn)]


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same ratio, whose sum is at most `LONGEST_CYCLE`; none is 0."""
    exact = [Fraction(repr(weight)) for weight in weights]
    scale = lcm(*(share.denominator for share in exact))
    whole = [int(share * scale) for share in exact]
    whole = [share // gcd(*whole) for share in whole]
    if sum(whole) <= LONGEST_CYCLE:
        return whole
    ideal = [share * LONGEST_CYCLE / sum(exact) for share in exact]
    rounded = [max(1, int(share)) for share in ideal]
    behind = sorted(range(len(ideal)), key=lambda number: rounded[number] - ideal[number])
    for number in behind[: max(0, LONGEST_CYCLE - sum(rounded))]:
        rounded[number] += 1
    return rounded


def cycle(shares: Sequence[int]) -> list[int]:
    """The number of the text in each slot of a cycle, in which text k has `shares[k]` of them.

    Where p is a text's share of the slots, its n-th sequence, from 0, comes between slots n / p and (n + 1) / p: of
    those that may come, the one whose time ends first does. Every text has then had its share of any first slots, to
    within one (Baruah et al., Proportionate progress, Algorithmica 1996).
    """
    length, taken = sum(shares), [0] * len(shares)
    slots = []
    for slot in range(length):
        ready = (number for number, share in enumerate(shares) if taken[number] * length < (slot + 1) * share)
        chosen = min(ready, key=lambda number: (-(-(taken[number] + 1) * length // shares[number]), number))
        taken[chosen] += 1
        slots.append(chosen)
    return slots


def held_counts(sequences: Sequence[int], shares: Sequence[int], wanted: int) -> list[int]:
    """How many sequences of each text are held out: by share, at least one and at most a tenth where there are two."""
    room = [0 if count < 2 or not wanted else max(1, count // 10) for count in sequences]
    held = [min(1, each) for each in room]
    for _ in range(min(wanted, sum(room)) - sum(held)):
        open_ = [number for number, each in enumerate(held) if each < room[number]]
        held[max(open_, key=lambda number: (shares[number] / (held[number] + 1), -number))] += 1
    return held


def words(passes: Mapping[str, float]) -> list[str]:
    """What to say of texts that are gone through more than once, a line each."""
    said = []
    for name, count in passes.items():
        if count > FEW_PASSES:
            said.append(
                f"{name}: is gone through {count:.1f} times; from about {FEW_PASSES} passes on repeats help little, "
                "and many hurt (arXiv 2305.16264): add text or train on fewer tokens"
            )
        elif count > 1:
            said.append(f"{name}: has fewer tokens than are trained on, and is gone through {count:.1f} times")
    return said


def _running_count(slots: Sequence[int], number: int) -> list[int]:
    """How often a number is among the first n slots, for n from 0 to all."""
    counts = [0]
    for slot in slots:
        counts.append(counts[-1] + (slot == number))
    return counts


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that an earlier one has too."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found
