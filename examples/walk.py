# # From a model to a checkpoint that you can trust, step by step
#
# A notebook in a script: each block between `# %%` is a cell in VS Code, Spyder and Jupytext, and
# `python examples/walk.py MODEL FOLDER` runs all of them.

import sys
from pathlib import Path

import compress

model, folder = sys.argv[1], Path(sys.argv[2])

# %% What is in the model?
print("\n".join(compress.inspect(model)))

# %% Three ways to make it smaller. The text, the calibration and the evaluation are the same, so they can be compared.
common = {
    "model": model,
    "calibration": "general_en_small",
    "evaluate": {"text": "wikitext2", "sequence_length": 256, "windows": 16, "prompts": []},
}
ways = {
    "rounded": {"kind": "quantize", "method": "rtn", "bits": 4, "group_size": 64},
    "gptq": {"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 64},
    "int8": {"kind": "quantize", "method": "dynamic", "dtype": "int8"},
}

# %% Each gives a checkpoint that stock programs open, and a report. The base is measured once for all of them.
reports = {}
for name, stage in ways.items():
    reports[name] = compress.run(common | {"name": name, "stages": [stage], "output": str(folder / name)})

# %% What did each byte saved cost?
for name, report in reports.items():
    assert report is not None and report.quality is not None
    print(f"{name:>8}: {report.size_ratio:.2f} times smaller, KL {report.quality.kl.mean:.4f}")

# %% A checkpoint can be asked again at any time, also one that others wrote: its files, the stock loader, our reader.
for check in compress.verify(folder / "gptq"):
    print(f"{check.name}: {check.detail}")

# %% Any two checkpoints can be compared, on any text.
quality = compress.evaluate(
    folder / "int8", folder / "gptq", text="wikitext2", sequence_length=256, windows=8, work_dir=folder / ".dscompress"
)
print(f"between the two: KL {quality.kl.mean:.4f}, the same best token at {quality.top1_agreement.mean:.1%}")
