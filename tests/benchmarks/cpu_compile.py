"""What torch.compile does for prompts on this CPU: tokens per second before and after, and how long compiling takes.

python tests/benchmarks/cpu_compile.py MODEL [CHECKPOINT ...] [--threads 2] [--rounds 5] [--prompt 512]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


@torch.no_grad()
def seconds(model: Callable[..., Any], tokens: torch.Tensor) -> float:
    """Of one forward pass."""
    started = time.perf_counter()
    model(tokens, use_cache=False)
    return time.perf_counter() - started


def rate(model: Callable[..., Any], tokens: torch.Tensor, rounds: int) -> str:
    """Tokens per second: median (smallest to largest)."""
    found = sorted(tokens.numel() / seconds(model, tokens) for _ in range(rounds))
    return f"{statistics.median(found):.0f} ({found[0]:.0f} to {found[-1]:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+")
    for name, value in (("threads", 2), ("rounds", 5), ("prompt", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("| | prefill tokens/s | compiled | seconds to compile |\n| --- | --- | --- | --- |")
    for name in options.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
        tokens = torch.randint(model.config.vocab_size, (1, options.prompt))
        seconds(model, tokens)
        eager, compiled = rate(model, tokens, options.rounds), torch.compile(model)
        compiling = seconds(compiled, tokens)
        print(
            f"| {Path(name).name} | {eager} | {rate(compiled, tokens, options.rounds)} | {compiling:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
