"""The formats by name, and how the one of a checkpoint is found."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from compress.errors import ModelError
from compress.formats import gguf, gptq, pack_quantized, torchao, w8a8
from compress.formats.base import Format, Scheme
from compress.formats.facts import READABLE
from compress.formats.schemes import Schemes
from compress.system.extras import torchao_problem

_ALL = (pack_quantized.FORMAT, w8a8.INT, w8a8.FLOAT, gptq.FORMAT, torchao.FORMAT, gguf.FORMAT)
FORMATS = {each.name: each for each in _ALL}

Lookup = Callable[[str], tuple[Format, Scheme] | None]


def lookup(config: Mapping[str, Any]) -> tuple[Lookup, Schemes | None]:
    """How to find the format of a module and what the config says of it; None where it keeps its weights.

    Args:
        config: the `quantization_config`; empty for a dense checkpoint.

    Returns:
        The function, and the schemes of compressed-tensors where it is that.

    Raises:
        ModelError: a quantization that can't be read here, as a predicate.
    """
    method = config.get("quant_method")
    if not config:
        return lambda module: None, None
    if method == "compressed-tensors":
        schemes = Schemes(config)

        def find(module: str) -> tuple[Format, Scheme] | None:
            scheme = schemes.of(module)
            return None if scheme is None else (FORMATS[schemes.layout(scheme)], scheme)

        return find, schemes
    if method == "gptq":
        return _gptq(config), None
    if method == gguf.METHOD:
        return partial(_in_blocks, config), None
    if method == "torchao":
        problem = torchao_problem()
        bits = None if problem else torchao.bits_of(config)
        if bits is None:
            why = problem or "readable are dynamic int8 with a scale per row and symmetric 4 bits"
            raise ModelError(f"quantized as torchao; {why}")
        kept = config.get("modules_to_not_convert") or []
        return lambda module: None if module in kept else (torchao.FORMAT, {"bits": bits}), None
    raise ModelError(f"quantized as {method}, which can't be read here; {READABLE}")


def _in_blocks(config: Mapping[str, Any], module: str) -> tuple[Format, Scheme] | None:
    scheme = gguf.scheme_of(config, module)
    return None if scheme is None else (gguf.FORMAT, scheme)


def _gptq(config: Mapping[str, Any]) -> Lookup:
    for key in ("checkpoint_format", "format"):
        if config.get(key, "gptq") != "gptq":
            raise ModelError(f"quantized as gptq, {key} {config[key]}, which can't be read here; only gptq")
    if config.get("is_marlin_format"):
        raise ModelError("quantized as gptq, is_marlin_format, which can't be read here")

    gptq.check_config(config)

    def find(module: str) -> tuple[Format, Scheme] | None:
        scheme = gptq.scheme_of(config, module)
        return None if scheme is None else (gptq.FORMAT, scheme)

    return find
