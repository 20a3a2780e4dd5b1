"""A model in numbers, for reckoning time and memory. Never imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Body:
    """A model in numbers.

    Args:
        parameters: all of them.
        matrices: weights that each token is multiplied with, the head's too.
        layers: how many.
        hidden: width of the hidden states.
        ffn: width inside an MLP.
        attention: query heads times their width.
        keys: key-value heads times their width.
        vocabulary: logits.
    """

    parameters: int
    matrices: int
    layers: int
    hidden: int
    ffn: int
    attention: int
    keys: int
    vocabulary: int

    def forward(self, length: int) -> float:
        """Operations for one token of a sequence of so many, forward; attention is causal."""
        return 2.0 * self.matrices + 2.0 * self.layers * self.attention * length
