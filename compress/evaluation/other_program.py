"""What every program is asked about a folder that was made for it, and how far its numbers may be from our reader's."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.evaluation.compare import open_view
from compress.evaluation.verify import Check, stream_logits
from compress.formats.dequantized import DequantizedCheckpoint

NEW_TOKENS = 16
# Times what rounding to bfloat16 does, where a program rounds as it runs; inputs in 8 bits came to 1.7 to 2.9.
_OF_ROUNDING, _FLOOR = 5.0, 0.005


@dataclass(frozen=True)
class Timing:
    """What is timed: tokens of a prompt, how many are made after it, how often behind a round to warm up."""

    prompt_tokens: int = 256
    new_tokens: int = 32
    rounds: int = 3

    @classmethod
    def within(cls, positions: int | None) -> "Timing":
        """The usual one, or fewer tokens where the model has fewer positions; one more is computed behind the last."""
        if positions is None:
            return cls()
        new = min(cls.new_tokens, max(1, positions // 8))
        return cls(max(1, min(cls.prompt_tokens, positions - new - 1)), new)


def apart(one: Tensor, other: Tensor, tokens: Tensor) -> Tensor:
    """How far log-probabilities [S - 1] of the tokens that came are apart, by logits [S or more, V]."""
    both = (each[: len(tokens) - 1].double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0] for each in (one, other))
    return (next(both) - next(both)).abs()


def allowed_for_rounding(view: DequantizedCheckpoint, device: torch.device, exact: Tensor, tokens: Tensor) -> float:
    """How far a program that rounds as it runs may be from our reader in float32, nats on average.

    Args:
        view: the checkpoint.
        device: where our reader computes.
        exact: its logits [S or more, V].
        tokens: [S].
    """
    rounded = stream_logits(open_view(view, device, torch.bfloat16, False), tokens)
    return max(_OF_ROUNDING * float(apart(rounded, exact, tokens).mean()), _FLOOR)


def same_codes(matrices: int, other: Sequence[str]) -> Check:
    """Whether a file has the checkpoint's codes.

    Args:
        matrices: how many should be there as codes.
        other: those that are not the checkpoint's.
    """
    if not other:
        return Check("codes", True, f"all {matrices} matrices, scales and zero points too, as in the checkpoint")
    return Check("codes", False, f"{len(other)} of {matrices} matrices are not the checkpoint's, first {other[0]}")


def same_numbers(name: str, program: str, differences: Tensor, allowed: float, made: int, agreed: int) -> Check:
    """Whether a program computes what our reader does.

    Args:
        name: of the check.
        program: its name and version.
        differences: of log-probabilities of tokens, nats.
        allowed: on average.
        made: tokens that it went on with.
        agreed: so many of them, from the first on, are those that our reader ranks first.
    """
    detail = (
        f"{program}: log-probabilities of {len(differences)} tokens differ by {differences.mean():.2g} nats on average "
        f"(allowed {allowed:.2g}), {differences.max():.2g} at most; of {made} tokens it goes on with, the first "
        f"{agreed} are ours"
    )
    return Check(name, bool(differences.mean() <= allowed), detail)
