"""Speed and memory of checkpoints on this CPU, opened by stock transformers: prefill and decode, a process for each.

    python tests/benchmarks/cpu_speed.py MODEL [CHECKPOINT ...] [--threads 2] [--rounds 3] [--prompt 512] [--new 64]

MODEL is the bf16 base. Every round runs all of them, one after the other, so that a slow minute of the machine hits all
alike; the table has medians. Prefill is one forward pass over the prompt behind a warm-up; decode is greedy, token by
token, with the cache that the prompt left. Memory is the process's resident set: after loading, and at its peak.
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


def measure(model: str, threads: int, prompt: int, new: int) -> dict[str, float]:
    """In a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tokens = torch.randint(0, loaded.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        loaded(tokens, logits_to_keep=1)
        started = time.perf_counter()
        out = loaded(tokens, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(new):
            best = out.logits[:, -1:].argmax(-1)
            out = loaded(best, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - started
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
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = [options.threads, options.prompt, options.new]
    if options.one:
        print(json.dumps(measure(options.models[0], *sizes)))
        return
    found: dict[str, list[dict[str, float]]] = {model: [] for model in options.models}
    for _ in range(options.rounds):
        for model, rows in found.items():
            command = [sys.executable, __file__, model, "--one"]
            for name, size in zip(("threads", "prompt", "new"), sizes, strict=True):
                command += [f"--{name}", str(size)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rows.append(json.loads(done.stdout))
    print(
        f"{processor()}\n{options.threads} threads, {options.prompt} + {options.new} tokens, {options.rounds} rounds\n"
    )
    print(f"| | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for model, rows in found.items():
        cells = [[row[column] for row in rows] for column in COLUMNS]
        texts = [f"{statistics.median(cell):.1f} ({min(cell):.1f} to {max(cell):.1f})" for cell in cells]
        print(f"| {Path(model).name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
