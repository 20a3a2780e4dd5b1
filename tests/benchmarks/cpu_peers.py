"""Time and quality beside llm-compressor on the same machine, model, text and settings (W4, group 64, symmetric).

    python tests/benchmarks/cpu_peers.py MODEL TEXT EVALUATION_TEXT --peer-python ENV/bin/python

MODEL is a folder with SmolLM2-135M-Instruct in bf16, TEXT the calibration text (its first 32 x 512 tokens are used by
both), EVALUATION_TEXT what the divergence is measured on. The peer runs in an environment of its own (pip install
torch llmcompressor). Whole commands are timed, imports and writing included; ours without its evaluation. Runs
alternate, and medians are printed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peers


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


def divergence(model: str, result: Path, text: str) -> dict[str, float]:
    """KL and perplexity of a checkpoint on 40 windows of 512 tokens, by `dscompress eval`."""
    command = [
        sys.executable, "-m", "compress.cli", "eval", model, str(result), "--text", text,
        "--sequence-length", "512", "--windows", "40", "-q", "--work-dir", str(result.parent / ".eval"),
    ]  # fmt: skip
    quality = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"kl": quality["kl"]["mean"], "perplexity": quality["perplexity"]["compressed"]}


def main() -> None:
    """Run both in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("evaluation_text")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        document = folder / "calibration.jsonl"
        document.write_text(
            json.dumps({"text": Path(options.text).read_text(encoding="utf-8")}) + "\n", encoding="utf-8"
        )
        recipe = folder / "recipe.yaml"
        recipe.write_text(
            f"name: peers\nmodel: {Path(options.model).resolve()}\n"
            f"calibration: {{source: {document}, samples: 32, sequence_length: 512}}\n"
            "stages: [{kind: quantize, bits: 4, group_size: 64}]\nevaluate: false\n"
            f"output: {folder / 'ours'}\n"
        )
        ours = [sys.executable, "-m", "compress.cli", "run", str(recipe), "--fresh", "-q"]
        results = {"dscompress": "default", "dscompress, drift_correction: 0": "plain", "llm-compressor": "peer"}
        commands = {
            "default": [*ours, "--output", str(folder / "default")],
            "plain": [*ours, "--output", str(folder / "plain"), "--set", "stages.0.drift_correction=0"],
            "peer": peers.command(
                "llm-compressor", options.peer_python, folder, options.model,
                options.text, folder / "peer", 32, 512, 4, 64,
            ),
        }  # fmt: skip
        times: dict[str, list[float]] = {name: [] for name in results}
        for _ in range(options.runs):
            for name, result in results.items():
                times[name].append(timed(commands[result]))
        quality = {
            name: divergence(options.model, folder / result, options.evaluation_text)
            for name, result in results.items()
        }
    print("| system | seconds, median (min to max) | KL | perplexity |\n| --- | --- | --- | --- |")
    for name, seconds in times.items():
        spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
        print(f"| {name} | {spread} | {quality[name]['kl']:.4f} | {quality[name]['perplexity']:.2f} |")


if __name__ == "__main__":
    main()
