"""Models of which there are headers alone: names and shapes of any size, for what is planned without numbers."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.model.checkpoint import TensorInfo
from compress.prune.axes import Dims

NOWHERE = Path("made-up")


@dataclass(frozen=True)
class Headers:
    """`Shapes` of a model in bfloat16 that lies nowhere."""

    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    folder: Path = NOWHERE

    @property
    def bytes(self) -> int:
        return sum(info.bytes for info in self.tensors.values())

    def equal(self, one: str, other: str) -> bool:
        return False


def headers(kind: str, dims: Dims, vocabulary: int = 128_256, bias: bool = False, **config: Any) -> Headers:
    """A model of the usual parts, with a head of its own.

    Args:
        kind: the model type.
        dims: its sizes.
        vocabulary: rows of the embeddings.
        bias: whether the query, key and value projections have one.
        config: what config.json says beside.
    """
    q, kv, hidden, ffn = dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim, dims.hidden, dims.ffn
    layer: dict[str, tuple[int, ...]] = {f"{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    for part, width in (("q", q), ("k", kv), ("v", kv)):
        layer[f"self_attn.{part}_proj.weight"] = (width, hidden)
        layer |= {f"self_attn.{part}_proj.bias": (width,)} if bias else {}
    layer |= {"self_attn.o_proj.weight": (hidden, q), "mlp.down_proj.weight": (hidden, ffn)}
    layer |= {f"mlp.{part}_proj.weight": (ffn, hidden) for part in ("gate", "up")}
    shapes = {f"model.layers.{n}.{name}": shape for n in range(dims.layers) for name, shape in layer.items()}
    shapes |= {f"{name}.weight": (vocabulary, hidden) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (hidden,)
    sizes = {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": ffn, "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads, "head_dim": dims.head_dim, "num_hidden_layers": dims.layers,
        "vocab_size": vocabulary, "tie_word_embeddings": False,
    }  # fmt: skip
    tensors = {n: TensorInfo(NOWHERE, n, "BF16", s, 2 * math.prod(s), 0) for n, s in shapes.items()}
    return Headers(sizes | config, tensors)


LLAMA_8B = headers("llama", Dims(4096, 14336, 32, 8, 128, 32))
LLAMA_3B = headers("llama", Dims(3072, 8192, 24, 8, 128, 28))
QWEN2_7B = headers("qwen2", Dims(3584, 18944, 28, 4, 128, 28), 152_064, bias=True)
