"""Keys and values on their way into the cache, seen and changed where stock loaders change them.

compressed-tensors rounds what an attention module hands to its cache (`modeling/kvcache.py`), behind the rotary
embedding. The same place is reached here: an object in the cache's stead, whose `update` gives back changed states.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")  # by which compressed-tensors knows an attention module
_ARGUMENTS = ("past_key_values", "past_key_value")


class _InCacheStead:
    def __init__(self, change: Change) -> None:
        self._change = change

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, S, D]."""
        return self._change(keys, values)


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Attention modules whose cache stock loaders can round, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if "attention" in type(module).__name__.lower()
        and any(hasattr(module, projection) for projection in _PROJECTIONS)
        and _argument(module) is not None
    }


def pass_through(attention: nn.Module, name: str, changes: Mapping[str, Change]) -> None:
    """Let `changes[name]`, where there is one when the module is called, change its keys and values."""
    argument = _argument(attention)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        change = changes.get(name)
        return None if change is None else (args, kwargs | {str(argument): _InCacheStead(change)})

    attention.register_forward_pre_hook(hook, with_kwargs=True)


def _argument(module: nn.Module) -> str | None:
    parameters = inspect.signature(module.forward).parameters
    return next((name for name in _ARGUMENTS if name in parameters), None)
