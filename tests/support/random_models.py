"""Models of random weights in any architecture that transformers knows, small enough to be made in a moment."""

import gc
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

gc.freeze()  # the layer loop collects garbage, which takes long in a process that has imported so much

TOKENIZER = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def make_model(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, shard: str = "1GB", **config: Any
) -> Path:
    """Write a model and the trained model's tokenizer to a new folder.

    Args:
        folder: the folder.
        family: the model type.
        dtype: of the weights.
        shard: the largest shard.
        config: what is different from `SIZES`; None takes a key out.
    """
    torch.manual_seed(0)
    settings = {key: value for key, value in (SIZES | config).items() if value is not None}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=dtype)
    for name, parameter in model.named_parameters():  # louder than a fresh model, so that every part matters
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
        elif parameter.shape[0] == settings["vocab_size"]:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def two_wide_layers(folder: Path) -> Path:
    """A Llama as wide as the trained one, and as bundled recipes need at least."""
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256}
    return make_model(folder, hidden_size=256, intermediate_size=768, **wide)


def load_stock(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model, opened by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def random_tokens(sequences: int, length: int, seed: int = 0) -> Tensor:
    """Tokens [N, S]."""
    return torch.randint(0, SIZES["vocab_size"], (sequences, length), generator=torch.Generator().manual_seed(seed))
