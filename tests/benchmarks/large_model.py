"""Peak memory of a run on a model larger than the memory that it may use.

    python tests/benchmarks/large_model.py FOLDER [--limit-gib 6] [--layers 28] [--samples 8]

Writes random bf16 weights of Llama-3.2-3B's shape (6.4 GB) to FOLDER, shard by shard, then runs the command on them
with its anonymous memory limited by the kernel (RLIMIT_DATA), and prints one row of a table for RESULTS.md.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

TINY = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"


class Shape(NamedTuple):
    """Sizes of a Llama."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool


def write_model(folder: Path, shape: Shape, device: torch.device | None = None) -> None:
    """Random weights with a trained model's spread, drawn on the device, a shard a layer; the tiny model's tokens."""
    folder.mkdir(parents=True)
    hidden, wide, head_dim = shape.hidden, shape.intermediate, shape.hidden // shape.heads
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = json.loads((TINY / "config.json").read_text())
    config |= {
        "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": shape.layers, "head_dim": head_dim,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator(device or "cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device=generator.device) * 0.02).to(torch.bfloat16).cpu()

    kv = head_dim * shape.kv_heads
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    placed: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name)
        placed.update(dict.fromkeys(tensors, name))

    outer = {"model.embed_tokens.weight": random(shape.vocabulary, hidden), "model.norm.weight": ones}
    if not shape.tied:
        outer["lm_head.weight"] = random(shape.vocabulary, hidden)
    shard("outer.safetensors", outer)
    for index in range(shape.layers):
        rows = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }  # fmt: skip
        tensors = {f"model.layers.{index}.{name}.weight": random(*shape) for name, shape in rows.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = ones.clone()
        shard(f"layer-{index:02d}.safetensors", tensors)
    index_file = folder / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def main() -> None:
    """Write the model if need be, run, print the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit-gib", type=float, default=6.0)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args()
    model = options.folder / f"random-3b-{options.layers}"
    if not model.exists():
        write_model(model, Shape(options.layers, 3072, 8192, 24, 8, 128256, tied=True))
    limit = int(options.limit_gib * 2**30)
    command = [
        sys.executable, "-m", "compress.cli", "run", "8b_int4_gptq", "--model", str(model),
        "--output", str(options.folder / "out"), "--set", "evaluate=false",
        "--set", f"calibration.samples={options.samples}", "--set", "calibration.sequence_length=512", "--fresh",
    ]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)))
    seconds = time.monotonic() - started
    report = json.loads((options.folder / "out" / "report.json").read_text())
    stage = report["stages"][0]
    print("\n| layers | weights on disk | limit | calibration | peak resident | stage | whole command | verified |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {options.layers} | {report['base']['bytes'] / 1e9:.2f} GB | {options.limit_gib:g} GiB "
        f"| {options.samples} x 512 | {stage['peak_memory_bytes'] / 2**30:.2f} GiB | {stage['seconds']:.0f} s "
        f"| {seconds:.0f} s "
        f"| {report['verified']['loader']}, largest difference {report['verified']['max_logit_difference']} |"
    )


if __name__ == "__main__":
    main()
