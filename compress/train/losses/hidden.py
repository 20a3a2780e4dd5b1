"""How far the student's hidden states are from the teacher's, at layers that a recipe pairs.

Shapes: N rows (tokens with a loss), Ds and Dt the widths of student and teacher.
"""

import torch
from torch import Tensor


def hidden_loss(student: Tensor, teacher: Tensor, projection: Tensor | None) -> Tensor:
    """Sum over rows of |P h_s - h_t|^2 / |h_t|^2: relative, so that layers and models of any scale weigh the same.

    A learned projection lets a narrower student be compared (Romero et al. 2015, FitNets, arXiv 1412.6550).

    Args:
        student: h_s, [N, Ds], any float dtype.
        teacher: h_t, [N, Dt]; no gradient reaches it.
        projection: P, [Dt, Ds]; None where both widths are the same.

    Returns:
        float32 scalar, differentiable. A row where the teacher is 0 counts 0.
    """
    wanted = teacher.detach().float()
    found = student.float() if projection is None else (student @ projection.to(student.dtype).t()).float()
    assert found.shape == wanted.shape, f"student {tuple(found.shape)}, teacher {tuple(wanted.shape)}"
    size = wanted.square().sum(dim=1)
    share = torch.where(size > 0, 1 / size, 0.0)
    return (found - wanted).square().sum(dim=1).mul(share).sum()
