"""A recipe from Python: 4 bits in three lines, then the figures that the report holds.

python examples/python_api.py MODEL OUTPUT
"""

import sys

import compress

model, output = sys.argv[1:]

report = compress.run(
    {
        "name": "my_model_int4",
        "model": model,  # a folder, a hub id, a .gguf file, or package:NAME/FILE.gguf
        "calibration": "general_en_small",  # bundled; or {"source": "texts.jsonl", "samples": 128, ...}
        "stages": [{"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 64}],
        "evaluate": {"text": "wikitext2", "sequence_length": 512, "windows": 16},
        "output": output,
    }
)
assert report is not None, "None is for processes that help another one: torchrun, or --nproc"

print(f"{report.base.bytes / 1e6:.0f} MB -> {report.compressed.bytes / 1e6:.0f} MB")
if report.quality is not None:
    kl, perplexity = report.quality.kl, report.quality.perplexity
    print(f"KL divergence {kl.mean:.4f} nats (95 %: {kl.ci95})")
    print(f"perplexity {perplexity.base:.2f} -> {perplexity.compressed:.2f}")
for stage in report.stages:
    worst = max((m for layer in stage.layers for m in layer.modules if m.error), key=lambda m: m.error or 0)
    print(f"{stage.kind}: {stage.seconds:.0f} s; largest output error {worst.error:.3f} in {worst.name}")
for check in compress.verify(output):
    print(f"{check.name}: {check.detail}")
