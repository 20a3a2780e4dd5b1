"""A matrix that a quantize stage will quantize, and how. Never imports torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """One matrix to quantize.

    Args:
        name: module name, without ".weight".
        shape: (O, I).
        bits: width of a code.
        group_size: columns that share a scale, -1 for the row.
        symmetric: zero point fixed in the middle.
        rows: rows that share a scale beside the columns of a group; -1 means all of them.
        dtype: of the codes: int, or fp8.
        inputs: how its inputs are rounded: dynamic, static, auto (one of them, chosen by error); None: not at all.
        block: ggml's block type, which says the rest; None: no such type.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    rows: int = 1
    dtype: str = "int"
    inputs: str | None = None
    block: str | None = None

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return 1 if self.group_size == -1 else self.shape[1] // self.group_size

    @property
    def kind(self) -> str:
        """What it becomes, in a few words."""
        if self.block is not None:
            return self.block
        return f"{self.dtype}{self.bits} {self.inputs}" if self.inputs else f"{self.bits} bits g{self.group_size}"

    @property
    def scales(self) -> int:
        """Scales of its weights."""
        return self.groups * (1 if self.rows == -1 else -(-self.shape[0] // self.rows))
