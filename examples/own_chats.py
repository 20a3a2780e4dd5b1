"""Calibrate on your own conversations, which is what a chat model should keep best.

    python examples/own_chats.py MODEL CHATS.jsonl OUTPUT

A line of CHATS.jsonl is an object with `messages`: [{"role": "user", "content": "..."}, ...]. They go through the
model's own chat template. What you hold back for the evaluation must not be in them.
"""

import sys

import compress

model, chats, output = sys.argv[1:]

settings = [
    f"calibration={{source: {chats}, samples: 64, sequence_length: 512, seed: 0}}",
    "stages.0.group_size=64",
    "evaluate={text: wikitext2, sequence_length: 512, windows: 16}",
]
report = compress.run("quickstart", model=model, output=output, overrides=settings)
assert report is not None and report.calibration is not None

used = report.calibration
print(f"calibrated on {used.sequences} x {used.sequence_length} tokens of {used.source}")
for warning in report.warnings:  # chats that the template refuses, fewer tokens than asked for, ...
    print(f"warning: {warning}")
