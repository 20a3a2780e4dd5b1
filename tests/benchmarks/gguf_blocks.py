"""ggml's block types: llama.cpp's own quantizer and ours on the matrices of a real model, by what their outputs lose.

    python tests/benchmarks/gguf_blocks.py [--model FOLDER] [--layers 1 3 5] [--sequences 256] [--types q4_k q2_k ...]

Needs the package xllamacpp, whose library has llama.cpp's quantizer. For every matrix of the layers: Hessians of its
inputs from calibration text (general_en) and from held-out text (WikiText-2), each in the original model; quantized by
llama.cpp without an importance matrix and with one (the mean squares of the same calibration inputs), by rounding, with
error feedback, and refined in two rounds after that; then |(W - W^) X|^2 / |W X|^2 on the held-out text. Printed are
geometric means over the matrices: that of llama.cpp with importance, and the others as shares of it. Seconds are those
of our solver and of refining, Hessians not included.
"""

import argparse
import gzip
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.model.gguf.block_types import BLOCK_TYPES
from compress.quant.block_gptq import block_gptq, block_order, block_rtn
from compress.quant.block_refine import refine
from compress.quant.gptq import factorize
from compress.quant.statistics import Gram

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
TEXTS = ROOT / "calibration" / "text"
LENGTH = 512
WIDTHS = (13, 14, 13, 9, 9)


def texts(tokenizer: object, sequences: int) -> tuple[Tensor, Tensor]:
    """Tokens [B, S] to calibrate with, and others to judge by."""
    with gzip.open(TEXTS / "general_en.jsonl.gz", "rt", encoding="utf8") as lines:
        calibration = "\n\n".join(json.loads(line)["text"] for line in lines)
    with gzip.open(TEXTS / "wikitext2_raw_test.txt.gz", "rt", encoding="utf8") as file:
        held_out = file.read()
    found = []
    for text, count in ((calibration, sequences), (held_out, 48)):
        ids = tokenizer(text)["input_ids"][: count * LENGTH]  # type: ignore[operator]
        found.append(torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).view(-1, LENGTH))
    return found[0], found[1]


def hessians(model: torch.nn.Module, tokens: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Mean of x x^T over the tokens, for each linear."""
    grams = {name: Gram() for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, x, __, gram=gram: gram.add(x[0]))
        for name, gram in grams.items()
    ]
    with torch.no_grad():
        for batch in tokens.split(8):
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: total / tokens.numel() for name, gram in grams.items() if (total := gram.total()) is not None}


def lost(weight: Tensor, found: Tensor, hessian: Tensor) -> float:
    """|(W - W^) X|^2 / |W X|^2."""
    missed = weight - found
    return float(((missed @ hessian) * missed).sum() / ((weight @ hessian) * weight).sum())


def main() -> None:
    """Measure and print."""
    from llama_quantizer import quantized_by_llama

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "tests" / "models" / "tiny-wiki-llama"))
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--types", nargs="+", choices=BLOCK_TYPES, default=list(BLOCK_TYPES))
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    calibration, held_out = texts(AutoTokenizer.from_pretrained(options.model), options.sequences)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(f".layers.{layer}." in name for layer in options.layers)
    ]
    inputs, judged = hessians(model, calibration, names), hessians(model, held_out, names)
    amounts = f"{calibration.numel()} calibration tokens, judged by {held_out.numel()}"
    print(f"{len(names)} matrices of {options.model}, {amounts}")
    names_of_columns = zip(("llama plain", "ours rounded", "ours solved", "refined", "seconds"), WIDTHS, strict=True)
    print(f"{'type':<8}{'llama imatrix':>14}" + "".join(f"{title:>{width}}" for title, width in names_of_columns))
    for name in options.types:
        kind, rows, seconds = BLOCK_TYPES[name], [], 0.0
        for module in names:
            weight, hessian = model.get_submodule(module).weight.detach(), inputs[module]
            if weight.shape[1] % kind.width:
                continue
            importance = hessian.diagonal().contiguous()
            started = time.perf_counter()
            factor = factorize(hessian.clone(), block_order(importance, kind, True), 0.01)
            solved = block_gptq(weight, factor, kind, "hessian")[0]
            refined = refine(weight, solved, hessian, 0.01, rounds=2)[0]
            seconds += time.perf_counter() - started
            found = (
                quantized_by_llama(weight, kind, importance), quantized_by_llama(weight, kind, None),
                block_rtn(weight, importance, kind), solved, refined,
            )  # fmt: skip
            rows.append([lost(weight, each.dequantize(), judged[module]) for each in found])
        if rows:
            first, *others = torch.tensor(rows).log().mean(0).exp().tolist()
            shares = "".join(
                f"{other / first:>{width}.3f}" for other, width in zip(others, (13, 14, 13, 9), strict=True)
            )
            print(f"{name:<8}{first:>14.3e}{shares}{seconds:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
