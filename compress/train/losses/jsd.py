"""The generalised Jensen-Shannon divergence, between the forward KL (beta near 0) and the reverse one (near 1)."""

import torch
from torch import Tensor


def jsd(log_p: Tensor, log_q: Tensor, temperature: float, beta: float) -> tuple[Tensor, Tensor]:
    """T^2 (beta KL(p || m) + (1 - beta) KL(q || m)) with m = beta p + (1 - beta) q (Agarwal et al., arXiv 2306.13649).

    What the KLs of measures add to each term, beta (m - p) + (1 - beta) (m - q), is 0 here: their plain sum already has
    no term below 0 and no slope at p = q. Its slope along ln q_i is (1 - beta) q_i b_i, b = ln q - ln m, and so along
    logit z_i it is (1 - beta) q_i (b_i - sum_j q_j b_j) / T, times T^2.

    ln m is the larger of ln p and ln q, plus ln(1 + w (e^-|d| - 1)), d = ln p - ln q and w the other one's share in m:
    nothing overflows, and it is exactly ln p where p = q.

    Args:
        log_p: float32 [n, V], of the teacher.
        log_q: float32 [n, V], of the student.
        temperature: T.
        beta: the teacher's share in m, between 0 and 1.

    Returns:
        The loss of each row, [n], and its gradient with respect to the student's logits, [n, V].
    """
    p, q = log_p.exp(), log_q.exp()
    d = log_p - log_q
    above = torch.log1p(d.abs().neg_().expm1_().mul_(torch.where(d > 0, 1 - beta, beta)))
    of_p = d.clamp(max=0) - above
    of_q = d.neg_().clamp_(max=0) - above
    weighted = q * of_q
    loss = (beta * p * of_p + (1 - beta) * weighted).sum(dim=1).clamp_min_(0)
    slope = of_q.sub_(weighted.sum(dim=1, keepdim=True)).mul_(q)
    return loss * temperature**2, slope.mul_((1 - beta) * temperature)
