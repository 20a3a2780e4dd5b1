"""8-bit weights and activations beside llm-compressor: the same model, calibration tokens and evaluation.

    python tests/benchmarks/eight_bit.py MODEL TEXT EVALUATION_TEXT --peer-python ENV/bin/python
        [--samples 128] [--sequence-length 2048] [--windows 64] [--only int8_dynamic ...]

MODEL is a folder in bf16, TEXT the calibration text (its first samples x sequence-length tokens are used by both). The
peer runs in an environment of its own (pip install torch llmcompressor), as its documentation says: SmoothQuant at 0.8
and GPTQ for int8, round-to-nearest for fp8. Both checkpoints are measured by `dscompress eval`, which rounds the inputs
of the linears as each checkpoint's config asks; a peer that is not given is left out. Whole commands are timed, ours
without its evaluation.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PEER = """
import sys, torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
try:
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
except ImportError:
    from llmcompressor.modifiers.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, text, out, scheme, samples, length = sys.argv[1:]
samples, length = int(samples), int(length)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
ids = tokenizer(open(text, encoding="utf8").read())["input_ids"]
rows = [ids[i * length : (i + 1) * length] for i in range(samples)]
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length for _ in rows]})
weights = dict(num_bits=8, type="int", symmetric=True, strategy="channel")
inputs = dict(num_bits=8, type="int", symmetric=True, strategy="tensor", dynamic=False, observer="minmax")
smooth = SmoothQuantModifier(smoothing_strength=0.8)
recipe = {
    "int8_dynamic": [smooth, GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])],
    "int8_static": [smooth, GPTQModifier(config_groups={
        "g": dict(targets=["Linear"], weights=weights, input_activations=inputs)}, ignore=["lm_head"])],
    "fp8_dynamic": [QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"])],
}[scheme]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=samples)
model.save_pretrained(out, save_compressed=True)
tokenizer.save_pretrained(out)
"""
OURS = {
    "int8_dynamic": "method: dynamic, dtype: int8, smooth: auto",
    "int8_static": "method: static, dtype: int8, smooth: auto",
    "int8_auto": "method: auto, dtype: int8, smooth: auto",
    "fp8_dynamic": "method: dynamic, dtype: fp8",
}


def timed(command: list[str]) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def quality(model: str, result: Path, options: argparse.Namespace) -> tuple[float, float, float]:
    """KL, perplexity of the base and of the result."""
    command = [
        sys.executable, "-m", "compress.cli", "eval", model, str(result), "--text",
        options.evaluation_text, "--sequence-length", str(options.sequence_length), "--windows", str(options.windows),
        "-q", "--work-dir", str(result.parent / ".eval"),
    ]  # fmt: skip
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["kl"]["mean"], found["perplexity"]["base"], found["perplexity"]["compressed"]


def ours(folder: Path, scheme: str, options: argparse.Namespace) -> tuple[Path, float]:
    """Our checkpoint, and the seconds that it took."""
    document = folder / "calibration.jsonl"
    text = Path(options.text).read_text(encoding="utf-8")
    document.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    recipe, output = folder / f"{scheme}.yaml", folder / f"ours_{scheme}"
    recipe.write_text(
        f"name: {scheme}\nmodel: {Path(options.model).resolve()}\n"
        f"calibration: {{source: {document}, samples: {options.samples}, "
        f"sequence_length: {options.sequence_length}}}\n"
        f"stages: [{{kind: quantize, {OURS[scheme]}}}]\nevaluate: false\noutput: {output}\n"
    )
    return output, timed([sys.executable, "-m", "compress.cli", "run", str(recipe), "-q"])


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("evaluation_text")
    parser.add_argument("--peer-python")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=OURS, default=list(OURS))
    options = parser.parse_args()
    print("| scheme | system | seconds | KL | perplexity (base) |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer = folder / "peer.py"
        peer.write_text(PEER)
        for scheme in options.only:
            made = {"dscompress": ours(folder, scheme, options)}
            if options.peer_python and scheme != "int8_auto":
                output = folder / f"peer_{scheme}"
                command = [
                    *shlex.split(options.peer_python),
                    str(peer),
                    options.model,
                    options.text,
                    str(output),
                    scheme,
                ]
                seconds = timed([*command, str(options.samples), str(options.sequence_length)])
                made["llm-compressor"] = output, seconds
            for system, (output, seconds) in made.items():
                kl, before, after = quality(options.model, output, options)
                print(f"| {scheme} | {system} | {seconds:.0f} | {kl:.5f} | {after:.3f} ({before:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
