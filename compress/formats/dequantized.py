"""A quantized checkpoint read as if it were dense, whoever wrote it: names and weights of the model before packing.

The config says what each module is and the tensors must bear it out: where they disagree, or say something that is not
simulated here, the checkpoint is refused by name. Read are compressed-tensors `pack-quantized`, `int-quantized` and
`float-quantized` (also mixed, with rounded inputs and caches), GPTQ (auto-gptq v1) and the schemes of torchao that are
written here.
"""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats import w8a8
from compress.formats.base import AnyGrid, AnyQuantized, Format, Scheme
from compress.formats.facts import FACTS, READABLE
from compress.formats.patterns import has_number, inside_layer
from compress.formats.table import Lookup, lookup
from compress.model.checkpoint import TensorInfo
from compress.quant.grid import CacheFakeQuantize, FakeQuantize, Grid, dynamic_fake_quantize

_FLOATS = ("BF16", "F16", "F32", "F64")
_CACHE_PARTS = ("k_scale", "v_scale")
# Parts of quantized modules in some format: a checkpoint that has them is not dense, whatever else it says.
_QUANTIZED = (
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_global_scale",
    "weight_g_idx", "weight_shape", "input_scale", "input_zero_point", "input_global_scale", "output_scale",
    "output_zero_point", "q_scale", *_CACHE_PARTS, "k_zero_point", "v_zero_point", "qweight", "qzeros", "g_idx",
    "_weight_qdata", "_weight_scale", "weight_blocks",
)  # fmt: skip


class _Checkpoint(Protocol):
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]: ...


class DequantizedCheckpoint:
    """A checkpoint whose quantized matrices load as weights; a dense checkpoint loads as it is.

    Those of torchao load as its tensors, whose products are its own.

    Args:
        checkpoint: an open checkpoint folder.

    Attributes:
        tensors: names as in the model before quantization.
        grids: the grid of every quantized module.
        inputs: how the inputs of quantized modules are rounded as the model runs, where they are.
        rounds_inputs: whether the loaded weights do that themselves.
        caches: how keys and values are rounded before they are kept, by attention module, where they are.
        stock: why stock transformers is not asked about it; None where it is.

    Raises:
        ModelError: a quantization that can't be read here, or tensors that are not what the config says.
    """

    def __init__(self, checkpoint: _Checkpoint) -> None:
        self.folder = checkpoint.folder
        self._checkpoint = checkpoint
        self._dtype = torch.float32
        config = checkpoint.config.get("quantization_config") or {}
        if not isinstance(config, dict):
            raise ModelError(
                f"{self.folder}: quantization_config is no mapping ({config!r:.40}); download the model again"
            )
        try:
            find, schemes = lookup(config)
        except ModelError as error:
            raise ModelError(f"{self.folder}: {error}") from None
        self._dense = schemes is not None and schemes.dense
        self.grids: dict[str, AnyGrid] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._formats: dict[str, Format] = {}
        self._schemes: dict[str, Scheme] = {}
        self._left: dict[str, list[str]] = {}  # parts of quantized modules that no one has asked for yet
        self._find_modules(find)
        if config and not self.grids:
            raise ModelError(f"{self.folder}: config.json says quantized, no tensor is; get both from the same place")
        self._check_alike(find)
        used = {each.name: each for each in self._formats.values()}.values()
        self.rounds_inputs = any(each.rounds_inputs for each in used)
        self.stock = next((stock for each in used if (stock := FACTS[each.name].stock)), None)
        self.inputs: dict[str, FakeQuantize] = {}
        self.caches: dict[str, CacheFakeQuantize] = {}
        if self.rounds_inputs:
            grids = {module: grid for module, grid in self.grids.items() if isinstance(grid, Grid)}
            self.inputs = {module: dynamic_fake_quantize(grid) for module, grid in grids.items()}
        elif schemes is not None:
            self._find_rounding(schemes.cache)
        for module, parts in self._left.items():
            raise self._error(module, f"has {', '.join(sorted(parts))}, which config.json does not account for")

    def _error(self, module: str, words: object) -> ModelError:
        return ModelError(f"{self.folder}: {module} {words}")

    def _find_modules(self, find: Lookup) -> None:
        """Sort all tensors: parts of quantized modules, and those of the model."""
        modules: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self._checkpoint.tensors.items():
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = info
        shape_names = [f"{module}.weight_shape" for module, infos in modules.items() if "weight_shape" in infos]
        shapes = {name: tensor.tolist() for name, tensor in self._checkpoint.load(shape_names).items()}
        for module, infos in modules.items():
            rest = dict(infos)
            found = find(module)
            if found is not None and found[0].parts[0] in infos:
                form, scheme = found
                try:
                    self.grids[module] = form.describe(infos, shapes.get(f"{module}.weight_shape", ()), scheme)
                except ModelError as error:
                    raise self._error(module, error) from None
                except (
                    ValueError,
                    IndexError,
                    ZeroDivisionError,
                ) as error:  # of another number of dimensions, or empty
                    raise self._error(module, "has tensors of impossible shapes; get the files again") from error
                self._formats[module], self._schemes[module] = form, scheme
                rest = {part: info for part, info in infos.items() if part not in form.parts}
                self.tensors[f"{module}.weight"] = infos.get("weight", infos[form.parts[0]])
            for part, info in rest.items():
                if part in _QUANTIZED:
                    self._left.setdefault(module, []).append(part)
                elif part == "weight" and info.dtype not in _FLOATS:
                    raise self._error(
                        module, f"is stored as {info.dtype}, which config.json does not account for; {READABLE}"
                    )
                else:
                    self.tensors[f"{module}.{part}" if module else part] = info

    def _check_alike(self, find: Lookup) -> None:
        """Refuse dense weights where the config and the other layers have quantized ones."""
        kinds = {inside_layer(module) for module in self.grids if has_number(module)}
        for name in self.tensors:
            module, _, part = name.rpartition(".")
            dense = part == "weight" and module not in self.grids and has_number(module)
            if dense and inside_layer(module) in kinds and find(module) is not None:
                raise self._error(module, "is dense, config.json says quantized; get both from the same place")

    def _take(self, module: str, part: str) -> str | None:
        """The name of a part that is accounted for from here on, if it is there."""
        if part not in self._left.get(module, ()):
            return None
        self._left[module].remove(part)
        if not self._left[module]:
            del self._left[module]
        return f"{module}.{part}"

    def _find_rounding(self, cache: Scheme | None) -> None:
        """How inputs and caches are rounded, from the scales in the files."""
        names = {module: self._take(module, "input_scale") for module in self.grids}
        scales = self._checkpoint.load(name for name in names.values() if name)
        for module, name in names.items():
            try:
                rounding = w8a8.input_rounding(self._schemes[module], scales[name] if name else None)
            except ModelError as error:
                raise self._error(module, error) from None
            if rounding is not None:
                self.inputs[module] = rounding
        if cache is None:
            return
        attentions = [module for module, parts in self._left.items() if set(_CACHE_PARTS) & set(parts)]
        layers = {inside[0] for name in self.tensors if (inside := _layer(name))}
        if {inside[0] for module in attentions if (inside := _layer(module))} != layers:
            raise ModelError(f"{self.folder}: kv_cache_scheme without k_scale and v_scale in each layer; get all files")
        for module in attentions:
            both = [self._take(module, part) for part in _CACHE_PARTS]
            if None in both:
                raise self._error(module, "has one of k_scale and v_scale; get the files again")
            loaded = self._checkpoint.load(name for name in both if name)
            self.caches[module] = w8a8.cache_rounding(cache, *loaded.values())

    def running_in(self, dtype: torch.dtype) -> "DequantizedCheckpoint":
        """The same checkpoint, as loaders have it that are asked for this dtype: scales become it before products."""
        view = copy.copy(self)
        view._dtype = dtype
        return view

    def unrounded(self) -> "DequantizedCheckpoint":
        """The same checkpoint, as programs have it that compute with its codes and scales and round nothing else.

        Stock loaders round the products of both where the config says `dequantize`, and inputs and caches where it has
        schemes for them.
        """
        view = copy.copy(self)
        view._dense, view.inputs, view.caches = False, {}, {}
        return view

    def runs_in(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which stock transformers runs it where this one is asked for."""
        wanted = (self._formats[module].runs_in(grid, dtype) for module, grid in self.grids.items())
        return next((each for each in wanted if each != dtype), dtype)

    def quantized(self, module: str) -> AnyQuantized:
        """The codes and scales of a quantized module."""
        form = self._formats[module]
        stored = {part: f"{module}.{part}" for part in form.parts if f"{module}.{part}" in self._checkpoint.tensors}
        raw = self._checkpoint.load(stored.values())
        return form.unpack({part: raw[name] for part, name in stored.items()}, self.grids[module])

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Weights by their dense names; quantized ones are [O, I] in the dtype of `running_in` (at first float32)."""
        sources: dict[str, list[str]] = {}
        for name in names:
            module = name.removesuffix(".weight")
            stored = [f"{module}.{part}" for part in self._formats[module].parts] if module in self.grids else [name]
            sources[name] = [s for s in stored if s in self._checkpoint.tensors]
        raw = self._checkpoint.load([s for stored in sources.values() for s in stored], device)
        loaded = {}
        for name, stored in sources.items():
            module = name.removesuffix(".weight")
            if module in self.grids:
                local = {s.removeprefix(f"{module}."): raw.pop(s) for s in stored}
                loaded[name] = self._formats[module].load(local, self.grids[module], self._dtype, self._dense)
            else:
                loaded[name] = raw.pop(name)
        return loaded


def _layer(name: str) -> tuple[str, ...]:
    """The first number in a module's name, where it has one."""
    return tuple(part for part in name.split(".") if part.isdigit())[:1]
