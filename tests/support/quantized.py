"""The quantize stage by itself, without a runner around it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, write_part
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.records import Stage
from compress.stages.quantize.run import run
from compress.system.progress import Advance, Reporter

PROBE = "probe.safetensors"


def quantize(
    spec: WeightOnlyStage | WeightActivationStage, parent: Checkpoint, output: Path, context: Context
) -> Stage:
    """Run the stage; what the finished model says to the probe goes into the file PROBE in `output`."""
    result = run(spec, parent, output, context)
    write_part(output / PROBE, {"logits": result.logits}, {})
    return result.record


def stop_after(
    layers: int, spec: WeightOnlyStage | WeightActivationStage, parent: Checkpoint, output: Path, context: Context
) -> None:
    """Run the stage and interrupt it, as Ctrl-C does, when `layers` of its layers are done."""
    with pytest.raises(KeyboardInterrupt):
        run(spec, parent, output, replace(context, reporter=Stops(layers)))


def opens(written: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The checkpoint in stock transformers, which must find all that it looks for and nothing else."""
    stock, info = AutoModelForCausalLM.from_pretrained(written, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return stock.eval()


class Stops(Reporter):
    """Interrupts a task when a number of its units are done."""

    def __init__(self, after: int) -> None:
        super().__init__(quiet=True)
        self.left = after

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        yield self._advance

    def _advance(self) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
