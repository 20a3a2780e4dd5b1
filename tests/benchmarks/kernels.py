"""Times of the GPTQ solver on a GPU, matrix by matrix of a Llama-8B layer, beside its plain-torch twin.

    python tests/benchmarks/kernels.py [--no-twin]

Random bf16 weights and correlated inputs; W4 in groups of 128 unless the row says otherwise. Prints a table for
RESULTS.md: seconds of `factorize`, of `gptq`, and of what `gptq` spends in the column loop, in the scale search and in
products (kernel times from torch's profiler, the rest is copies); then the twin's seconds on the same device, the
share of codes and scales that differ from its, and the ratio of the two losses.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from compress.quant import gptq as twin
from compress.quant import scales
from compress.quant.grid import Grid
from compress.quant.statistics import gram

LAYER = {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}
GRIDS = {
    "o, groups of 32": Grid(4, 32, True),
    "o, groups of 64": Grid(4, 64, True),
    "o, whole rows": Grid(4, -1, True),
    "o, asymmetric": Grid(4, 128, False),
    "o, 3 bits": Grid(3, 128, True),
    "o, 8 bits": Grid(8, 128, True),
    "o, float16 scales": Grid(4, 128, True, torch.float16),
}
COLUMNS = ["matrix", "shape", "factor", "gptq", "columns", "search", "products", "rest", "memory"]
COMPARED = ["twin", "codes", "scales", "loss"]


def hessian_of(columns: int) -> Tensor:
    """X^T X of inputs that share 64 directions and differ in size from column to column."""
    generator = torch.Generator("cuda").manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    sizes = torch.logspace(-1, 1, columns, device="cuda")[torch.randperm(columns, generator=generator, device="cuda")]
    shared = normal(64, columns)
    batches = [((normal(4096, 64) @ shared * 0.25 + normal(4096, columns)) * sizes).bfloat16() for _ in range(8)]
    hessian = gram(batches)
    assert hessian is not None
    return hessian


def seconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median; the first call, which compiles, is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def phases(call: Callable[[], object]) -> tuple[float, float, float, float]:
    """Seconds on the device in the column loop, the search, products and everything else."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize()
    totals = [0.0, 0.0, 0.0, 0.0]
    for event in found.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.key.lower()
            kind = 0 if name == "_columns" else 1 if name in ("_symmetric", "_asymmetric") else 3
            if any(part in name for part in ("gemm", "cutlass", "trsm", "splitk")):
                kind = 2
            totals[kind] += event.self_device_time_total / 1e6
    return totals[0], totals[1], totals[2], totals[3]


def row(
    name: str, shape: tuple[int, int], grid: Grid, factor: twin.Factor, factor_seconds: float, beside: bool
) -> None:
    generator = torch.Generator("cuda").manual_seed(shape[0])
    weight = (torch.randn(*shape, generator=generator, device="cuda") * 0.02).bfloat16()

    def solve() -> tuple[twin.Quantized, Tensor]:
        return twin.gptq(weight, factor, grid, "hessian")

    torch.cuda.reset_peak_memory_stats()
    before, whole = torch.cuda.memory_allocated(), seconds(solve)
    memory = (torch.cuda.max_memory_allocated() - before) / 2**30
    columns, search, products, rest = phases(solve)
    cells = [f"{1e3 * part:.1f}" for part in (factor_seconds, whole, columns, search, products, rest)]
    compared = ["", "", "", ""]
    if beside:
        found, loss = solve()
        with patch.object(twin, "usable", lambda _: False), patch.object(scales, "usable", lambda _: False):
            wanted, wanted_loss = solve()
            taken = seconds(solve, 1)
        codes = float((found.codes != wanted.codes).float().mean())
        stored = float((found.scale != wanted.scale).float().mean())
        ratio = float(loss.sum() / wanted_loss.sum())
        compared = [f"{1e3 * taken:.0f}", f"{codes:.2e}", f"{stored:.2e}", f"{ratio:.6f}"]
    print("|", " | ".join([name, f"{shape[0]} x {shape[1]}", *cells, f"{memory:.2f}", *compared]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-twin", action="store_true", help="time the kernels alone")
    beside = not parser.parse_args().no_twin
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; milliseconds, memory in GiB\n")
    header = COLUMNS + COMPARED
    print("|", " | ".join(header), "|")
    print("| --- " * len(header) + "|")
    for columns in (4096, 14336):
        hessian = hessian_of(columns)
        order = twin.visiting_order(hessian.diagonal(), 128, True)
        factor = twin.factorize(hessian, order, 0.01)
        taken = seconds(lambda h=hessian, o=order: twin.factorize(h, o, 0.01), 3)
        for name, shape in LAYER.items():
            if shape[1] == columns:
                row(name, shape, Grid(4, 128, True), factor, taken, beside)
        if columns == 4096:
            for name, grid in GRIDS.items():
                row(name, LAYER["o"], grid, grouped_factor(hessian, grid), taken, beside)


def grouped_factor(hessian: Tensor, grid: Grid) -> twin.Factor:
    """A factor whose order keeps the grid's groups whole."""
    order = twin.visiting_order(hessian.diagonal(), grid.columns_per_group(hessian.shape[0]), True)
    return twin.factorize(hessian, order, 0.01)


if __name__ == "__main__":
    main()
