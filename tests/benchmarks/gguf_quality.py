"""GGUF files beside llama.cpp's own quantizer: the same types for every tensor, calibration text and evaluation.

    python tests/benchmarks/gguf_quality.py [MODEL] [--types q4_0 q4_k_m q3_k_m q2_k] [--calibration FILE]
        [--samples 128] [--length 512] [--windows 64] [--pages 4] [--stage KEY=VALUE ...] [--autoround PYTHON]

Needs the packages gguf and xllamacpp, whose library has llama.cpp's quantizer. Ours is what `compress.run` writes with
`format: gguf`. llama.cpp's are copies of that file in which each quantized matrix is what `ggml_quantize_chunk` makes
of the original, without an importance matrix and with one: the mean squares of each matrix's inputs in the original
model, in float32, on the same calibration tokens; as in llama.cpp, embeddings and head have none. So all three have the
same size to the byte. (Given an importance matrix, llama.cpp stores the first layers' down projections of a q4_0 or
q5_0 file with minima, which takes more bytes; here it does not.)

AutoRound's file, where the Python of an environment that has it is named, is made of the same tokens with 200 steps a
layer, its default; which types it stores tensors in is its own choice, so its bytes may be others.

All are judged by `compress.evaluate` on WikiText-2's test text against the original in bf16. At the end llama.cpp
itself computes the perplexity of our file on the first windows, beside our reader in float32.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import compress
from compress.data.calibration import load_calibration, load_windows
from compress.evaluation.llama_cpp import ask_llama_cpp
from compress.evaluation.verify import own_logits
from compress.exports.gguf.write import export_gguf
from compress.formats.ggml import pack
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.text import CalibrationSpec
from compress.system.progress import Reporter

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
QUIET = Reporter(quiet=True)


def _add_squares(total: Tensor, _: torch.nn.Module, inputs: tuple[Tensor], __: Tensor) -> None:
    total += inputs[0].flatten(0, 1).square().sum(0, dtype=torch.float64)


def mean_squares(folder: Path, tokens: Tensor) -> dict[str, Tensor]:
    """Of the inputs of each linear inside the layers, [I], by its name in a GGUF file, on tokens [N, S]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    head = model.get_output_embeddings()
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    found = {
        name: torch.zeros(module.in_features, dtype=torch.float64, device=device) for name, module in linears.items()
    }
    for name, module in linears.items():
        module.register_forward_hook(partial(_add_squares, found[name]))
    with torch.no_grad():
        for batch in tokens.split(8):
            model.model(batch.to(device))
    return {name: (total / tokens.numel()).float().cpu() for name, total in found.items()}


def by_llama(ours: Path, base: Path, file: Path, importance: Mapping[str, Tensor]) -> None:
    """Write a copy of our file with llama.cpp's blocks for ours.

    Args:
        ours: the file.
        base: the original as a GGUF file, tensor by tensor as in ours.
        file: to write.
        importance: mean squares of inputs by the model's names; those that are missing have none.
    """
    from llama_quantizer import quantized_by_llama

    shutil.copy(ours, file)
    originals = {each.name: each for each in gguf.GGUFReader(base).tensors}
    reader = gguf.GGUFReader(file, "r+")
    architecture = reader.fields["general.architecture"].contents()
    kind = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, reader.fields[f"{architecture}.block_count"].contents())
    squares = {names.get_name(name): value for name, value in importance.items()}
    for tensor in reader.tensors:
        block = BLOCK_TYPES.get(tensor.tensor_type.name.lower())
        if block is None:
            continue
        original = originals[tensor.name]
        weight = torch.from_numpy(gguf.dequantize(original.data, original.tensor_type).copy())
        inputs = squares.get(tensor.name.removesuffix(".weight"))
        tensor.data[:] = pack(quantized_by_llama(weight, block, inputs)).numpy()
    reader.data.flush()


def by_autoround(
    python: str, base: Path, kind: str, tokens: Tensor, original: Path, work: Path, iterations: int
) -> tuple[Path, str]:
    """AutoRound's file, and how many seconds it took."""
    np.save(work / "tokens.npy", tokens.numpy())
    script, folder = ROOT / "tests" / "support" / "autoround_gguf.py", work / f"autoround-{kind}"
    pre = gguf.GGUFReader(original).fields["tokenizer.ggml.pre"].contents()
    command = [python, script, base, folder, kind, work / "tokens.npy", str(iterations), pre]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"AutoRound failed: {done.stderr.strip().splitlines()[-1]}")
    return next(folder.rglob("*.gguf")), done.stdout.strip().splitlines()[-1]


def tensor_bytes(file: Path) -> int:
    """Bytes of all tensors."""
    return sum(int(each.n_bytes) for each in gguf.GGUFReader(file).tensors)


def perplexities(file: Path, base: Path, work: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Of a file on the first windows: by llama.cpp, and by our reader in float32."""
    windows = load_windows(
        "wikitext2", load_tokenizer(base, False), sequence_length=options.length, windows=options.pages
    )
    folder = Checkpoint(resolve_model(str(file), None, work, QUIET.say))
    first, losses = max(1, len(windows.prefix)), torch.zeros(2, dtype=torch.float64)
    for tokens in windows.tokens:
        answer = ask_llama_cpp(file, tokens.tolist(), new_tokens=0)
        if isinstance(answer, str):
            sys.exit(f"llama.cpp does not open {file.name}: {answer}")
        ours = own_logits(folder, tokens, torch.device("cpu"), torch.float32, False)
        for number, logits in enumerate((answer.logits, ours)):
            losses[number] += torch.nn.functional.cross_entropy(
                logits[first - 1 : -1].double(), tokens[first:], reduction="sum"
            )
    theirs, own = (losses / (len(windows.tokens) * (options.length - first))).exp().tolist()
    return theirs, own


def compressed(kind: str, spec: CalibrationSpec, base: Path, work: Path, options: argparse.Namespace) -> Path:
    """Our file."""
    stage: dict[str, Any] = {"kind": "quantize", "format": "gguf", "type": kind}
    stage |= {key: json.loads(value) for key, _, value in (each.partition("=") for each in options.stage)}
    output = work / f"ours-{kind}"
    recipe = {
        "name": "ours", "model": str(base), "calibration": spec.model_dump(exclude_none=True), "stages": [stage],
        "evaluate": False, "output": str(output),
    }  # fmt: skip
    compress.run(recipe, work_dir=work / "work", reporter=QUIET)
    return next(output.glob("*.gguf"))


def main() -> None:
    """Make all files and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ROOT / "tests" / "models" / "tiny-wiki-llama"))
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k_m", "q3_k_m", "q2_k"])
    parser.add_argument("--calibration", default=str(ROOT / "calibration" / "text" / "general_en.jsonl.gz"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence and of a window")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--pages", type=int, default=4, help="windows on which llama.cpp computes the perplexity")
    parser.add_argument("--stage", nargs="*", default=[], help="other settings of the stage, as JSON")
    parser.add_argument("--autoround", metavar="PYTHON", help="of an environment with auto-round")
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    options = parser.parse_args()
    spec = CalibrationSpec(source=options.calibration, samples=options.samples, sequence_length=options.length)
    print(f"{options.samples} x {options.length} calibration tokens, {options.windows} windows of {options.length}")
    print("| type | bytes of tensors | system | seconds | KL | perplexity (base) |\n| --- " + "| --- " * 5 + "|")
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        base, original = resolve_model(options.model, None, work, QUIET.say), work / "base.gguf"
        export_gguf(base, original, reporter=QUIET)
        tokens = load_calibration(spec, load_tokenizer(base, False)).tokens
        squares, ratios, agreement = mean_squares(base, tokens), [], []
        for kind in options.types:
            started = time.monotonic()
            files = {"dscompress": compressed(kind, spec, base, work, options)}
            took = {"dscompress": f"{time.monotonic() - started:.0f}"}
            for system, importance in {"llama.cpp": {}, "llama.cpp, imatrix": squares}.items():
                files[system] = work / f"{kind}{len(files)}.gguf"
                by_llama(files["dscompress"], original, files[system], importance)
            if options.autoround:
                files["AutoRound"], took["AutoRound"] = by_autoround(
                    options.autoround, base, kind, tokens, original, work, options.iterations
                )
            found = {}
            for system, file in files.items():
                quality = compress.evaluate(
                    base, file, sequence_length=options.length, windows=options.windows, work_dir=work / "work",
                    reporter=QUIET,
                )  # fmt: skip
                found[system] = quality.kl.mean
                values = f"{quality.kl.mean:.5f} | {quality.perplexity.compressed:.3f} ({quality.perplexity.base:.3f})"
                print(f"| {kind} | {tensor_bytes(file):,} | {system} | {took.get(system, '')} | {values} |", flush=True)
            ratios.append(f"{kind} {found.pop('dscompress') / min(found.values()):.3f}")
            theirs, own = perplexities(files["dscompress"], base, work, options)
            agreement.append(f"{kind} {theirs:.3f} and {own:.3f} ({theirs / own - 1:+.2%})")
    print(f"KL, of the best of the others': {', '.join(ratios)}")
    print(f"perplexity on {options.pages} windows, llama.cpp's and ours of the same file: {', '.join(agreement)}")


if __name__ == "__main__":
    main()
