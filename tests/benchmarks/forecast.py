"""What a plan says of bytes, memory and time beside what a run then measures, stage by stage.

    python tests/benchmarks/forecast.py FOLDER [--model MODEL | --shape tiny|small|8b] [--device auto]
        [--samples 16] [--length 512] [--only gptq]

Runs recipes of one stage or two by the command line, each in a process of its own without evaluation, on a model or on
random bf16 weights of a Llama's shape that are written to FOLDER once, and prints a table for RESULTS.md. What is
planned is what the record holds: bytes and memory as the stage began, time behind its first layers or steps.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from large_model import Shape, write_model

SHAPES = {
    "tiny": Shape(6, 256, 768, 8, 4, 4096, tied=True),
    "small": Shape(4, 1024, 2816, 16, 8, 4096, tied=False),
    "wide": Shape(4, 1024, 2816, 16, 8, 32768, tied=True),
    "8b": Shape(32, 4096, 14336, 32, 8, 49152, tied=False),
}
STAGES: dict[str, list[dict[str, Any]]] = {
    "rtn": [{"kind": "quantize", "method": "rtn", "bits": 4, "group_size": 64}],
    "gptq": [{"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 64}],
    "gptq, no correction": [{"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 64, "drift_correction": 0}],
    "int8 dynamic": [{"kind": "quantize", "method": "dynamic", "smooth": "auto"}],
    "prune": [{"kind": "prune", "target": {"sparsity": 0.2}, "axes": ["ffn"]}],
    "sparse": [{"kind": "prune", "pattern": "2:4"}],
    "finetune": [{"kind": "finetune", "loss": "ce", "tokens": 40_960}],
}


def main() -> None:
    """Write the model if need be, run each recipe, print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--max-memory")
    parser.add_argument("--only", action="append", choices=STAGES)
    options = parser.parse_args()
    model = options.model or str(options.folder / f"random-{options.shape}")
    if options.model is None and not Path(model).exists():
        write_model(Path(model), SHAPES[options.shape])
    print("| recipe | stage | bytes, planned | written | memory | measured | | GPU | measured | | s | measured | |")
    print("| --- " * 13 + "|")
    for name in options.only or STAGES:
        for stage in run(name, model, options):
            print(row(name, stage), flush=True)


def run(name: str, model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Stages of the report of a recipe."""
    output = options.folder / "out"
    recipe = {
        "name": "forecast", "model": model, "stages": STAGES[name], "evaluate": None, "output": str(output),
        "calibration": "general_en",
    }  # fmt: skip
    file = options.folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    command = [
        sys.executable, "-m", "compress.cli", "run", str(file), "--device", options.device, "--fresh", "-q",
        "--work-dir", str(options.folder / "work"), "--set", f"calibration.samples={options.samples}",
        "--set", f"calibration.sequence_length={options.length}",
    ]  # fmt: skip
    command += ["--max-memory", options.max_memory] if options.max_memory else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    stages: list[dict[str, Any]] = json.loads((output / "report.json").read_text())["stages"]
    return stages


def row(name: str, stage: dict[str, Any]) -> str:
    """A stage as a row of the table."""
    planned, cells = stage["forecast"] or {}, []
    for before, after, unit in (
        ("memory_bytes", "peak_memory_bytes", 1e9), ("gpu_memory_bytes", "peak_gpu_memory_bytes", 1e9),
        ("seconds", "seconds", 1.0),
    ):  # fmt: skip
        said, found = planned.get(before), stage[after]
        if said is None or found is None:
            cells += ["", "" if found is None else f"{found / unit:.2f}", ""]
        else:
            cells += [f"{said / unit:.2f}", f"{found / unit:.2f}", f"{100 * (said / found - 1):+.0f} %"]
    written = f"{planned.get('output_bytes'):,} | {stage['bytes']:,}"
    return f"| {name} | {stage['kind']} | {written} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
