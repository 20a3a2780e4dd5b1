"""Models of which there are headers alone: names and shapes of any size, for what is planned without numbers.

And a sweep that nobody made: a record with figures from a formula.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from compress.model.checkpoint import TensorInfo
from compress.prune.axes import Dims
from compress.report.frontier import frontier
from compress.sweep_records import Point, Sweep

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


def grid(bits: Sequence[int] = (2, 3, 4, 8), sparsity: Sequence[float] = (0.0, 0.2, 0.4), **sweep: Any) -> Sweep:
    """The record of a sweep of a 270 MB model over two settings, whose figures follow from the settings.

    Args:
        bits: values of the first.
        sparsity: values of the second.
        sweep: what the record says beside.
    """
    points = []
    for width, share in product(bits, sparsity):
        name = f"bits={width},sparsity={share:g}"
        kl = 0.9 * math.exp(-1.05 * width + 5 * share)
        figures = {
            "bytes": round(268e6 * (1 - 0.7 * share) * (width + 2.2) / 18.2), "parameters": 134e6 * (1 - 0.7 * share),
            "sparsity": 0.7 * share, "bits_per_weight": width + 1.7, "kl": kl, "perplexity": 17.3 * math.exp(kl),
            "top1": math.exp(-kl), "tasks.arc_easy": 0.25 + 0.35 * math.exp(-kl), "seconds": 100 + 20 * width,
            "prefill": 900.0,
        }  # fmt: skip
        figures["size_ratio"] = 268e6 / figures["bytes"]
        settings = {"stages.1.bits": width, "stages.0.target.sparsity": share}
        points.append(
            Point(name=name, settings=settings, folder=f"points/{name}", key="0", status="done", figures=figures)
        )
    best = frontier([point.figures for point in points])
    base = {
        "bytes": 268e6, "size_ratio": 1.0, "parameters": 134e6, "sparsity": 0.0, "bits_per_weight": 16.0, "kl": 0.0,
        "perplexity": 17.3, "top1": 1.0, "tasks.arc_easy": 0.6, "prefill": 800.0,
    }  # fmt: skip
    record: dict[str, Any] = {
        "name": "widths and bits",
        "model": "owner/small",
        "axes": ["stages.1.bits", "stages.0.target.sparsity"],
        "recipe": {"name": "widths and bits", "model": "owner/small", "stages": [{"kind": "prune"}], "output": "out"},
        "points": [p.model_copy(update={"on_frontier": number in best}) for number, p in enumerate(points)],
        "base": base,
        "protocol": "64 windows of 512 tokens from wikitext2, without overlap.",
        "created": "2026-03-04T05:06:07+00:00",
        "seconds": 1924.0,
        "version": "0.0",
    }
    return Sweep(**record | sweep)
