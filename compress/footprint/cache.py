"""The KV cache: what a token leaves behind in each layer, from the config. Never imports torch.

Grouped and single key-value heads, sliding windows by layer (https://arxiv.org/abs/2310.06825), and DeepSeek's latent
attention (MLA, https://arxiv.org/abs/2405.04434), of which the latent is kept: `kv_lora_rank` numbers, and
`qk_rope_head_dim` of rotated keys. A layer with a window of W keeps W - 1 tokens, in transformers as in vLLM. vLLM
takes blocks of 16 tokens, which may be a block more for each sequence and layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SLIDING = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
_FULL = "full_attention"


@dataclass(frozen=True)
class Layer:
    """What a layer keeps.

    Args:
        numbers: of each token.
        window: the most tokens; None has no limit.
    """

    numbers: int
    window: int | None = None

    def kept(self, tokens: int) -> int:
        """Numbers of a sequence of so many tokens."""
        return self.numbers * (tokens if self.window is None else min(tokens, self.window))


@dataclass(frozen=True)
class Cache:
    """A model's cache.

    Args:
        layers: what each keeps.
        heads: key-value heads, which cards can share; 1 where a token leaves one latent for all heads.
        latent: whether it does (MLA).
        expanded: numbers of a token in a layer where a program keeps keys and values of all heads instead of it.
    """

    layers: Sequence[Layer]
    heads: int
    latent: bool = False
    expanded: int = 0

    def bytes(self, tokens: int, batch: int = 1, width: int = 2) -> int:
        """Of `batch` sequences of `tokens`; a number takes `width` bytes: 2 in bf16, 1 in fp8."""
        return batch * width * sum(layer.kept(tokens) for layer in self.layers)

    def share(self, cards: int) -> float:
        """Which part of it each of several cards holds: heads are split, and repeated where there are fewer."""
        return 1.0 if self.latent else 1 / min(cards, self.heads)


def cache_of(config: "PretrainedConfig", name: str) -> Cache:
    """The cache of a model.

    Args:
        config: of the text model, with its family's defaults.
        name: what errors start with.

    Raises:
        ModelError: layers that keep something else than keys and values of tokens.
    """
    kinds = _kinds(config)
    other = sorted({kind for kind in kinds if kind != _FULL and kind not in _SLIDING})
    other += [key for key in ("index_head_dim", "num_kv_shared_layers") if getattr(config, key, None)]
    if other:
        raise ModelError(
            f"{name}: its layers keep more than keys and values ({', '.join(other)}), which is not reckoned; plan "
            "knows full and sliding attention, and MLA"
        )
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    latent = getattr(config, "kv_lora_rank", None) is not None
    numbers, expanded = 2 * heads * head_width(config), 0
    if latent:
        rope = int(config.qk_rope_head_dim)
        numbers = int(config.kv_lora_rank) + rope
        expanded = int(config.num_attention_heads) * (int(config.qk_nope_head_dim) + rope + int(config.v_head_dim))
    layers = [Layer(numbers, _window(config, kind)) for kind in kinds]
    return Cache(layers, 1 if latent else heads, latent, expanded)


def head_width(config: Any) -> int:
    """Numbers of a key in a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _kinds(config: Any) -> list[str]:
    """What kind of attention each layer has, as transformers' caches read it."""
    said = getattr(config, "layer_types", None)
    if said is not None:
        return [str(kind) for kind in said]
    kind = next((kind for kind, key in _SLIDING.items() if getattr(config, key, None) is not None), _FULL)
    return [kind] * int(config.num_hidden_layers)


def _window(config: Any, kind: str) -> int | None:
    return None if kind == _FULL else int(getattr(config, _SLIDING[kind])) - 1
