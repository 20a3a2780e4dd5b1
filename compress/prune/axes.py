"""Along which axes a dense decoder can be cut: which dimension of which tensor is what, and which shapes are legal.

Tensors are known by their names in a layer, so a family without a row anywhere works where its layers are built of
the usual parts; a tensor that is not known makes the axes that could touch it illegal. From config.json and headers
alone: never imports torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from compress.errors import ModelError
from compress.model.arch import DEPTHS, depth_of
from compress.model.names import says_tied
from compress.model.shapes import FLOATS, Shapes, find_modules, is_tied

Parts = tuple[str, ...]  # what is joined along one dimension of a tensor: sizes by name, () for what stays as it is

_Q, _KV, _FFN, _HIDDEN = ("q",), ("kv",), ("ffn",), ("hidden",)
LINEARS: dict[str, tuple[Parts, Parts]] = {
    "self_attn.q_proj": (_Q, _HIDDEN),
    "self_attn.k_proj": (_KV, _HIDDEN),
    "self_attn.v_proj": (_KV, _HIDDEN),
    "self_attn.qkv_proj": (("q", "kv", "kv"), _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _Q),
    "self_attn.out_proj": (_HIDDEN, _Q),
    "self_attn.dense": (_HIDDEN, _Q),
    "attention.query_key_value": ((), _HIDDEN),  # heads interleaved, in a family whose heads can't be cut
    "attention.dense": (_HIDDEN, ()),
    "mlp.gate_proj": (_FFN, _HIDDEN),
    "mlp.up_proj": (_FFN, _HIDDEN),
    "mlp.gate_up_proj": (("ffn", "ffn"), _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _FFN),
    "mlp.fc1": (_FFN, _HIDDEN),
    "mlp.fc2": (_HIDDEN, _FFN),
    "fc1": (_FFN, _HIDDEN),
    "fc2": (_HIDDEN, _FFN),
    "mlp.c_fc": (_FFN, _HIDDEN),
    "mlp.c_proj": (_HIDDEN, _FFN),
    "mlp.dense_h_to_4h": (_FFN, _HIDDEN),
    "mlp.dense_4h_to_h": (_HIDDEN, _FFN),
}
_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    "self_attn_layer_norm", "final_layer_norm",
)  # fmt: skip
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")  # [head_dim], the same for all heads

# Of older checkpoints; models compute them anew.
_BUFFERS = ("self_attn.rotary_emb.inv_freq", "attention.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")

_FFN_KEYS = ("intermediate_size", "ffn_dim")
# Where transformers wants the width to be a multiple of the heads, also with a head_dim of its own. Taken to be so for
# families that are not in the other list.
_ANY_HEADS = ("mistral", "qwen2", "qwen3", "phi3")
_HIDDEN_KNOWN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
_DERIVED = ("gpt_neox", "opt")  # head_dim is hidden_size / num_attention_heads, whatever config.json says


@dataclass(frozen=True)
class Dims:
    """Sizes of a dense decoder; heads are query heads."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    def length(self, parts: Parts) -> int:
        """Of a dimension in which these are joined."""
        sizes = {"hidden": self.hidden, "ffn": self.ffn, "q": self.heads * self.head_dim}
        sizes["kv"] = self.kv_heads * self.head_dim
        return sum(sizes[part] for part in parts)

    def shape_of(self, parts: Sequence[Parts], shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a tensor whose dimensions have these parts; those without any stay as in `shape`."""
        return tuple(self.length(p) if p else n for p, n in zip(parts, shape, strict=True))

    @property
    def sizes(self) -> dict[str, int]:
        """By their names in config.json."""
        return {
            "num_hidden_layers": self.layers, "hidden_size": self.hidden, "intermediate_size": self.ffn,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads,
        }  # fmt: skip

    def of_axis(self, axis: str) -> int:
        """What an axis of the recipe counts."""
        return {"ffn": self.ffn, "heads": self.heads, "hidden": self.hidden, "layers": self.layers}[axis]


@dataclass(frozen=True)
class Anatomy:
    """A model's sizes and what its tensors' dimensions are.

    Args:
        dims: its sizes.
        shapes: the model.
        layer: for each tensor of a layer, by local name, the parts of its dimensions and its shape.
        outer: the same of the tensors outside the layers that pruning may cut, by full name.
        fixed: parameters outside of both.
        problems: why an axis can't be cut, by axis.
    """

    dims: Dims
    shapes: Shapes
    layer: Mapping[str, tuple[Sequence[Parts], tuple[int, ...]]]
    outer: Mapping[str, tuple[Sequence[Parts], tuple[int, ...]]]
    fixed: int
    problems: Mapping[str, str]

    def count(self, dims: Dims) -> tuple[int, int]:
        """Parameters of such a shape: all, and those of its layers."""
        inside, outside = (
            sum(math.prod(dims.shape_of(*e)) for e in part.values()) for part in (self.layer, self.outer)
        )
        return dims.layers * inside + self.fixed + outside, dims.layers * inside

    @cached_property
    def total(self) -> tuple[int, int]:
        """Parameters as they are: all, and those of the layers."""
        return self.count(self.dims)

    def refusal(self, dims: Dims) -> str | None:
        """Why loaders refuse such a shape, or None."""
        kind = str(self.shapes.config.get("model_type"))
        if dims.heads % dims.kv_heads:
            return f"{dims.heads} query heads are no multiple of {dims.kv_heads} key-value heads"
        if dims.heads // dims.kv_heads > self.dims.heads // self.dims.kv_heads:
            return f"a key-value head has {self.dims.heads // self.dims.kv_heads} query heads, not more"
        if dims.hidden % dims.heads and kind not in _ANY_HEADS:
            return (
                f"transformers wants hidden_size ({dims.hidden}) to be a multiple of num_attention_heads ({dims.heads})"
            )
        return None


def anatomy(shapes: Shapes) -> Anatomy:
    """Take a model apart.

    Raises:
        ModelError: layers of different shapes, or sizes that config.json does not say.
    """
    config, modules = shapes.config, find_modules(shapes)
    dims = _dims(shapes, config)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    outside: dict[str, tuple[int, ...]] = {}
    for name, info in shapes.tensors.items():
        if name.startswith(modules.layers + "."):
            index, _, local = name.removeprefix(modules.layers + ".").partition(".")
            layers.setdefault(index, {})[local] = info.shape
        else:
            outside[name] = info.shape
    first = layers["0"]
    odd = next((index for index, each in layers.items() if each != first), None)
    if odd is not None:
        raise ModelError(
            f"{shapes.folder}: layer {odd} has other sizes than layer 0; pruning keeps one shape for all layers"
        )
    unknown: dict[str, str] = {}
    layer = {name: (_layer_parts(name, shape, dims, unknown), shape) for name, shape in first.items()}
    if is_tied(shapes, modules):
        outside.pop(f"{modules.head}.weight", None)
    names: dict[str, Sequence[Parts]] = {
        f"{modules.embeddings}.weight": ((), _HIDDEN),
        f"{modules.head}.weight": ((), _HIDDEN),
    }
    outer = {name: (names[name], shape) for name, shape in outside.items() if name in names}
    rest = {name: shape for name, shape in outside.items() if name not in names}
    norms = {n: shape for n, shape in rest.items() if "norm" in n and shape == (dims.hidden,)}
    one: Sequence[Parts] = (_HIDDEN,)
    outer |= {name: (one, shape) for name, shape in norms.items()}
    other = {name: shape for name, shape in rest.items() if name not in norms and shapes.tensors[name].dtype in FLOATS}
    fixed = sum(math.prod(shape) for shape in other.values())
    problems = _problems(config, dims, unknown, other)
    return Anatomy(dims, shapes, layer, outer, fixed, problems)


def _dims(shapes: Shapes, config: Mapping[str, Any]) -> Dims:
    found: dict[str, Any] = {
        "hidden_size": config.get("hidden_size"),
        "intermediate_size": next((config[key] for key in _FFN_KEYS if key in config), None),
        "num_attention_heads": config.get("num_attention_heads"),
        "num_hidden_layers": depth_of(config),
    }
    odd = next((key for key, value in found.items() if not isinstance(value, int)), None)
    if odd is not None:
        kind = config.get("model_type")
        raise ModelError(f"{shapes.folder}: config.json has no single {odd}; {kind} models can't be pruned")
    hidden, ffn, heads, layers = found.values()
    kv_heads = heads if config.get("model_type") in _DERIVED else config.get("num_key_value_heads") or heads
    return Dims(hidden, ffn, heads, kv_heads, config.get("head_dim") or hidden // heads, layers)


def _layer_parts(name: str, shape: tuple[int, ...], dims: Dims, unknown: dict[str, str]) -> Sequence[Parts]:
    """Parts of a layer's tensor; what is not known, or has other sizes, is noted."""
    module, _, leaf = name.rpartition(".")
    if module in LINEARS and leaf in ("weight", "bias"):
        parts: Sequence[Parts] = LINEARS[module][: len(shape)]
        if all(not p or dims.length(p) == n for p, n in zip(parts, shape, strict=True)):
            return parts
    elif module in _NORMS and shape == (dims.hidden,):
        return (_HIDDEN,)
    elif (module in _HEAD_NORMS and shape == (dims.head_dim,)) or name in _BUFFERS:
        return ((),) * len(shape)
    unknown[name] = f"{name} of shape {list(shape)}"
    return ((),) * len(shape)


def _problems(
    config: Mapping[str, Any], dims: Dims, unknown: Mapping[str, str], other: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    kind = str(config.get("model_type"))
    problems: dict[str, str] = {}
    if unknown:
        what = next(iter(unknown.values()))
        problems |= dict.fromkeys(("ffn", "heads", "hidden"), f"its layers hold {what}, which no axis is known for")
    if kind not in _HIDDEN_KNOWN:
        problems.setdefault("hidden", f"is known for {', '.join(_HIDDEN_KNOWN)}, not for {kind}")
    elif other:
        problems.setdefault("hidden", f"{next(iter(other))} lies outside the layers, and no axis is known for it")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    long_rope = isinstance(scaling, Mapping) and scaling.get("rope_type", scaling.get("type")) == "longrope"
    if kind in _DERIVED or (kind == "phi3" and long_rope):
        for axis in ("heads", "hidden"):
            problems[axis] = f"transformers derives the heads' width from hidden_size / num_attention_heads in {kind}"
    if dims.layers < 2:
        problems["layers"] = "it has one layer"
    return problems


def head_choices(dims: Dims) -> list[tuple[int, int]]:
    """(query heads, key-value heads) that can be left: the same number of query heads in every group that is kept."""
    inside = dims.heads // dims.kv_heads
    return [(groups * each, groups) for groups in range(dims.kv_heads, 0, -1) for each in range(inside, 0, -1)]


def smaller_config(anatomy: Anatomy, dims: Dims, kept: Sequence[int]) -> dict[str, Any]:
    """config.json of the smaller model.

    Args:
        anatomy: of the model.
        dims: sizes afterwards.
        kept: layers that stay.
    """
    config, before = dict(anatomy.shapes.config), anatomy.dims
    changed = {"hidden_size": dims.hidden, "num_attention_heads": dims.heads} | dict.fromkeys(DEPTHS, dims.layers)
    changed |= {key: dims.ffn for key in _FFN_KEYS if key in config}
    config |= {key: value for key, value in changed.items() if key in config}
    if (dims.heads, dims.kv_heads, dims.hidden) != (before.heads, before.kv_heads, before.hidden):
        config |= {"num_key_value_heads": dims.kv_heads, "head_dim": dims.head_dim}
    if says_tied(config) and sum(len(parts) == 2 for parts, _ in anatomy.outer.values()) > 1:
        config["tie_word_embeddings"] = False  # a head with other values is stored
    if dims.layers != before.layers:
        config |= {key: [config[key][n] for n in kept] for key in per_layer(config, before.layers)}
        if isinstance(config.get("max_window_layers"), int):
            config["max_window_layers"] = sum(n < config["max_window_layers"] for n in kept)
    return config


def per_layer(config: Mapping[str, Any], depth: int) -> list[str]:
    """Keys of config.json whose value is a list with an item for every layer."""
    return [k for k, value in config.items() if "layer" in k and isinstance(value, list) and len(value) == depth]
