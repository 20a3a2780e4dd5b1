"""The block types of ggml, a row each: how many columns share which scales, and what a code stands for. Never torch.

A row of a matrix is cut into blocks, and those of the k-types into sub-blocks. A weight is

    w^ = d * s * level(code) - m * t        d, m float16 of the block; s, t whole numbers of the sub-block

Types without sub-blocks have s = 1 and store an offset m that is added instead; types without a minimum have no m.
The formats: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """A storage type of ggml.

    Args:
        name: in lower case, as llama.cpp writes it.
        number: ggml's, as it stands in files.
        width: columns of a block.
        sub_width: columns of a sub-block; `width` where there are none.
        bytes: of a block.
        levels: that the codes 0, 1, ... stand for, ascending.
        has_min: whether there is an m.
        scale_range: smallest and largest s; None without sub-blocks. Where there are t, they have its range.
    """

    name: str
    number: int
    width: int
    sub_width: int
    bytes: int
    levels: tuple[int, ...]
    has_min: bool = False
    scale_range: tuple[int, int] | None = None

    @property
    def sub_blocks(self) -> int:
        """Sub-blocks of a block."""
        return self.width // self.sub_width

    @property
    def bits(self) -> int:
        """Width of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def bits_per_weight(self) -> float:
        """Of storage, scales included."""
        return 8 * self.bytes / self.width

    @property
    def uniform(self) -> bool:
        """Whether the levels are neighbouring whole numbers."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1


def _from(low: int, high: int) -> tuple[int, ...]:
    return tuple(range(low, high + 1))


_FOUR_BIT_CURVE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

BLOCK_TYPES = {
    each.name: each
    for each in (
        BlockType("q4_0", 2, 32, 32, 18, _from(-8, 7)),
        BlockType("q4_1", 3, 32, 32, 20, _from(0, 15), has_min=True),
        BlockType("q5_0", 6, 32, 32, 22, _from(-16, 15)),
        BlockType("q5_1", 7, 32, 32, 24, _from(0, 31), has_min=True),
        BlockType("q8_0", 8, 32, 32, 34, _from(-128, 127)),
        BlockType("iq4_nl", 20, 32, 32, 18, _FOUR_BIT_CURVE),
        BlockType("q2_k", 10, 256, 16, 84, _from(0, 3), has_min=True, scale_range=(0, 15)),
        BlockType("q3_k", 11, 256, 16, 110, _from(-4, 3), scale_range=(-32, 31)),
        BlockType("q4_k", 12, 256, 32, 144, _from(0, 15), has_min=True, scale_range=(0, 63)),
        BlockType("q5_k", 13, 256, 32, 176, _from(0, 31), has_min=True, scale_range=(0, 63)),
        BlockType("q6_k", 14, 256, 16, 210, _from(-32, 31), scale_range=(-128, 127)),
    )
}
