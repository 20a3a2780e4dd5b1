"""The loss of pretraining: how surprised the student is by the token that came next."""

from torch import Tensor


def cross_entropy(log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-ln q(target); its slope along logit z_i is q_i - [i = target].

    Args:
        log_q: float32 [n, V], at T = 1.
        targets: int64 [n]; a row whose target lies outside [0, V) has no loss.

    Returns:
        The loss of each row, [n], and its gradient with respect to the student's logits, [n, V].
    """
    inside = ((targets >= 0) & (targets < log_q.shape[1]))[:, None]
    at = targets[:, None].where(inside, 0)
    loss = -log_q.gather(1, at).where(inside, 0.0)[:, 0]
    one = inside.to(log_q.dtype)
    return loss, log_q.exp().mul_(one).scatter_add_(1, at, -one)
