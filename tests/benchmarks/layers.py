"""Seconds per decoder layer of GPTQ, and where they go, on random weights of Llama-3.1-8B's layer shapes.

    python tests/benchmarks/layers.py [--shape llama-8b] [--layers 6] [--samples 128] [--drift 0 0.5]
        [--llm-compressor ENV/bin/python] [--gptqmodel ENV/bin/python]

Seconds per layer are from the end of the first layer to the end of the last, so start-up and the finish are not counted
and writing is; a last run brings the device to a stop after each phase, for the shares. The ceilings of the device are
measured beside it: a bf16 product and X^T X with float32 sums; and the floor that follows from them with two forward
passes a layer, whole Hessians and 0.09 s of everything else. Peers (peers.py) run in the same call on the same weights,
with four layers and two (the difference), each by the Python of an environment of its own (several words will do:
env A=B python).
"""

import argparse
import functools
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compress.data.calibration import TokenSet
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.quant import gptq as solver
from compress.quant.error_propagation import PropagatedError
from compress.quant.statistics import Gram
from compress.recipe.quantize import WeightOnlyStage
from compress.stages import layerwise
from compress.stages.quantize import run as stage
from compress.stages.quantize import solve
from compress.system.compute import pick_device
from compress.system.progress import Reporter

BF16, GRAM, FORWARD = "bf16 product", "X^T X", "forward and the rest"
SHAPES = {
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
}
_TOKENIZER = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"  # peers want one, though nothing is tokenized


def write_model(folder: Path, layers: int, shapes: dict[str, int], device: torch.device) -> None:
    """Random bf16 weights, drawn on the device."""
    config = LlamaConfig(**shapes, num_hidden_layers=layers, vocab_size=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.to("cpu").save_pretrained(folder)
    for file in _TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)


class Clock(Reporter):
    """Notes when each layer was done."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.ticks: list[float] = []

    @contextmanager
    def task(self, *_: Any, **__: Any) -> Iterator[Callable[[], None]]:
        """A task whose units are all noted."""
        yield lambda: self.ticks.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """Per layer, without the first."""
        return (self.ticks[-1] - self.ticks[0]) / (len(self.ticks) - 1)


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
    model: Path, tokens: torch.Tensor, device: torch.device, spec: WeightOnlyStage, max_memory: int | None
) -> tuple[Any, Clock]:
    """The stage's record of a run in a scratch folder, and when its layers were done."""
    clock = Clock()
    dtype = torch.bfloat16
    calibration = TokenSet(tokens, "random", "random", None)
    context = Context(device, dtype, calibration, tokens[:1, :64], clock, False, max_memory)
    with tempfile.TemporaryDirectory() as scratch:
        return stage.run(spec, Checkpoint(model), Path(scratch) / "stage", context).record, clock


def ceilings(device: torch.device, size: int) -> dict[str, float]:
    """TFLOP/s of a bf16 product and of X^T X [size, size] with float32 sums."""
    x = torch.randn(4 * size, size, device=device, dtype=torch.bfloat16)
    w = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    jobs: dict[str, Callable[[], Any]] = {BF16: lambda: x @ w}
    if device.type == "cuda":
        jobs[GRAM] = lambda: torch.mm(x.t(), x, out_dtype=torch.float32)
    else:
        jobs[GRAM] = lambda: x.float().t() @ x.float()
    found = {}
    phases = Phases(device)
    for name, job in jobs.items():
        job()
        phases.wait()
        started = time.perf_counter()
        for _ in range(5):
            job()
        phases.wait()
        found[name] = 5 * 2 * x.shape[0] * size * size / (time.perf_counter() - started) / 1e12
    return found


def work(shapes: dict[str, int], samples: int, length: int) -> dict[str, float]:
    """Floating-point operations of a layer, by what they are for."""
    hidden, inner = shapes["hidden_size"], shapes["intermediate_size"]
    key_value = hidden * shapes["num_key_value_heads"] // shapes["num_attention_heads"]
    tokens, attention = samples * length, 2 * samples * length * length * hidden  # scores and sums, causal: half of 4
    weights = 2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner
    return {
        FORWARD: 2.0 * tokens * weights + attention,
        "Hessian": 2.0 * tokens * (3 * hidden * hidden + inner * inner),
        "trailing updates": float((2 * hidden + 2 * key_value + 2 * inner) * hidden * hidden + hidden * inner * inner),
    }


def show_phases(device: torch.device, jobs: dict[str, float], run: Callable[[], Any]) -> None:
    """Run once more, with the device brought to a stop after each phase."""
    phases = Phases(device)
    for owner, name, phase in (
        (stage._Quantization, "transform", FORWARD), (LayerStream, "load_layer", "read weights"),
        (LayerStream, "fill_layer", "read weights"), (LayerStream, "groups", "find groups"),
        (PropagatedError, "add", "propagated error"), (PropagatedError, "correct", "propagated error"),
        (Gram, "add", "Hessian"), (Gram, "total", "Hessian"),
        (solve, "factorize", "factor"), (solve, "gptq", "trailing updates"), (solver, "group_scales", "scale search"),
        (solve, "measure", "record"), (solve, "describe", "record"),
        (stage, "received_attention", "attention weights"), (layerwise, "check_finite", "check"),
        (stage._Quantization, "_packed", "pack"),
    ):  # fmt: skip
        phases.wrap(owner, name, phase)
    if device.type == "cuda":
        from compress.kernels import solver as kernel

        phases.wrap(kernel, "quantize_columns", "column loop")
    started = time.perf_counter()
    layers, total = len(run()[0].layers), time.perf_counter() - started
    print(f"phases, stopped after each, {total:.2f} s in all:")
    for name, taken in sorted(phases.seconds.items(), key=lambda row: -row[1]):
        rate = f"{jobs[name] * layers / taken / 1e12:8.0f} TFLOP/s" if name in jobs else ""
        print(f"{name:<22}{taken / layers:8.4f} s / layer {taken / total:6.1%}{rate}")


def show_peer(system: str, python: str, folder: Path, settings: list[int]) -> float:
    """Seconds per layer of another system, from runs with four layers and two."""
    runs = [
        peers.measure(peers.command(system, python, folder, folder / name, "-", "-", *settings))
        for name in ("four", "few")
    ]
    each = (runs[0][0] - runs[1][0]) / 2
    print(f"{system}: {each:.3f} s / layer, peak {runs[0][1] / 1e9:.2f} GB", flush=True)
    return each


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--drift", type=float, nargs="+", default=[0.5, 0.0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--max-memory", type=float, help="GB")
    parser.add_argument("--llm-compressor", metavar="PYTHON")
    parser.add_argument("--gptqmodel", metavar="PYTHON")
    parser.add_argument("--no-phases", action="store_true")
    options = parser.parse_args()
    limit = int(options.max_memory * 1e9) if options.max_memory else None
    device = pick_device(options.device, limit)
    shapes = SHAPES[options.shape]
    group = 128 if shapes["hidden_size"] % 128 == 0 else 64
    size = (options.samples, options.sequence_length)
    tokens = torch.randint(8192, size, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        write_model(model, options.layers, shapes, device)
        print(f"device {device}, {size[0]} x {size[1]} tokens, W4 g{group}, layers of {options.shape}")
        jobs = work(shapes, *size)
        rates = ceilings(device, min(4096, 4 * shapes["hidden_size"]))
        for name, rate in rates.items():
            print(f"ceiling     {rate:.4g} TFLOP/s {name}")
        passes, hessians = (1e-12 * jobs[n] / rates[c] for n, c in ((FORWARD, BF16), ("Hessian", GRAM)))
        floor = 2 * passes + hessians + 0.09
        print(f"floor       {floor:.3f} s / layer: 2 x {passes:.3f} forward, {hessians:.3f} Hessians, 0.09 the rest")
        best = float("inf")
        for share in options.drift:
            spec = WeightOnlyStage(kind="quantize", drift_correction=share, group_size=group)  # type: ignore[arg-type]
            record, clock = quantize(model, tokens, device, spec, limit)
            each = clock.seconds
            best = min(best, each)
            layers = "  ".join(f"{layer.seconds:.3f}" for layer in record.layers)
            peak = (record.peak_gpu_memory_bytes or record.peak_memory_bytes) / 1e9
            print(f"drift_correction {share}: {each:.3f} s / layer, peak {peak:.2f} GB; layers by themselves {layers}")
        if not options.no_phases:
            show_phases(device, jobs, lambda: quantize(model, tokens, device, spec, limit))
        for name, layers in (("few", 2), ("four", 4)):
            write_model(folder / name, layers, shapes, device)
        for system, python in (("llm-compressor", options.llm_compressor), ("GPTQModel", options.gptqmodel)):
            if python:
                each = show_peer(system, python, folder, [*size, 4, group])
                print(f"{system} takes {each / best:.1f} x our {best:.3f} s")


if __name__ == "__main__":
    main()
