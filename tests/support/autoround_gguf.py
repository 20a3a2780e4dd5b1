"""AutoRound's .gguf file of a model, for gguf_quality.py: run by the Python of an environment that has it.

    PYTHON autoround_gguf.py MODEL FOLDER TYPE TOKENS.npy ITERATIONS PRE

TOKENS.npy holds calibration tokens, [N, S]. PRE is what llama.cpp calls the model's tokenizer: AutoRound knows those of
published models alone, and gives up others when it has tuned them. Prints the seconds of tuning and packing. Made with
auto-round 0.15.1, transformers 5.17.0, torch 2.13.0 and gguf.
"""

import sys
import time
from typing import Any

import numpy as np
import torch
from auto_round import AutoRound
from auto_round.export.export_to_gguf import export
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    """Tune and write."""
    model, folder, kind, file, iterations, pre = sys.argv[1:]
    usual = export.get_conversion

    def named(*arguments: Any, **more: Any) -> Any:
        found = usual(*arguments, **more)
        sys.modules[found.ModelBase.__module__].TextModel.get_vocab_base_pre = lambda *_: pre
        return found

    export.get_conversion = named
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
