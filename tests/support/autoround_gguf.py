"""AutoRound's .gguf file of a model, for gguf_quality.py: run by the Python of an environment that has it.

    PYTHON autoround_gguf.py MODEL FOLDER TYPE TOKENS.npy ITERATIONS

TOKENS.npy holds calibration tokens, [N, S]. Prints the seconds of tuning and packing. Made with auto-round 0.15.1,
transformers 5.17.0, torch 2.13.0 and gguf.
"""

import sys
import time

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Tune and write."""
    model, folder, kind, file, iterations = sys.argv[1:]
    rows = torch.from_numpy(np.load(file))
    started = time.monotonic()
    tuner = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(model),
        scheme=f"gguf:{kind}", dataset=[row[None] for row in rows], seqlen=rows.shape[1], nsamples=len(rows),
        iters=int(iterations), batch_size=8,
    )  # fmt: skip
    tuner.quantize_and_save(folder, format=f"gguf:{kind}")
    print(f"{time.monotonic() - started:.0f}")


if __name__ == "__main__":
    main()
