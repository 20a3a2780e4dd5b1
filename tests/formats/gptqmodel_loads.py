"""Opens a gptq checkpoint with GPTQModel (or transformers and optimum) and compares it with a dequantized twin.

    python gptqmodel_loads.py CHECKPOINT [--loader gptqmodel|transformers]

Runs in the environment that has gptqmodel, imports nothing of dscompress and unpacks the codes with Python's own
integers, so that it is evidence of its own. Prints one JSON line: {"max_logit_difference": .., "largest_logit": ..,
"top1_agreement": .., "quantized_modules": ..}.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # GPTQModel stops on machines with fewer than three cores
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling its kernel takes longer than all the rest

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM


def codes_of(words: Tensor, bits: int) -> Tensor:
    """int64 codes [R, C] of int32 words [R, W]: every row is one long integer, lowest bits first."""
    rows = []
    for row in words.tolist():
        number = int.from_bytes(b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in row), "little")
        rows.append([(number >> (bits * i)) & (2**bits - 1) for i in range(len(row) * 32 // bits)])
    return torch.tensor(rows)


def dequantized_twin(folder: Path) -> tuple[torch.nn.Module, int]:
    """The plain float16 model of the checkpoint's weights, and how many of them were quantized."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    state = {name: value for name, value in tensors.items() if name.endswith((".weight", ".bias"))}
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    for module in modules:
        group = tensors[f"{module}.g_idx"].long()
        scales = tensors[f"{module}.scales"].float()  # [G, O]
        words = tensors[f"{module}.qweight"]  # [I * bits / 32, O]
        bits = words.shape[0] * 32 // group.numel()
        code = codes_of(words.t(), bits).t()  # [I, O]
        zero = codes_of(tensors[f"{module}.qzeros"], bits) + 1  # [G, O]
        state[f"{module}.weight"] = ((code - zero[group]).float() * scales[group]).t()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    known = model.state_dict()
    names = {name: name if name in known else name.replace("embed_out.", "lm_head.") for name in state}  # gpt_neox
    missing, unexpected = model.load_state_dict({names[k]: v.half() for k, v in state.items()}, strict=False)
    missing = [name for name in missing if not (config.tie_word_embeddings and name == "lm_head.weight")]
    assert not missing and not unexpected, (missing, unexpected)
    return model.eval(), len(modules)


def load(folder: Path, loader: str) -> torch.nn.Module:
    """The checkpoint as the loader's users open it."""
    if loader == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu").eval()
    from gptqmodel import BACKEND, GPTQModel

    return GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model.eval()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--loader", choices=["gptqmodel", "transformers"], default="gptqmodel")
    arguments = parser.parse_args()
    twin, modules = dequantized_twin(arguments.checkpoint)
    ids = torch.randint(0, twin.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    expected = twin(ids).logits.float()
    loaded = load(arguments.checkpoint, arguments.loader)
    actual = loaded(ids).logits.float()
    result = {
        "max_logit_difference": (actual - expected).abs().max().item(),
        "largest_logit": expected.abs().max().item(),
        "top1_agreement": (actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        "quantized_modules": modules,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
