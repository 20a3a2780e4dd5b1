"""Other systems' GPTQ, each a script for an environment of its own, used by the benchmarks beside ours.

Called as `PYTHON script MODEL TEXT|- OUTPUT|- SAMPLES LENGTH BITS GROUP`: TEXT - draws random tokens, OUTPUT - writes
nothing. Prints "seconds S peak_gpu_bytes N" of the quantization alone, without imports, loading and writing. Settings
are those of each project's documentation.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

_BEGIN = """
import sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model_dir, text, out, samples, length, bits, group = sys.argv[1:]
samples, length, bits, group = int(samples), int(length), int(bits), int(group)
if text == "-":
    rows = torch.randint(3, 8192, (samples, length), generator=torch.Generator().manual_seed(0)).tolist()
else:
    ids = AutoTokenizer.from_pretrained(model_dir)(open(text, encoding="utf8").read())["input_ids"]
    rows = [ids[i * length : (i + 1) * length] for i in range(samples)]
rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
def done(start):
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
    print("seconds", time.time() - start, "peak_gpu_bytes", torch.cuda.max_memory_allocated() if gpu else 0)
"""
_LLM_COMPRESSOR = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
weights = dict(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group, observer="minmax")
weights["actorder"] = "static"
recipe = [GPTQModifier(config_groups={"g": dict(targets=["Linear"], weights=weights)}, ignore=["lm_head"])]
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
start = time.time()
data = Dataset.from_list(rows)
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=length, num_calibration_samples=samples)
done(start)
if out != "-":
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)
"""
_GPTQMODEL = """
from gptqmodel import GPTQModel, QuantizeConfig
model = GPTQModel.load(model_dir, QuantizeConfig(bits=bits, group_size=group, sym=True))
start = time.time()
model.quantize(rows, batch_size=4)
done(start)
if out != "-":
    model.save(out)
"""
SCRIPTS = {"llm-compressor": _BEGIN + _LLM_COMPRESSOR, "GPTQModel": _BEGIN + _GPTQMODEL}


def command(system: str, python: str, folder: Path, model: Path | str, *arguments: object) -> list[str]:
    """How to run a system: its script is written to `folder`; `python` may be several words (env A=B python)."""
    script = folder / f"{system}.py"
    script.write_text(SCRIPTS[system], encoding="utf-8")
    return [*shlex.split(python), str(script), str(model), *map(str, arguments)]


def measure(line: list[str]) -> tuple[float, int]:
    """Run a `command`: seconds of the quantization alone and peak bytes on the GPU."""
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    found = re.search(r"^seconds (\S+) peak_gpu_bytes (\d+)", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(f"{' '.join(line[:3])} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return float(found[1]), int(found[2])
