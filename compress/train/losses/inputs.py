"""What a loss over next tokens is computed from. N rows (tokens with a loss), V vocabulary, D width, K draws."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Head:
    """How last hidden states become logits: softcap(scale * (h W^T + b)), softcap(z) = c tanh(z / c).

    Args:
        weight: [V, D].
        bias: [V].
        scale: factor of the logits.
        softcap: c; None leaves them.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Sampled:
    """Draws from a teacher's predictions: sum_k shares[n, k] f(ids[n, k]) is an unbiased estimate of E_p[f].

    Args:
        ids: int64 [N, K], tokens; where the share is 0 there is none.
        shares: float32 [N, K], each row sums to 1.
        entropy: float32 [N], the exact entropy of the teacher's whole prediction, nats.
    """

    ids: Tensor
    shares: Tensor
    entropy: Tensor
