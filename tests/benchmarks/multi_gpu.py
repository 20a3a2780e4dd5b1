"""Seconds per decoder layer of GPTQ when several GPUs share the work, on random weights of Llama-3.1-8B's layer shapes.

    for n in 1 2 4; do torchrun --nproc-per-node $n tests/benchmarks/multi_gpu.py; done
    torchrun --nproc-per-node 2 tests/benchmarks/multi_gpu.py --tiny --device cpu --samples 8 --sequence-length 256

Seconds per layer are from the end of the first layer to the end of the last. Memory is the most that any of the
processes took at once: on a GPU what torch allocated, without NCCL's buffers.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from layers import SHAPES, quantize, write_model

from compress.recipe.quantize import WeightOnlyStage
from compress.system import distributed
from compress.system.compute import pick_device


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--drift", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    options = parser.parse_args()
    device = pick_device(distributed.join(options.device))
    world, leads = distributed.world(), distributed.rank() == 0
    tokens = torch.randint(8192, (options.samples, options.sequence_length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = distributed.first(lambda: Path(scratch))
        model = folder / "model"
        if leads:
            write_model(model, options.layers, SHAPES["tiny" if options.tiny else "llama-8b"], device)
            print(f"{world} x {device.type}, {options.samples} x {options.sequence_length} tokens, W4 g128", flush=True)
        distributed.barrier()
        for share in options.drift:
            spec = WeightOnlyStage(kind="quantize", drift_correction=share)
            record, clock = quantize(model, tokens, device, spec, None)
            each = clock.seconds
            peak = record.peak_gpu_memory_bytes or record.peak_memory_bytes
            peaks = distributed.gather_rows(torch.tensor([peak], device=device), world)
            if leads:
                most = int(peaks.max()) / 1e9
                print(f"drift_correction {share}: {each:.3f} s / layer, peak {most:.2f} GB a process", flush=True)
        distributed.leave()  # rank 0's folder is needed no more


if __name__ == "__main__":
    main()
