"""The places of a text at which two models differ most, in words: what stood before, and what each expects next."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACES, CHOICES = 10, 3
_BEFORE = 24  # tokens of context that are shown
_OF_ONE_WINDOW = 2  # so that one odd passage does not fill the list

Head = Callable[[int, int], Tensor]


def worst_places(
    kl_WT: Tensor, tokens_WS: Tensor, heads: Sequence[Head], tokenizer: "PreTrainedTokenizerBase"
) -> list[dict[str, Any]]:
    """Those with the largest divergence, largest first; at most two of a window.

    Args:
        kl_WT: float32 [W, T], of the last T tokens of each window.
        tokens_WS: int64 [W, S].
        heads: of the base and of the candidate: logits [V] that predict the token at a place (window, position) of S.
        tokenizer: of both.

    Returns:
        Dicts with the fields of `compress.records.Place`.
    """
    first = tokens_WS.shape[1] - kl_WT.shape[1]
    order = kl_WT.flatten().argsort(descending=True, stable=True)
    taken: dict[int, int] = {}
    found = []
    for place in order.tolist():
        window, at = divmod(place, kl_WT.shape[1])
        if taken.get(window, 0) == _OF_ONE_WINDOW:
            continue
        taken[window] = taken.get(window, 0) + 1
        position = first + at
        found.append(
            {
                "window": window,
                "position": position,
                "kl": float(kl_WT[window, at]),
                "before": tokenizer.decode(tokens_WS[window, max(0, position - _BEFORE) : position]),
                "came": tokenizer.decode(tokens_WS[window, position : position + 1]),
                "base": _choices(heads[0](window, position), tokenizer),
                "compressed": _choices(heads[1](window, position), tokenizer),
            }
        )
        if len(found) == PLACES:
            break
    return found


def _choices(logits_V: Tensor, tokenizer: "PreTrainedTokenizerBase") -> list[tuple[str, float]]:
    """The likeliest tokens and their probabilities."""
    shares, ids = torch.softmax(logits_V.float(), 0).topk(min(CHOICES, len(logits_V)))
    return [(str(tokenizer.decode([token])), share) for token, share in zip(ids.tolist(), shares.tolist(), strict=True)]
