"""Speed and memory of checkpoints on this CPU, opened by stock transformers: prefill and decode, a process for each.

    python tests/benchmarks/cpu_speed.py MODEL [CHECKPOINT ...] [--threads 2] [--rounds 3] [--prompt 512] [--new 64]
        [--compile]

MODEL is the bf16 base. Every round runs all of them, one after the other, so that a slow minute of the machine hits all
alike; the table has medians. Prefill is one forward pass over the prompt behind a warm-up; decode is greedy, token by
token, with the cache that the prompt left. --compile runs the whole model through torch.compile with frozen weights,
which torchao is made for: a minute or more before the first token. Memory is the process's resident set: after loading, and at its peak.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
COLUMNS = ("prefill tokens/s", "decode tokens/s", "loaded MB", "peak MB")


def measure(model: str, threads: int, prompt: int, new: int, compiled: bool) -> dict[str, float]:
    """In a process of its own."""
    import torch
    import torch._inductor.config as inductor
    from transformers import AutoModelForCausalLM, StaticCache

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tokens = torch.randint(0, loaded.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    inductor.freezing = True
    forward = torch.compile(loaded.forward, dynamic=False) if compiled else loaded.forward

    @torch.no_grad()
    def run(tokens: Any, cache: Any) -> tuple[Any, float]:
        started = time.perf_counter()
        logits = forward(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1:].argmax(-1), time.perf_counter() - started

    for _ in range(2):  # the first time is a warm-up
        cache = StaticCache(config=loaded.config, max_cache_len=prompt + new)
        best, prefill = run(tokens, cache)
        steps = []
        for _ in range(new):
            best, seconds = run(best, cache)
            steps.append(seconds)
    decode = sum(steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = (prompt / prefill, new / decode, pages * resource.getpagesize() / 1e6, peak / 1e6)
    return dict(zip(COLUMNS, figures, strict=True))


def processor() -> str:
    """Model and the flags that matter to products of small numbers."""
    rows = [row.split(":") for row in Path("/proc/cpuinfo").read_text().splitlines() if ":" in row]
    fields = {name.strip(): value.strip() for name, value in rows}
    flags = (fields.get("flags") or fields.get("Features", "")).split()
    model = f"{fields.get('model name', 'unknown')} (family {fields.get('cpu family')}, model {fields.get('model')})"
    has, lacks = ([flag for flag in FLAGS if (flag in flags) == there] for there in (True, False))
    return f"{model}; has {', '.join(has)}; lacks {', '.join(lacks)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+")
    for name, value in (("threads", 2), ("rounds", 3), ("prompt", 512), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [options.threads, options.prompt, options.new]
    if options.one:
        print(json.dumps(measure(options.models[0], *sizes, options.compile)))
        return
    found: dict[str, list[dict[str, float]]] = {model: [] for model in options.models}
    for _ in range(options.rounds):
        for model, rows in found.items():
            command = [sys.executable, __file__, model, "--one", *(["--compile"] if options.compile else [])]
            for name, size in zip(("threads", "prompt", "new"), sizes, strict=True):
                command += [f"--{name}", str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
            print(Path(model).name, done.stdout.strip(), file=sys.stderr)
    print(
        f"{processor()}\n{options.threads} threads, {options.prompt} + {options.new} tokens, {options.rounds} rounds{', compiled' * options.compile}\n"
    )
    print(f"| | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for model, rows in found.items():
        cells = [[row[column] for row in rows] for column in COLUMNS]
        texts = [f"{statistics.median(cell):.1f} ({min(cell):.1f} to {max(cell):.1f})" for cell in cells]
        print(f"| {Path(model).name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
