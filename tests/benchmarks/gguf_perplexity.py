"""The perplexity of a .gguf file by llama.cpp's own program, beside our reader's in float32 on the same windows.

    python tests/benchmarks/gguf_perplexity.py FILE.gguf PATH/llama-perplexity [--chunks 40] [--length 512]

llama.cpp's protocol: the text's tokens in windows of `length`, a first token replaced where the model begins texts with
one, and the second half of each window counts. The text is WikiText-2's test text.
"""

import argparse
import gzip
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from compress.evaluation.verify import own_logits
from compress.model.checkpoint import Checkpoint
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.system.progress import Reporter

TEXT = Path(__file__).parent.parent.parent / "calibration" / "text" / "wikitext2_raw_test.txt.gz"


def by_llama_cpp(program: str, file: Path, text: Path, length: int, chunks: int) -> float:
    """What its program says."""
    command = [program, "-m", file, "-f", text, "-c", str(length), "--chunks", str(chunks), "-t", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
    return float(found[1]) if found else sys.exit(f"{program} gave no estimate: {done.stderr[-300:]}")


def by_us(file: Path, text: str, work: Path, length: int, chunks: int) -> float:
    """Of the same windows."""
    folder = Checkpoint(resolve_model(str(file), None, work, Reporter(quiet=True).say))
    tokenizer = load_tokenizer(folder.folder, False)
    tokens = torch.tensor(tokenizer(text)["input_ids"])
    begins = len(tokenizer("")["input_ids"]) > 0
    half, loss = length // 2, 0.0
    for window in tokens[: chunks * length].view(chunks, length):
        if begins:
            window[0] = tokenizer.bos_token_id
        logits = own_logits(folder, window, torch.device("cpu"), torch.float32, False)
        loss += float(cross_entropy(logits[half:-1].double(), window[half + 1 :], reduction="sum"))
    return math.exp(loss / (chunks * (length - half - 1)))


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("program")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    text = gzip.decompress(TEXT.read_bytes()).decode()[: options.chunks * options.length * 12]
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "text.txt"
        plain.write_text(text, encoding="utf-8")
        theirs = by_llama_cpp(options.program, options.file, plain, options.length, options.chunks)
        ours = by_us(options.file, text, Path(scratch), options.length, options.chunks)
    apart = f"{theirs / ours - 1:+.2%}"
    print(f"{options.file.name}, {options.chunks} windows: llama.cpp {theirs:.4f}, ours {ours:.4f} ({apart})")


if __name__ == "__main__":
    main()
