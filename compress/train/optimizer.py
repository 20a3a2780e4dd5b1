"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), with moments in float32 or in 8 bits."""

import torch
from torch import nn

_BETAS, _EPSILON = (0.9, 0.95), 1e-8


def make_optimizer(trainee: nn.Module, name: str, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW over the trained parameters; matrices alone decay.

    Args:
        trainee: with its parameters.
        name: "adamw" or "adamw8bit".
        weight_decay: of matrices.
    """
    own = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in own if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in own if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw8bit":
        from compress.train.adamw8bit import BoundedAdamW8bit  # here, because torchao is an extra

        optimizer: torch.optim.Optimizer = BoundedAdamW8bit(groups, lr=0.0, betas=_BETAS, eps=_EPSILON)
        return optimizer
    return torch.optim.AdamW(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)
