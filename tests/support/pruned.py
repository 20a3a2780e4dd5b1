"""The prune stage by itself, without a runner around it."""

from pathlib import Path
from typing import Any

import torch
from quantized import PROBE
from random_models import random_tokens

from compress.data.calibration import TokenSet
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, write_part
from compress.recipe.prune import PruneStage
from compress.recipe.text import CalibrationSpec
from compress.records import Stage
from compress.stages.contract import Plan, Setting
from compress.stages.prune.plan import plan
from compress.stages.prune.run import run
from compress.system.progress import Reporter

SETTING = Setting("stages.0", CalibrationSpec(source="text.txt", samples=2, sequence_length=32))


def spec(**settings: Any) -> PruneStage:
    return PruneStage.model_validate({"kind": "prune", **settings})


def planned(parent: Checkpoint, setting: Setting = SETTING, **settings: Any) -> Plan:
    return plan(spec(**settings), parent, setting)


def context(dtype: torch.dtype = torch.float32, sequences: int = 16, length: int = 32) -> Context:
    tokens = TokenSet(random_tokens(sequences, length, 1), "random", "random", None)
    return Context(torch.device("cpu"), dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def prune(parent: Checkpoint, output: Path, there: Context | None = None, **settings: Any) -> Stage:
    """Plan and run the stage; what the finished model says to the probe goes into the file PROBE in `output`."""
    found = planned(parent, **settings)
    assert not found.problems and found.spec is not None, found.problems
    result = run(found.spec, parent, output, there or context())
    write_part(output / PROBE, {"logits": result.logits}, {})
    return result.record
