"""The `quantization_config` of compressed-tensors, read as its library does: which scheme a module has.

What is not simulated here is refused by name, never passed over: a number that was measured on another model than the
one that runs is worse than none. The reader puts the folder in front of each message.
"""

import re
from collections.abc import Collection, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from compress.errors import ModelError
from compress.formats.base import Scheme
from compress.formats.facts import FLOAT_QUANTIZED, INT_QUANTIZED, PACK_QUANTIZED, READABLE
from compress.formats.patterns import also_called

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

LAYOUTS = (PACK_QUANTIZED, INT_QUANTIZED, FLOAT_QUANTIZED)
_MIXED = "mixed-precision"
_CLASSES = ("Linear", "Embedding")  # by which a config may select modules


class Schemes:
    """The schemes of a compressed-tensors config.

    Args:
        config: the `quantization_config`.

    Attributes:
        dense: whether loaders dequantize as they load, which leaves inputs and caches alone.
        cache: arguments of the key-value cache's rounding; None without it.

    Raises:
        ModelError: what can't be simulated.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._default = config.get("format")
        if self._default not in (*LAYOUTS, _MIXED):
            raise ModelError(
                f"quantized as compressed-tensors, format {self._default}, which can't be read here; {READABLE}"
            )
        for key in ("sparsity_config", "transform_config"):
            inside = config.get(key) or {}
            if inside and inside.get("format", "") != "dense" and any(inside.values()):
                raise ModelError(f"a {key} in its quantization_config, which is not simulated here")
        parsed = _parsed(config)
        self._groups: dict[str, Scheme] = {name: group.model_dump() for name, group in parsed.config_groups.items()}
        self._ignore = list(parsed.ignore or [])
        self.dense = bool(config.get("dequantize")) or config.get("run_compressed") is False
        self.cache: Scheme | None = parsed.kv_cache_scheme.model_dump() if parsed.kv_cache_scheme else None
        for name, group in self._groups.items():
            self._check_group(f"config_groups.{name}", group)
        if self.cache is not None:
            _check(self.cache, "kv_cache_scheme", {"num_bits": (8,), "dynamic": (False,), "strategy": _CACHE})
        if self.dense and (self.cache or any(group.get("input_activations") for group in self._groups.values())):
            raise ModelError(
                "quantization_config has dequantize beside quantized activations, which transformers then leaves "
                "alone and vLLM does not; remove one of them"
            )

    def _check_group(self, where: str, group: Scheme) -> None:
        classes = [t for t in group["targets"] if re.fullmatch(r"[A-Z]\w*", t) and t not in _CLASSES]
        if classes:
            raise ModelError(f"quantized are {', '.join(classes)} ({where}.targets), which is not simulated here")
        layout = group.get("format") or self._default
        if layout not in LAYOUTS:
            raise ModelError(
                f"quantized as compressed-tensors, format {layout} ({where}), which can't be read here; {READABLE}"
            )
        if group.get("output_activations"):
            raise ModelError(f"outputs are rounded ({where}.output_activations), which is not simulated here")
        weights, inputs = group.get("weights"), group.get("input_activations")
        if not weights:
            raise ModelError(f"activations are rounded and weights not ({where}), which is not simulated here")
        if layout == PACK_QUANTIZED:
            allowed: dict[str, tuple[Any, ...]] = {"type": ("int",), "strategy": ("group", "channel")}
        else:
            kind = "float" if layout == FLOAT_QUANTIZED else "int"
            allowed = {"num_bits": (8,), "type": (kind,), "strategy": ("channel", "tensor", "block")}
            if kind == "float":
                allowed["symmetric"] = (True,)
        _check(weights, f"{where}.weights", {"dynamic": (False,)} | allowed, symmetric=False)
        if inputs:
            by_token = ("token", "group") if inputs.get("dynamic") else ("tensor",)
            _check(inputs, f"{where}.input_activations", {"num_bits": (8,), "strategy": by_token})

    def of(self, module: str) -> Scheme | None:
        """A module's scheme, as a group of the config; None where it keeps its weights."""
        names = also_called(module)
        if any(_matches(name, pattern) for name in names for pattern in self._ignore):
            return None
        found = []
        for group in self._groups.values():
            for target in group["targets"]:
                if target in _CLASSES:
                    found.append((2, target, group))
                elif any(_matches(name, target) for name in names):
                    found.append((int("re:" in target), target, group))
        return min(found, key=lambda each: each[:2])[2] if found else None

    def layout(self, scheme: Scheme) -> str:
        """The name of a scheme's format."""
        return str(scheme.get("format") or self._default)


_CACHE = ("tensor", "attn_head")


def _matches(name: str, pattern: str) -> bool:
    return re.match(pattern[3:], name) is not None if pattern.startswith("re:") else pattern == name


def _parsed(config: Mapping[str, Any]) -> "QuantizationConfig":
    """The config as compressed-tensors understands it, with its defaults."""
    from compressed_tensors.quantization import QuantizationConfig  # here, because its import takes seconds

    by = f"compressed-tensors {version('compressed-tensors')}"
    try:
        parsed = QuantizationConfig.model_validate(config)
        for pattern in [*(parsed.ignore or []), *(t for group in parsed.config_groups.values() for t in group.targets)]:
            re.compile(pattern.removeprefix("re:"))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(part for part in map(str, first["loc"]) if re.fullmatch("[a-z0-9_]+", part))  # no classes
        said = first["msg"].removeprefix("Value error, ")
        raise ModelError(f"quantization_config.{place}: {said} ({by})") from error
    except (NotImplementedError, ValueError, re.error) as error:
        raise ModelError(f"quantization_config: {error} ({by})") from error
    return parsed


def _check(arguments: Scheme, where: str, allowed: Mapping[str, Collection[Any]], symmetric: bool = True) -> None:
    """Refuse arguments of a quantization that are none of those allowed.

    Args:
        arguments: as compressed-tensors' QuantizationArgs.
        where: their place in the config.
        allowed: values by key.
        symmetric: whether zero points are refused.
    """
    wanted = dict(allowed) | ({"symmetric": (True,)} if symmetric else {}) | {"scale_dtype": (None,)}
    for key, values in wanted.items():
        if (value := arguments.get(key)) not in values:
            readable = " or ".join(str(each).lower() if isinstance(each, bool) else str(each) for each in values)
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ModelError(f"{where}.{key}: {shown}, which is not simulated here (only {readable})")
