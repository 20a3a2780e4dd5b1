"""python measured_memory.py FOLDER TOKENS: peak resident bytes that opening a model and one forward pass add."""

import re
import sys
from importlib import import_module
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def _peak() -> int:
    """Of this process; getrusage's figure begins with what its parent held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(folder: str, tokens: int) -> None:
    kind = AutoConfig.from_pretrained(folder).model_type
    import_module(f"transformers.models.{kind}.modeling_{kind}")
    empty = _peak()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(torch.randint(model.config.vocab_size, (1, tokens)), use_cache=True)
    print(_peak() - empty)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
