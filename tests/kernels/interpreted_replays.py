"""The solver's steps on ggml's blocks, replayed, on a CPU in Triton's interpreter: the same bits as without.

test_interpreted.py runs this file in a process of its own, with TRITON_INTERPRET=1.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from quant_problems import problem
from recorder import Recorder
from torch import Tensor

from compress.kernels import block_solver
from compress.kernels.replayed import DIRECTLY, Replays
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant import block_gptq, block_refine, block_scales
from compress.quant.blocks import Blocked
from compress.quant.gptq import factorize

assert os.environ.get("TRITON_INTERPRET") == "1", "run test_interpreted.py"


@contextmanager
def kernels(kind: BlockType) -> Iterator[None]:
    """Kernels for every tensor, in spans of two sub-blocks."""
    with ExitStack() as patches:
        for module in (block_gptq, block_refine, block_scales):
            patches.enter_context(patch.object(module, "usable", lambda _: True))
        for module in (block_gptq, block_refine, block_solver):
            patches.enter_context(patch.object(module, "_SPAN", 2 * kind.sub_width))
        yield


@pytest.mark.parametrize("name", ["q4_k", "q6_k", "q5_1"])
def test_replayed_matrices_are_the_same(name: str) -> None:
    """Two matrices, the first once more at the end: what it was is still there."""
    kind = BLOCK_TYPES[name]
    kind = kind if kind.scale_range is None else replace(kind, width=2 * kind.sub_width)
    recorder = Recorder()
    replays, spans = Replays(recorder), 0
    found: list[tuple[Blocked, Tensor]] = []
    expected: list[tuple[Blocked, Tensor]] = []
    with kernels(kind):
        for seed in (0, 1, 0):
            weight, hessian = problem(5, 4 * kind.sub_width, seed)
            factor = factorize(hessian.clone(), block_gptq.block_order(hessian.diagonal(), kind, True), 0.01)
            for into, runs in ((found, replays), (expected, DIRECTLY)):
                solved, _ = block_gptq.block_gptq(weight, factor, kind, "hessian", runs)
                into.append(block_refine.refine(weight, solved, hessian, 0.01, 1, runs))
            spans += 2
    assert recorder.replayed == 2 * (spans - 1)  # walk and refinement; the first of each only warms up
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[1], theirs[1])
        for part in ("codes", "d", "m", "scales", "mins"):
            mine, other = getattr(ours[0], part), getattr(theirs[0], part)
            assert (mine is None) == (other is None) and (mine is None or torch.equal(mine, other)), part
