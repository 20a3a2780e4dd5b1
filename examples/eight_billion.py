"""An 8B model in 4 bits on one GPU, inside 8 GB of its memory: it is never held as a whole.

    python examples/eight_billion.py [MODEL [OUTPUT [SETTING ...]]]

MODEL is a hub id or a folder of any size; by default DeepSeek-R1-Distill-Llama-8B. A SETTING
changes the recipe: stages.0.bits=3. Stopped at any moment, the same
command goes on where it was.
"""

import sys

import compress

arguments = sys.argv[1:]
report = compress.run(
    "8b_int4_gptq",
    model=arguments[0] if arguments else None,
    output=arguments[1] if arguments[1:] else None,
    overrides=arguments[2:],
    max_memory=8_000_000_000,
)
assert report is not None and report.verified is not None

(stage,) = report.stages
gpu = f", {stage.peak_gpu_memory_bytes / 1e9:.1f} GB on the GPU" if stage.peak_gpu_memory_bytes else ""
print(f"{stage.seconds:.0f} s, {(stage.peak_memory_bytes or 0) / 1e9:.1f} GB of memory{gpu}")
print(f"opened by {report.verified.loader}: largest logit difference {report.verified.max_logit_difference}")
