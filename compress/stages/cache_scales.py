"""Scales for an 8-bit cache of keys and values, one of each per attention module, in the layer loop.

A partial pass through each layer sees the keys and values that the unquantized layer would cache; the range is theirs
in full. Attention then reads rounded ones, in every later pass too.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.errors import CalibrationError, RecipeError
from compress.model.activations import Activations
from compress.model.kv_cache import attention_modules
from compress.model.stand_in import Reached
from compress.model.stream import LayerStream
from compress.quant.grid import LARGEST_FLOAT8, CacheRounding, InputRounding


class CacheScales:
    """Scales of keys and values.

    Args:
        stream: the layer loop, which gets them as soon as they are known.
        scale_dtype: in which they are stored.
    """

    def __init__(self, stream: LayerStream, scale_dtype: torch.dtype) -> None:
        self.stream, self.scale_dtype = stream, scale_dtype
        self.names = list(attention_modules(stream.model))
        if len(self.names) != stream.depth:
            kind = type(stream.model).__name__
            raise RecipeError(
                [f"kv_cache: {kind} has no attention modules whose cache loaders can round; use kv_cache: null"]
            )

    def calibrate(self, index: int, activations: Activations) -> None:
        """Find the scales of a filled layer.

        Raises:
            CalibrationError: keys or values that are all zero.
        """
        stream, name = self.stream, self.names[index]
        reaches: list[Tensor] = []

        def look(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            reaches.append(torch.stack([keys.abs().amax(), values.abs().amax()]).float())
            raise Reached

        stream.caches[name] = look
        for hidden in activations:
            try:
                stream.layers[index](hidden, **activations.of_layer(index, hidden))
            except Reached:
                continue
            raise RecipeError([f"kv_cache: {name} never uses its cache; use kv_cache: null"])
        scale = (torch.stack(reaches).amax(0) / LARGEST_FLOAT8).to(self.scale_dtype).float()
        if not bool((scale > 0).all()):
            raise CalibrationError(f"{name}: keys or values are all zero on the calibration text; use kv_cache: null")
        stream.caches[name] = CacheRounding(InputRounding(True, scale[0]), InputRounding(True, scale[1]))

    def tensors(self, linear: str) -> dict[str, Tensor]:
        """k_scale and v_scale [1] of the layer that a linear belongs to, by full name."""
        name = next(name for name in self.names if _layer(name) == _layer(linear))
        found = self.stream.caches[name]
        assert isinstance(found, CacheRounding)
        scales = {"k_scale": found.keys.scale, "v_scale": found.values.scale}
        return {f"{name}.{part}": s.to(self.scale_dtype).view(1) for part, s in scales.items() if s is not None}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the scales among a finished layer's tensors."""
        for name in self.names:
            if f"{name}.k_scale" in tensors:
                keys, values = (InputRounding(True, tensors[f"{name}.{part}_scale"].float().view(())) for part in "kv")
                self.stream.caches[name] = CacheRounding(keys, values)


def _layer(name: str) -> str:
    """A module's name up to its layer's number."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdecimal()) + 1])
