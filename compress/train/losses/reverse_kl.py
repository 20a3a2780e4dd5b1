"""KL(student || teacher), which asks the student for what the teacher would say, not for all that it might say."""

from torch import Tensor


def reverse_kl(log_p: Tensor, log_q: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T^2 KL(q || p), where p and q are softmaxes of logits divided by T (Gu et al. 2023, MiniLLM, arXiv 2306.08543).

    The sum is of q (ln q - ln p) + p - q, as for `forward_kl`. With r = ln q - ln p and d q_j / d z_i =
    q_j ([i = j] - q_i) / T, the slope along logit z_i is q_i (r_i - sum_j q_j r_j) / T, times T^2.

    Args:
        log_p: float32 [n, V], of the teacher.
        log_q: float32 [n, V], of the student.
        temperature: T.

    Returns:
        The loss of each row, [n], and its gradient with respect to the student's logits, [n, V].
    """
    p, q = log_p.exp(), log_q.exp()
    ratio = log_q - log_p
    weighted = q * ratio
    loss = (weighted + (p - q)).sum(dim=1).clamp_min_(0)
    slope = ratio.sub_(weighted.sum(dim=1, keepdim=True)).mul_(q)
    return loss * temperature**2, slope.mul_(temperature)
