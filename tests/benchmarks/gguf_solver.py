"""Times of the solver on ggml's block grids, matrix by matrix of a Llama-8B layer, beside GPTQ of W4 in groups of 128.

    python tests/benchmarks/gguf_solver.py [--device cuda|cpu] [--small] [--no-twin]

Random bf16 weights and correlated inputs. Prints a table for RESULTS.md, milliseconds: `factor` is `factorize`, which
either solver needs; `walk` is `block_gptq`, `refine` two rounds of refinement, `total` their sum, as a run has them,
with CUDA graphs; `launched` is that sum with each kernel launched by itself. `first` is the first call of walk and
refinement without graphs, in which Triton may compile, `recorded` the first with them. `W4 g128` is `gptq` as it is for
compressed-tensors; `memory` what the recorded call takes beyond its inputs at its peak, GiB. For one shape the
plain-torch twins run too: their milliseconds, the share of codes that differ, and the ratio of the kernels' losses to
theirs. The last line adds up a model of 32 such layers as q4_k_m has it (half of the value and down projections are
q6_k), each matrix solved by itself.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from compress.kernels.replayed import DIRECTLY, Replays, replays_on
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType
from compress.quant import block_gptq, block_refine, block_scales
from compress.quant.blocks import Blocked
from compress.quant.gptq import Factor, factorize, gptq, visiting_order
from compress.quant.grid import Grid
from compress.quant.statistics import gram

SHAPES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
KINDS = ("q4_k", "q6_k", "q3_k")
HEADER = (
    "type", "shape", "factor", "first", "launched", "recorded", "walk", "refine", "total", "W4 g128", "memory", "twin",
    "codes", "loss",
)  # fmt: skip
LAYERS = 32


class Clock:
    """Milliseconds of calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def once(self, call: Callable[[], object]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    def median(self, call: Callable[[], object], repeats: int = 3) -> float:
        return statistics.median(self.once(call) for _ in range(repeats))


def hessian_of(columns: int, device: torch.device) -> Tensor:
    """X^T X of inputs that share 64 directions and differ in size from column to column."""
    generator = torch.Generator(device).manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    sizes = torch.logspace(-1, 1, columns, device=device)[torch.randperm(columns, generator=generator, device=device)]
    shared = normal(64, columns)
    batches = [((normal(columns, 64) @ shared * 0.25 + normal(columns, columns)) * sizes).bfloat16() for _ in range(2)]
    hessian = gram(batches)
    assert hessian is not None
    return hessian


def both(
    weight: Tensor, factor: Factor, hessian: Tensor, kind: BlockType, replays: Replays = DIRECTLY
) -> tuple[Blocked, Tensor]:
    found, _ = block_gptq.block_gptq(weight, factor, kind, "hessian", replays)
    return block_refine.refine(weight, found, hessian, factor.damp, 2, replays)


def beside_the_twin(clock: Clock, solve: Callable[[], tuple[Blocked, Tensor]]) -> list[str]:
    found, loss = solve()
    kept: list[tuple[Blocked, Tensor]] = []
    with ExitStack() as patches:
        for module in (block_gptq, block_refine, block_scales):
            patches.enter_context(patch.object(module, "usable", lambda _: False))
        taken = clock.once(lambda: kept.append(solve()))
    wanted, wanted_loss = kept[0]
    codes = float((found.codes != wanted.codes).float().mean())
    return [f"{taken:.0f}", f"{codes:.1e}", f"{float(loss.sum() / wanted_loss.sum()):.6f}"]


def measure(
    clock: Clock, kind: BlockType, weight: Tensor, hessian: Tensor, plain: float, twin: bool
) -> tuple[tuple[float, float], list[str]]:
    """Milliseconds of walk and refinement, replayed and launched, and the cells of a row."""
    factor = factorize(hessian, block_gptq.block_order(hessian.diagonal(), kind, True), 0.01)
    taken = clock.median(lambda: factorize(hessian, factor.order, 0.01))
    first = clock.once(lambda: both(weight, factor, hessian, kind))
    launched = clock.median(lambda: both(weight, factor, hessian, kind))
    on_gpu, before, replays = weight.device.type == "cuda", 0, replays_on(weight.device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    recorded = clock.once(lambda: both(weight, factor, hessian, kind, replays))
    memory = f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.2f}" if on_gpu else ""
    solved = block_gptq.block_gptq(weight, factor, kind, "hessian", replays)[0]
    walk = clock.median(lambda: block_gptq.block_gptq(weight, factor, kind, "hessian", replays))
    refined = clock.median(lambda: block_refine.refine(weight, solved, hessian, factor.damp, 2, replays))
    compared = beside_the_twin(clock, lambda: both(weight, factor, hessian, kind)) if twin else ["", "", ""]
    times = [f"{each:.1f}" for each in (taken, first, launched, recorded, walk, refined, walk + refined, plain)]
    shape = f"{weight.shape[0]} x {weight.shape[1]}"
    return (walk + refined, launched), [kind.name, shape, *times, memory, *compared]


def summed(times: dict[tuple[str, tuple[int, int]], float], shapes: tuple[tuple[int, int], ...]) -> float:
    """Seconds of a model, each matrix solved alone; those that a run stacks take less."""
    square, few, wide, tall = shapes
    layer = 2 * times["q4_k", square] + times["q4_k", few] + 2 * times["q4_k", wide]  # q, o; k; gate, up
    layer += sum(times[kind, shape] for kind in ("q4_k", "q6_k") for shape in (few, tall)) / 2  # v, down
    return LAYERS * layer / 1e3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="shapes an eighth as wide and tall, for a try on a CPU")
    parser.add_argument("--no-twin", action="store_true", help="time the kernels alone")
    options = parser.parse_args()
    device, divided = torch.device(options.device), 8 if options.small else 1
    shapes = tuple((rows // divided, columns // divided) for rows, columns in SHAPES)
    clock = Clock(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; milliseconds, memory in GiB\n")
    print("|", " | ".join(HEADER), "|")
    print("| --- " * len(HEADER) + "|")
    times: tuple[dict[tuple[str, tuple[int, int]], float], ...] = ({}, {})  # replayed, launched
    usual = dict.fromkeys(shapes, 0.0)
    for columns in sorted({shape[1] for shape in shapes}):
        hessian = hessian_of(columns, device)
        grid = Grid(4, 128, True)
        factor = factorize(hessian, visiting_order(hessian.diagonal(), 128, True), 0.01)
        for shape in (each for each in shapes if each[1] == columns):
            generator = torch.Generator(device).manual_seed(shape[0])
            weight = (torch.randn(*shape, generator=generator, device=device) * 0.02).bfloat16()
            gptq(weight, factor, grid, "hessian")  # compiles
            usual[shape] = clock.median(partial(gptq, weight, factor, grid, "hessian"))
            for kind in KINDS:
                twin = shape == shapes[0] and device.type == "cuda" and not options.no_twin
                found, cells = measure(clock, BLOCK_TYPES[kind], weight, hessian, usual[shape], twin)
                times[0][kind, shape], times[1][kind, shape] = found
                print("|", " | ".join(cells), "|", flush=True)
    square, few, wide, tall = (usual[shape] for shape in shapes)
    replayed, launched = (summed(each, shapes) for each in times)
    print(f"\n{LAYERS} layers as q4_k_m: walk and refinement {replayed:.1f} s, launched {launched:.1f} s; ", end="")
    print(f"W4 g128 {LAYERS * (2 * square + 2 * few + 2 * wide + tall) / 1e3:.1f} s")


if __name__ == "__main__":
    main()
