"""python -m compress.model.gguf FILE FOLDER: a GGUF file as a bf16 Hugging Face checkpoint, by transformers.

A process of its own, because transformers holds the whole model while it does this.
"""

import sys
from pathlib import Path
from typing import Any


def dequantize(file: Path, folder: Path) -> None:
    """Write weights, config and tokenizer of a GGUF file to a folder."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the blocks packed unless told not to
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16, **options)
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model.config, "_name_or_path"):
        model.config._name_or_path = ""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


if __name__ == "__main__":
    dequantize(Path(sys.argv[1]), Path(sys.argv[2]))
