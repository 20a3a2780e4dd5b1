"""Sums of squared inputs, what llama.cpp calls an importance matrix, taken as the calibration text goes by.

They are those of the original model: llama-imatrix runs a model before it is quantized. The stage has the Hessian of
what it has quantized so far, in part weighed by attention, so its diagonal is another thing. But to correct the drift
it runs the original beside, and that one's inputs are summed here, each token counting as one.

A layer's sums are a file of their own beside the layer's part, so that a run that was stopped does not lose them.

Shapes: N tokens, I inputs.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.loop.reference import Pair
from compress.model.checkpoint import read_part, write_part
from compress.system import distributed

FILE = "imatrix.safetensors"
_TOKENS = 1024  # squared at once: copies in float32 are made of them


class InputSquares:
    """The sums of one stage.

    Args:
        folder: where those of each layer are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._sums: dict[str, Tensor] = {}

    def noting(self, names: Sequence[str], pairs: Iterable[Pair]) -> Iterator[Pair]:
        """The same pairs, which are to be gone through once; the original model's inputs are added up on the way.

        Args:
            names: of the linears that have these inputs, in full.
            pairs: batch by batch.
        """
        total: Tensor | None = None
        for batch, beside in pairs:
            assert beside is not None, "the recipe asks for the original model beside"
            x_NI = beside.original.flatten(0, -2)
            if total is None:
                total = torch.zeros(x_NI.shape[1], dtype=torch.float64, device=x_NI.device)
            for part in x_NI.split(_TOKENS):
                total += part.float().square().sum(0, dtype=torch.float64)
            yield batch, beside
        assert total is not None, "there is calibration text"
        distributed.all_reduce(total)
        self._sums |= {name: total.float().cpu() for name in names}

    def keep(self, index: int) -> None:
        """Write down what was summed in a layer, before the layer itself is written."""
        if distributed.rank() == 0:
            write_part(self._file(index), self._sums, {})
        self._sums = {}

    def join(self, depth: int, checkpoint: Path, tokens: TokenSet) -> None:
        """Put the sums of all layers into a finished checkpoint, with what they are of."""
        found: dict[str, Tensor] = {}
        for index in range(depth):
            found |= read_part(self._file(index))[0]
        about = {"text": tokens.name, "sequences": str(tokens.sequences), "length": str(tokens.sequence_length)}
        write_part(checkpoint / FILE, found, about)

    def _file(self, index: int) -> Path:
        return self._folder / f"squares-{index:05d}.safetensors"
