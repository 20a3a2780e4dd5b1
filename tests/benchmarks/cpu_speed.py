"""Speed and memory of checkpoints on this CPU, opened by stock transformers: prefill and decode, a process for each.

    python tests/benchmarks/cpu_speed.py MODEL [CHECKPOINT ...] [--threads 2] [--rounds 3] [--prompt 512] [--new 64]

What the report of a run with `format: torchao` says of base and result, for any number of checkpoints, with more tokens
and rounds. All are computed in bf16 (compress/evaluation/stock.py); the table has medians and what they lie between.
"""

import argparse
import statistics
from pathlib import Path

from compress.evaluation.speed import measure
from compress.evaluation.stock import Request, Timing
from compress.system.machine import processor
from compress.system.progress import Reporter

COLUMNS = {
    "prefill tokens/s": ("prefill_tokens_per_second", 1.0),
    "decode tokens/s": ("decode_tokens_per_second", 1.0),
    "loaded MB": ("loaded_bytes", 1e6),
    "peak MB": ("peak_bytes", 1e6),
    "waiting for a core, %": ("waited", 0.01),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="+")
    for name, value in (("threads", 2), ("rounds", 3), ("prompt", 512), ("new", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    timing = Timing(options.prompt, options.new, options.threads)
    requests = [Request(model, "cpu", "bfloat16", timing=timing) for model in options.models]
    with Reporter().task("measuring", options.rounds * len(requests), "run") as advance:
        found = measure(requests, options.rounds, advance)
    if isinstance(found, str):
        raise SystemExit(found)
    cpu, flags = processor()
    print(f"{cpu}; has {', '.join(flags)}")
    print(f"{options.threads} threads, {options.prompt} + {options.new} tokens, {options.rounds} rounds\n")
    print(f"| | {' | '.join(COLUMNS)} |\n|{' --- |' * (len(COLUMNS) + 1)}")
    for model, rows in zip(options.models, found, strict=True):
        cells = [[row[name] / unit for row in rows] for name, unit in COLUMNS.values()]
        texts = [f"{statistics.median(cell):.1f} ({min(cell):.1f} to {max(cell):.1f})" for cell in cells]
        print(f"| {Path(model).name} | {' | '.join(texts)} |")


if __name__ == "__main__":
    main()
