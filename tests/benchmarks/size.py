"""Bytes of an int8 checkpoint beside those of the same weights in 32 and 16 bits.

    python tests/benchmarks/size.py FOLDER [--tiny]

Writes random bf16 weights of a 1B Llama's shape with a small vocabulary (2 GB) to FOLDER, shard by shard, runs the
bundled recipe 8b_int8_dynamic on them by the command line, and prints one row of a table for RESULTS.md. Weights are
rounded to nearest and nothing is smoothed, without calibration text and evaluation: none of that changes a byte of the
size. `--tiny` tries the script on a model of 0.6M parameters, mostly embeddings, whose ratio means nothing.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from large_model import Shape, write_model

BILLION = Shape(16, 2048, 8192, 32, 8, 4096, tied=False)
TINY = Shape(2, 64, 128, 4, 2, 4096, tied=False)


def main() -> None:
    """Write the model if need be, run, print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    shape = TINY if options.tiny else BILLION
    model, output = options.folder / f"random-{shape.hidden}", options.folder / "int8"
    if not model.exists():
        write_model(model, shape)
    command = [
        sys.executable, "-m", "compress.cli", "run", "8b_int8_dynamic", "--model", str(model),
        "--output", str(output), "--set", "evaluate=false", "--set", "stages.0.weight_rounding=rtn",
        "--set", "stages.0.smooth=null", "--fresh",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    report = json.loads((output / "report.json").read_text())
    single = 4 * report["base"]["parameters"]
    half, eight = (sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (model, output))
    print("\n| parameters | fp32 | bf16 | int8 | int8 / fp32 | peak resident | whole command | verified |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {report['base']['parameters'] / 1e6:.1f}M | {single / 1e6:.1f} MB | {half / 1e6:.1f} MB "
        f"| {eight / 1e6:.1f} MB | {eight / single:.4f} | {report['stages'][0]['peak_memory_bytes'] / 2**30:.2f} GiB "
        f"| {seconds:.0f} s "
        f"| {report['verified']['loader']}, largest difference {report['verified']['max_logit_difference']} |"
    )


if __name__ == "__main__":
    main()
