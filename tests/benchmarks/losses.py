"""Time, memory and error of the forward KL from hidden states, forward and backward, beside other ways to compute it.

    python tests/benchmarks/losses.py [--tokens 8192 --vocabulary 128256 --hidden 4096 --device cuda]

Student and teacher are random bf16 (float32 on a CPU); the teacher's logits are the student's and noise. Ways: dense,
float32 logits of all tokens with autograd; Liger's fused linear JSD, which at beta 0 is the forward KL, with its
accumulator as it comes and in float32 (`pip install liger-kernel==0.8.5`); and `logit_loss`. Prints milliseconds (the
median of CUDA events), the most memory allocated, inputs included, and the inputs' own, both in 10^9 bytes, and the
relative errors of the gradients of hidden and weight to float64, over some rows of each. The floor is the time of the
four matrix products with float32 results.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.train.losses.fused import Weights, logit_loss
from compress.train.losses.inputs import Head

COLUMNS = ["way", "ms", "peak GB", "inputs GB", "error of d hidden", "error of d weight"]
Way = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    weight: Tensor
    taught: Tensor
    teacher: Tensor

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in (self.hidden, self.weight, self.taught, self.teacher))


def made_up(tokens: int, vocabulary: int, width: int, device: str) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16

    def normal(*shape: int, size: float) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device, dtype=dtype) * size).to(dtype)

    hidden, weight = normal(tokens, width, size=1.0), normal(vocabulary, width, size=2.0 * width**-0.5)
    taught = hidden + normal(tokens, width, size=0.2)
    return Inputs(hidden.requires_grad_(), weight.requires_grad_(), taught, weight.detach().clone())


def ours(inputs: Inputs) -> Tensor:
    teacher = inputs.taught, Head(inputs.teacher)
    return logit_loss(inputs.hidden, Head(inputs.weight), Weights(kl=1.0), targets=None, teacher=teacher)[0]


def dense(inputs: Inputs) -> Tensor:
    log_q = torch.log_softmax((inputs.hidden @ inputs.weight.t()).float(), dim=1)
    with torch.no_grad():
        log_p = torch.log_softmax((inputs.taught @ inputs.teacher.t()).float(), dim=1)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)


def liger(accumulator: torch.dtype | None) -> Way:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    function = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=accumulator)

    def way(inputs: Inputs) -> Tensor:
        mean: Tensor = function(inputs.hidden, inputs.weight, inputs.taught, inputs.teacher, None)
        return mean * len(inputs.hidden)

    return way


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Median; the first calls, which compile, are not counted."""
    taken = []
    for attempt in range(repeats + 2):
        if device == "cpu":
            start = time.perf_counter()
            call()
            passed = 1e3 * (time.perf_counter() - start)
        else:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            passed = events[0].elapsed_time(events[1])
        if attempt >= 2:
            taken.append(passed)
    return statistics.median(taken)


def step(way: Way, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The gradients; none is kept on the inputs."""
    hidden, weight = torch.autograd.grad(way(inputs), [inputs.hidden, inputs.weight])
    return hidden, weight


def exact(inputs: Inputs, tokens: int, rows: int, at_once: int = 128) -> tuple[Tensor, Tensor]:
    """Float64 gradients of the first `tokens` rows of hidden, and of `rows` of weight, spread over the vocabulary."""
    picked = torch.linspace(0, len(inputs.weight) - 1, rows, device=inputs.weight.device).long()
    weight, teacher = inputs.weight.detach().double(), inputs.teacher.double()
    d_hidden, d_weight = [], torch.zeros_like(weight[picked])
    for start in range(0, len(inputs.hidden), at_once):
        part = slice(start, start + at_once)
        hidden = inputs.hidden.detach()[part].double()
        slope = torch.softmax(hidden @ weight.t(), dim=1)
        slope -= torch.softmax(inputs.taught[part].double() @ teacher.t(), dim=1)
        d_weight += slope[:, picked].t() @ hidden
        if start < tokens:
            d_hidden.append(slope @ weight)
    return torch.cat(d_hidden)[:tokens], d_weight


def floor(inputs: Inputs, device: str, repeats: int) -> float:
    """The products alone, 1024 rows at a time: logits of both models, and the gradients of hidden and weight."""
    hidden, weight, taught, teacher = inputs.hidden.detach(), inputs.weight.detach(), inputs.taught, inputs.teacher
    rows = min(1024, len(hidden))
    kept = {} if device == "cpu" else {"out_dtype": torch.float32}
    logits = torch.empty(rows, len(weight), device=device)
    slope = torch.randn_like(logits).to(weight.dtype)
    total = torch.zeros_like(weight, dtype=torch.float32)
    d_hidden = torch.empty(rows, hidden.shape[1], device=device)

    def products() -> None:
        for start in range(0, len(hidden) - rows + 1, rows):
            part = slice(start, start + rows)
            torch.mm(hidden[part], weight.t(), out=logits, **kept)
            torch.mm(taught[part], teacher.t(), out=logits, **kept)
            torch.mm(slope, weight, out=d_hidden, **kept)
            torch.addmm(total, slope.t(), hidden[part], out=total, **kept)

    return milliseconds(products, device, repeats) * len(hidden) / (len(hidden) // rows * rows)


def row(name: str, way: Way, inputs: Inputs, wanted: tuple[Tensor, Tensor], device: str, repeats: int) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
    try:
        found = step(way, inputs)
        errors = []
        for gradient, correct, dimension in zip(found, wanted, (inputs.hidden, inputs.weight), strict=True):
            picked = torch.linspace(0, len(dimension) - 1, len(correct), device=device).long()
            part = gradient[: len(correct)] if dimension is inputs.hidden else gradient[picked]
            errors.append(f"{float((part.double() - correct).norm() / correct.norm()):.2e}")
        del found, gradient, part
        peak = "-"
        if device == "cuda":
            others = torch.cuda.memory_allocated() - inputs.bytes  # the float64 gradients, by which none is measured
            torch.cuda.reset_peak_memory_stats()
            step(way, inputs)
            peak = f"{(torch.cuda.max_memory_allocated() - others) / 1e9:.2f}"
        taken = f"{milliseconds(lambda: step(way, inputs), device, repeats):.1f}"
    except torch.OutOfMemoryError:
        taken, peak, errors = "does not fit", "-", ["-", "-"]
    print("|", " | ".join([name, taken, peak, f"{inputs.bytes / 1e9:.2f}", *errors]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 8192), ("vocabulary", 128256), ("hidden", 4096), ("repeats", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked = parser.parse_args()
    inputs = made_up(asked.tokens, asked.vocabulary, asked.hidden, asked.device)
    where = torch.cuda.get_device_name() if asked.device == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}; {asked.tokens} tokens, {asked.vocabulary} logits, {asked.hidden} wide")
    print(f"floor, the four products: {floor(inputs, asked.device, asked.repeats):.1f} ms\n")
    wanted = exact(inputs, min(512, asked.tokens), min(1024, asked.vocabulary))
    print("|", " | ".join(COLUMNS), "|")
    print("| --- " * len(COLUMNS) + "|")
    row("logit_loss", ours, inputs, wanted, asked.device, asked.repeats)
    try:
        ways = {"Liger": liger(None), "Liger, float32 accumulator": liger(torch.float32)}
        for name, way in ways.items():
            row(name, way, inputs, wanted, asked.device, asked.repeats)
    except ImportError:
        print("(Liger is not installed: pip install liger-kernel==0.8.5)")
    row("dense", dense, inputs, wanted, asked.device, asked.repeats)


if __name__ == "__main__":
    main()
