"""KL(teacher || student), the divergence that distillation minimises, over whole predictions or over draws from them.

Shapes: n rows, V vocabulary, K draws. Natural logarithms; p is the teacher's prediction, q the student's.
"""

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(p || q), where p and q are softmaxes of logits divided by T (Hinton et al. 2015, arXiv 1503.02531, 2.1).

    The sum is of p (ln p - ln q) + q - p, as `compress.evaluation.divergence` explains: no term is below 0 or has a
    slope at p = q. With d ln q_j / d z_i = ([i = j] - q_i) / T the slope along logit z_i is (q_i - p_i) / T, times T^2.

    Args:
        log_p: float32 [n, V].
        log_q: float32 [n, V].
        temperature: T.

    Returns:
        The loss of each row, [n], and its gradient with respect to the student's logits, [n, V].
    """
    p, q = log_p.exp(), log_q.exp()
    slope = q - p
    loss = (log_p - log_q).mul_(p).add_(slope).sum(dim=1).clamp_min_(0)
    return loss * temperature**2, slope.mul_(temperature)


def sampled_kl(log_q: Tensor, ids: Tensor, shares: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of KL(p || q) at T = 1: -sum_k share_k ln q(id_k), less the entropy of p.

    A draw is a cross-entropy, whose slope is q - [i = id], with its share as factor. The estimate can be below 0: only
    the entropy is exact (Anshumann et al. 2025, arXiv 2503.16870, sample targets like this).

    Args:
        log_q: float32 [n, V].
        ids: int64 [n, K], tokens, one may come twice; those outside [0, V) count as no draw.
        shares: float32 [n, K].
        entropy: float32 [n], nats.

    Returns:
        As `forward_kl`.
    """
    inside = (ids >= 0) & (ids < log_q.shape[1])
    ids, shares = ids.where(inside, 0), shares.where(inside, 0.0)
    loss = -torch.linalg.vecdot(shares, log_q.gather(1, ids)) - entropy
    slope = log_q.exp().mul_(shares.sum(dim=1, keepdim=True)).scatter_add_(1, ids, -shares)
    return loss, slope
