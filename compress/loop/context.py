"""What a run gives its stages: where to compute, what to calibrate on, whom to tell."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.loop.stream import TOKENS_PER_BATCH
from compress.model.checkpoint import Checkpoint
from compress.system import distributed
from compress.system.memory import available
from compress.system.progress import Reporter


@dataclass(frozen=True)
class Context:
    """Shared by the stages of a run.

    Args:
        device: where layers run and solvers work.
        dtype: precision of the forward passes.
        tokens: calibration sequences; None where no stage needs them.
        probe: token ids [1, S] on which the written checkpoint is compared with the model in memory.
        reporter: progress and warnings.
        trust_remote_code: as in transformers.
        max_memory: bytes of the device's memory (of the machine's, on a CPU) that may be used; None is what is free.
        base: the recipe's model, before any stage.
        layers: which of its layers each layer of the stage's parent was; None: all of them, in order.
        fresh: whether nothing that earlier runs have left there is used.
        shared: folder for what stages on the same model and text can share; None keeps nothing.
        work: the work folder.
        models: folders of other models that stages name, by what the recipe calls them.
        tracker: the recipe's tracker of runs, for stages that name none of their own.
        tracked: what a tracker calls the run.
    """

    device: torch.device
    dtype: torch.dtype
    tokens: TokenSet | None
    probe: Tensor
    reporter: Reporter
    trust_remote_code: bool
    max_memory: int | None = None
    base: Checkpoint | None = None
    layers: Sequence[int] | None = None
    fresh: bool = False
    shared: Path | None = None
    work: Path | None = None
    models: Mapping[str, Path] = field(default_factory=dict)
    tracker: str | None = None
    tracked: str = "dscompress"

    def calibration(self) -> Tensor:
        """This process's calibration sequences, [N, S]."""
        assert self.tokens is not None, "the runner reads them where a stage calibrates"
        return self.tokens.tokens[distributed.rank() :: distributed.world()]

    def room(self, layer_bytes: int, widest: int, hidden: int) -> float:
        """Bytes left for activations beside the weights, the largest Hessian's solution and one batch.

        Args:
            layer_bytes: of a layer's weights, as often as they are held, and of the next layer's.
            widest: most inputs of a linear.
            hidden: width of the hidden states.
        """
        batch = TOKENS_PER_BATCH[self.device.type] * (3 * widest + 6 * hidden) * self.dtype.itemsize
        free = available(self.device, self.max_memory)
        if self.device.type == "cpu":
            free //= distributed.here()  # the processes on one machine share its memory
        return free - layer_bytes - 20 * widest**2 - batch
