"""Scales for an 8-bit cache of keys and values, one of each per attention module or per head, in the layer loop.

A partial pass through each layer sees the keys and values that the unquantized layer would cache; the range is theirs
in full. Attention then reads rounded ones, in every later pass too.

Left out: a scale for the queries, which the stock loader rounds under a scheme for attention itself only.

Dimensions: B batch, K key-value heads, S sequence, D width of a head.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.errors import CalibrationError, RecipeError
from compress.loop.activations import Activations
from compress.loop.catcher import Reached
from compress.loop.kv_cache import attention_modules
from compress.loop.stream import LayerStream
from compress.quant.grid import LARGEST_FLOAT8, CacheFakeQuantize, FakeQuantize
from compress.stages.quantize.cache_plan import HEADS, ONE_FOR_ALL


class CacheScales:
    """Scales of keys and values.

    Args:
        stream: the layer loop, which gets them as soon as they are known.
        scale_dtype: in which they are stored.
        per_head: one of each per head, instead of per module.

    Raises:
        RecipeError: a model whose cache loaders can't round.
    """

    def __init__(self, stream: LayerStream, scale_dtype: torch.dtype, per_head: bool) -> None:
        self.stream, self.scale_dtype, self.per_head = stream, scale_dtype, per_head
        self.names = list(attention_modules(stream.model))
        kind, config = type(stream.model).__name__, stream.model.config.get_text_config(decoder=True)
        heads = {key: _read(config, key, kind) for key in HEADS}
        self._heads = heads["num_key_value_heads"]
        if len(self.names) != stream.depth:
            raise RecipeError(
                [f"kv_cache: {kind} has no attention modules whose cache loaders can round; use kv_cache: null"]
            )
        if self._heads is None:
            raise RecipeError(
                [f"kv_cache: {kind} has no num_key_value_heads in its config, which loaders need; use kv_cache: null"]
            )

    def calibrate(self, index: int, activations: Activations) -> None:
        """Find the scales of a filled layer.

        A head whose keys or values are all zero gets the scale of the largest head.

        Raises:
            CalibrationError: keys or values that are all zero in all heads.
            RecipeError: a layer that never uses its cache, or with other heads than loaders expect.
        """
        stream, name = self.stream, self.names[index]
        reaches: list[Tensor] = []

        def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            reaches.append(torch.stack([self._reach(keys), self._reach(values)]).float())
            raise Reached

        stream.caches[name] = look
        for hidden in activations:
            try:
                stream.layers[index](hidden, **activations.of_layer(index, hidden))
            except Reached:
                continue
            raise RecipeError([f"kv_cache: {name} never uses its cache; use kv_cache: null"])
        scale = (torch.stack(reaches).amax(0) / LARGEST_FLOAT8).to(self.scale_dtype).float()
        if self.per_head and scale.shape[1] != self._heads:
            what = f"{name} has {scale.shape[1]} key-value heads and config.json says {self._heads}"
            raise RecipeError([f"kv_cache: {what}, which is what loaders expect; use kv_cache: fp8"])
        largest = scale.amax(1, keepdim=True)
        if not bool((largest > 0).all()):
            raise CalibrationError(f"{name}: keys or values are all zero on the calibration text; use kv_cache: null")
        keys, values = torch.where(scale > 0, scale, largest)
        stream.caches[name] = CacheFakeQuantize(FakeQuantize(True, keys), FakeQuantize(True, values))

    def _reach(self, states: Tensor) -> Tensor:
        """Largest magnitude of keys or values [B, K, S, D]: [1] or, per head, [K, 1, 1], as it is stored."""
        magnitudes = states.abs()
        return magnitudes.amax((0, 2, 3))[:, None, None] if self.per_head else magnitudes.amax().view(1)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """k_scale and v_scale, [1] or [K, 1, 1], of a layer, by full name."""
        name = self.names[index]
        found = self.stream.caches[name]
        assert isinstance(found, CacheFakeQuantize)
        scales = {"k_scale": found.keys.scale, "v_scale": found.values.scale}
        return {f"{name}.{part}": s.to(self.scale_dtype) for part, s in scales.items() if s is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the scales among a finished layer's tensors."""
        for name in self.names:
            if f"{name}.k_scale" in tensors:
                keys, values = (FakeQuantize(True, tensors[f"{name}.{part}_scale"].float()) for part in "kv")
                self.stream.caches[name] = CacheFakeQuantize(keys, values)


def _read(config: Any, key: str, kind: str) -> Any:
    """What loaders read of a model's config; None where it has no such key."""
    try:
        return getattr(config, key, None)
    except RuntimeError as error:  # so transformers says that each layer has its own
        raise RecipeError([f"kv_cache: {kind} has {key} for each layer, {ONE_FOR_ALL}"]) from error
