"""Which of ggml's block types holds codes as they are. Never imports torch."""

WIDTH = 32  # columns of a block
_SYMMETRIC = {2: "q4_0", 3: "q4_0", 4: "q4_0", 5: "q5_0", 6: "q8_0", 7: "q8_0", 8: "q8_0"}  # by bits: no wider needed
_ASYMMETRIC = {2: "q4_1", 3: "q4_1", 4: "q4_1", 5: "q5_1"}


def block_of(bits: int, symmetric: bool, columns: int) -> str | None:
    """The block type for whole numbers of so many bits; None where there is none.

    Args:
        bits: of a code.
        symmetric: whether its zero point is in the middle.
        columns: that share a scale.
    """
    return None if columns % WIDTH else (_SYMMETRIC if symmetric else _ASYMMETRIC).get(bits)
