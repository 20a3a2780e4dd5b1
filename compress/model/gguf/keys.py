"""The keys of a GGUF header that belong to its architecture, read so that none is passed over."""

import math
from typing import Any

from compress.model.gguf.header import Gguf

REMEDY = "give the model's safetensors folder instead"

_HARMLESS = {
    "vocab_size",  # the embeddings' rows are counted instead
    "tensor_data_layout",  # where the converter found the model
    "expert_used_count",  # expert_count is 0
    "attention.layer_norm_epsilon",  # all these families have RMS norms
    "rope.scaling.finetuned",
}


class Keys:
    """The keys of the architecture, which notes the ones that were read.

    Attributes:
        remarks: what its user should hear, a line each.
    """

    def __init__(self, gguf: Gguf) -> None:
        self.gguf, self.read = gguf, set(_HARMLESS)
        self.remarks: list[str] = []

    def get(self, name: str, default: Any = None) -> Any:
        """A value; lists of one value per layer give that value."""
        self.read.add(name)
        key = f"{self.gguf.architecture}.{name}"
        value = self.gguf.keys.get(key, default)
        if not isinstance(value, list):
            return value
        if not value or any(item != value[0] for item in value):
            raise self.gguf.error(f"{key} differs from layer to layer, which is not supported; {REMEDY}")
        return value[0]

    def number(self, name: str, default: float | None = None) -> float:
        """A number that is there, or has a default."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            key = f"{self.gguf.architecture}.{name}"
            said = f"{key} is {value!r}, no number" if value is not None else f"lacks the key {key}"
            raise self.gguf.error(f"{said}; convert the model again with a current llama.cpp")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A finite number above 0 that is there, or has a default."""
        value = self.number(name, default)
        if not 0 < value < math.inf:
            raise self.gguf.error(f"{self.gguf.architecture}.{name} is {value}; only numbers above 0 make sense")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number above 0 that is there, or has a default."""
        value = self.number(name, default)
        if not isinstance(value, int) or value < 1:
            raise self.gguf.error(f"{self.gguf.architecture}.{name} is {value}; only whole numbers above 0 make sense")
        return value

    def expect(self, name: str, allowed: float) -> None:
        """Refuse a value other than this one; the key may be absent."""
        value = self.get(name)
        if value is not None and not _same(value, allowed):
            key = f"{self.gguf.architecture}.{name}"
            raise self.gguf.error(f"{key} is {_shown(value)}, only {_shown(allowed)} is supported here; {REMEDY}")

    def unused(self, name: str, usual: float) -> None:
        """Note a key that llama.cpp reads for none of these families; its converter writes it."""
        value = self.number(name, usual)
        if not _same(value, usual):
            key = f"{self.gguf.architecture}.{name}"
            self.remarks.append(f"{key} = {_shown(value)} is not used, as llama.cpp does not use it either")

    def finish(self) -> None:
        """Refuse what was not read."""
        prefix = self.gguf.architecture + "."
        known = {prefix + name for name in self.read}
        unknown = [key for key in self.gguf.keys if key.startswith(prefix) and key not in known]
        if unknown:
            shown = ", ".join(f"{key} = {_shown(self.gguf.keys[key])}" for key in unknown)
            raise self.gguf.error(f"not understood, and may change the computation: {shown}; {REMEDY}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)[:40]


def _same(value: Any, other: float) -> bool:
    return isinstance(value, int | float) and abs(value - other) <= 1e-6 * abs(other)
