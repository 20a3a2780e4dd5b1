"""A few draws that stand for a whole next-token prediction, and are unbiased.

A cache of a teacher's largest probabilities teaches the student a distribution that is too sharp; random draws do not,
for the mean of their shares is the prediction itself (Anshumann et al. 2025, "Sparse Logit Sampling",
arXiv:2503.16870). The draws here are systematic (Madow 1949) where the paper's are independent: D points (k + u) / D,
k = 0 .. D - 1, of the cumulative distribution, with one uniform offset u. A token of probability p is drawn floor(D p)
or ceil(D p) times, D p on average, so its share varies less than that of independent draws, and not at all where D p is
whole.

Probabilities are rounded to multiples of about 2^-52, after which all is in integers: cumulative sums are exact in any
order of addition, whatever the size of the vocabulary, and so are the points.

Shapes: n rows, V vocabulary, D draws of a row, M different ids of all rows together.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.train.losses.inputs import Sampled

MOST_DRAWS = 255  # counts are kept in a byte
_BITS = 52  # of the sum of a row's weights: 255 times it still fits int64
_NOTHING = -1000.0  # exp of it is 0 in float64


@dataclass(frozen=True)
class Draws:
    """What was drawn, row after row; all tensors are on one device.

    Args:
        ids: int32 [M], the different tokens of a row ascending.
        counts: uint8 [M], >= 1: how often each was drawn; those of a row sum to D.
        numbers: uint8 [n], how many different tokens a row has.
        entropy: float32 [n], of the whole prediction, nats.
    """

    ids: Tensor
    counts: Tensor
    numbers: Tensor
    entropy: Tensor

    @staticmethod
    def cat(parts: "Sequence[Draws]") -> "Draws":
        """The rows of all parts (one at least), in order."""
        columns = zip(*((part.ids, part.counts, part.numbers, part.entropy) for part in parts), strict=True)
        return Draws(*(torch.cat(column) for column in columns))

    def cpu(self) -> "Draws":
        """The same on the CPU."""
        return Draws(self.ids.cpu(), self.counts.cpu(), self.numbers.cpu(), self.entropy.cpu())

    def sampled(self) -> Sampled:
        """As a loss takes them, rows filled up to the longest; on the CPU, where numpy fills ten times as fast."""
        drawn = self.cpu()
        numbers = drawn.numbers.numpy()
        width = int(numbers.max(initial=0))
        there = np.arange(width) < numbers[:, None]
        ids, shares = np.zeros(there.shape, np.int64), np.zeros(there.shape, np.float32)
        ids[there] = drawn.ids.numpy()
        shares[there] = drawn.counts.numpy()
        shares /= shares.sum(axis=1, keepdims=True)
        return Sampled(torch.from_numpy(ids), torch.from_numpy(shares), drawn.entropy)


def draw(logits: Tensor, offsets: Tensor, draws: int) -> Draws:
    """Draw from the predictions of rows, each by itself: the same in any batch. Takes about 24 V bytes a row beside.

    Args:
        logits: float32 [n, V]; -inf is probability 0, and never drawn.
        offsets: float64 [n] in [0, 1), on the same device.
        draws: D, 1 to MOST_DRAWS.

    Raises:
        NumericalError: NaN or inf in the logits, or a row of -inf alone.
    """
    assert 1 <= draws <= MOST_DRAWS
    peaks = logits.amax(dim=1, keepdim=True)
    if not torch.isfinite(peaks).all():
        raise NumericalError(
            "the teacher's logits hold NaN or inf; its weights are damaged, or its numbers overflow this dtype: "
            "run it in float32"
        )
    shifted = logits.double().sub_(peaks).clamp_min_(_NOTHING)
    weights = shifted.exp()
    sums = weights.sum(dim=1, keepdim=True)
    entropy = sums[:, 0].log() - shifted.mul_(weights).sum(dim=1) / sums[:, 0]
    del shifted
    # By a power of two, which is the same however the sum was rounded.
    scale = torch.exp2((_BITS - torch.frexp(sums).exponent).double())
    cumulative = weights.mul_(scale).round_().long().cumsum_(dim=1)
    total = cumulative[:, -1:]
    first = torch.minimum((offsets[:, None] * total).long(), total - 1)
    points = (torch.arange(draws, device=logits.device) * total + first) // draws  # < total, since first is
    ids = torch.searchsorted(cumulative, points, right=True, out_int32=True)
    return _counted(ids, entropy.float())


def _counted(ids_nD: Tensor, entropy: Tensor) -> Draws:
    """Ascending draws with their repeats counted."""
    new = torch.ones_like(ids_nD, dtype=torch.bool)
    new[:, 1:] = ids_nD[:, 1:] != ids_nD[:, :-1]
    starts = new.flatten().nonzero()[:, 0]
    ends = torch.cat([starts[1:], starts.new_tensor([ids_nD.numel()])])
    return Draws(ids_nD.flatten()[starts], (ends - starts).byte(), new.sum(dim=1).byte(), entropy)


def offsets(seed: int, sequence: tuple[str, int], rows: int) -> Tensor:
    """The offsets of a sequence's rows, which hang on nothing but seed, sequence and row: float64 [rows] in [0, 1).

    Args:
        seed: another one draws anew.
        sequence: its source and its index there.
        rows: how many.
    """
    digest = hashlib.blake2b(repr((seed, *sequence)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(rows)
    return torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)
