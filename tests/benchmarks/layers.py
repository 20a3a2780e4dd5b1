"""Seconds per decoder layer of GPTQ, and where they go, on random weights of Llama-3.1-8B's layer shapes.

    python tests/benchmarks/layers.py [--layers 6] [--samples 128] [--sequence-length 2048] [--drift 0 0.5] [--tiny]

Seconds per layer are the difference between a run with all layers and one with two, so start-up is not counted; a last
run brings the device to a stop after each phase, for the shares. The ceilings of the same device are measured beside
it: a bf16 product and X^T X with float32 sums.
"""

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.data.calibration import TokenSet
from compress.model.checkpoint import Checkpoint
from compress.model.stream import LayerStream
from compress.progress import Reporter
from compress.quant.drift import Drift
from compress.quant.statistics import Gram
from compress.recipe import QuantizeStage
from compress.stages import quantize as stage
from compress.stages import solve
from compress.stages.context import Context, pick_device

SHAPES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}


def write_model(folder: Path, layers: int, shapes: dict[str, int], device: torch.device) -> None:
    """Random bf16 weights, drawn on the device."""
    config = LlamaConfig(**shapes, num_hidden_layers=layers, vocab_size=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.to("cpu").save_pretrained(folder)


class Phases:
    """Wraps functions so that the time until the device is done is added up under a name."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, float](float)
        self.inside = 0.0

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Time `owner.name` as `phase`, without what is timed inside of it."""
        usual = getattr(owner, name)

        @functools.wraps(usual)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            before, self.inside = self.inside, 0.0
            started = time.perf_counter()
            result = usual(*args, **kwargs)
            self.wait()
            taken = time.perf_counter() - started
            self.seconds[phase] += taken - self.inside
            self.inside = before + taken
            return result

        setattr(owner, name, timed)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def quantize(
    model: Path, tokens: torch.Tensor, device: torch.device, spec: QuantizeStage, max_memory: int | None
) -> Any:
    """The stage's record of a run in a scratch folder."""
    dtype = torch.bfloat16
    calibration = TokenSet(tokens, "random", "random", None)
    context = Context(device, dtype, calibration, tokens[:1, :64], Reporter(quiet=True), False, max_memory)
    with tempfile.TemporaryDirectory() as scratch:
        return stage.quantize(spec, Checkpoint(model), Path(scratch) / "stage", context)


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of a bf16 product and of X^T X [size, size] with float32 sums."""
    x = torch.randn(4 * size, size, device=device, dtype=torch.bfloat16)
    w = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    jobs: dict[str, tuple[Callable[[], Any], int]] = {"bf16 product": (lambda: x @ w, 1)}
    if device.type == "cuda":
        jobs["X^T X"] = (lambda: torch.mm(x.t(), x, out_dtype=torch.float32), 1)
    found = {}
    phases = Phases(device)
    for name, (job, _) in jobs.items():
        job()
        phases.wait()
        started = time.perf_counter()
        for _ in range(5):
            job()
        phases.wait()
        found[name] = 5 * 2 * x.shape[0] * size * size / (time.perf_counter() - started) / 1e12
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--drift", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-memory", type=float, help="GB")
    parser.add_argument("--no-phases", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    options = parser.parse_args()
    limit = int(options.max_memory * 1e9) if options.max_memory else None
    device = pick_device(options.device, limit)
    shapes = TINY if options.tiny else SHAPES
    tokens = torch.randint(8192, (options.samples, options.sequence_length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        few, model = Path(folder) / "few", Path(folder) / "model"
        write_model(few, 2, shapes, device)
        write_model(model, options.layers, shapes, device)
        print(f"device {device}, {options.samples} x {options.sequence_length} tokens, W4 g128")
        for name, rate in ceilings(device, shapes["hidden_size"]).items():
            print(f"ceiling     {rate:.4g} TFLOP/s {name}")
        for share in options.drift:
            spec = QuantizeStage(kind="quantize", drift_correction=share)
            quantize(few, tokens, device, spec, limit)  # compiles the kernels
            start, record = (quantize(each, tokens, device, spec, limit) for each in (few, model))
            each = (record.seconds - start.seconds) / (options.layers - 2)
            layers = "  ".join(f"{layer.seconds:.3f}" for layer in record.layers)
            peak = (record.peak_gpu_memory_bytes or record.peak_memory_bytes) / 1e9
            print(f"drift_correction {share}: {each:.3f} s / layer, peak {peak:.2f} GB; layers by themselves {layers}")
        if options.no_phases:
            return
        phases = Phases(device)
        phases.wrap(stage._Quantization, "_transform", "forward and the rest")
        phases.wrap(LayerStream, "load_layer", "read weights")
        phases.wrap(LayerStream, "fill_layer", "read weights")
        phases.wrap(LayerStream, "groups", "find groups")
        phases.wrap(Drift, "add", "drift")
        phases.wrap(Drift, "correct", "drift")
        phases.wrap(Gram, "add", "Hessian")
        phases.wrap(Gram, "total", "Hessian")
        for name, phase in (
            ("factorize", "factor"), ("gptq", "solve"), ("describe", "record")
        ):  # fmt: skip
            phases.wrap(solve, name, phase)
        phases.wrap(stage, "received_attention", "attention weights")
        phases.wrap(stage, "_check_finite", "check")
        phases.wrap(stage._Quantization, "_packed", "pack")
        quantize(model, tokens, device, spec, limit)
        total = sum(phases.seconds.values())
        print(f"phases at drift_correction {share}:")
        for name, taken in sorted(phases.seconds.items(), key=lambda row: -row[1]):
            print(f"{name:<18}{taken / options.layers:8.3f} s / layer {taken / total:6.1%}")


if __name__ == "__main__":
    main()
