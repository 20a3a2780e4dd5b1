"""A quantized checkpoint read as if it were dense, whoever wrote it: names and weights of the model before packing.

Widths and groups are told from the tensors' shapes, so that mixed ones work and config.json need not be trusted. Read
are compressed-tensors `pack-quantized`, `int-quantized` and `float-quantized`, GPTQ (auto-gptq v1) and the schemes of
torchao that are written here; anything else is refused by name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.formats import gptq, torchao
from compress.formats import pack_quantized as compressed_tensors
from compress.formats import w8a8 as eight_bit
from compress.quant.grid import CacheFakeQuantize, FakeQuantize, Grid, dynamic_fake_quantize
from compress.system.extras import torchao_problem

_COMPRESSED_TENSORS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_EIGHT_BIT = ("weight", "weight_scale", "input_scale")
_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class _Checkpoint(Protocol):
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Any]

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]: ...


class DequantizedCheckpoint:
    """A checkpoint whose quantized matrices load as float32 weights; a dense checkpoint loads as it is.

    Those of torchao load as its tensors, whose products are its own.

    Args:
        checkpoint: an open checkpoint folder.

    Attributes:
        tensors: names as in the model before quantization.
        grids: the grid of every quantized module.
        inputs: how the inputs of quantized modules are rounded as the model runs, where they are.
        rounds_inputs: whether the loaded weights do that themselves.
        caches: how keys and values are rounded before they are kept, by attention module, where they are.

    Raises:
        ModelError: a quantization that can't be read here.
    """

    def __init__(self, checkpoint: _Checkpoint) -> None:
        self.folder = checkpoint.folder
        self._checkpoint = checkpoint
        config = checkpoint.config.get("quantization_config") or {}
        if not isinstance(config, dict):
            raise ModelError(
                f"{self.folder}: quantization_config is no mapping ({config!r:.40}); download the model again"
            )
        method = config.get("quant_method")
        layout = config.get("format")
        reader = "eight-bit" if layout in eight_bit.FORMATS and method == "compressed-tensors" else method
        if method == "torchao":
            reader = self._torchao(config)
        packed, parts, describe, self._dequantize = _READERS.get(reader, _READERS[None])
        if reader not in _READERS or layout not in _FORMATS:
            raise ModelError(
                f"{self.folder}: quantized as {method}, format {layout}, which can't be read here; "
                "readable are compressed-tensors pack-quantized, int-quantized, float-quantized, gptq and torchao"
            )
        if method == "gptq" and config.get("checkpoint_format", "gptq") != "gptq":
            raise ModelError(f"{self.folder}: checkpoint_format {config['checkpoint_format']} can't be read; only gptq")
        self.grids: dict[str, Grid] = {}
        self.tensors: dict[str, Any] = {}
        shape_names = [name for name in checkpoint.tensors if packed and name.endswith(".weight_shape")]
        shapes = {n.rpartition(".")[0]: t.tolist() for n, t in checkpoint.load(shape_names).items()}
        self._parts = parts
        for name, info in checkpoint.tensors.items():
            module, _, last = name.rpartition(".")
            infos = {part: checkpoint.tensors.get(f"{module}.{part}") for part in parts}
            if not packed or infos[packed] is None:
                self.tensors[name] = info
            elif last == packed:
                try:
                    self.grids[module] = describe(infos, shapes.get(module, ()))
                except ModelError as error:
                    raise ModelError(f"{self.folder}: {module} {error}") from None
                self.tensors[f"{module}.weight"] = infos.get("weight", info)
            elif last not in parts:
                self.tensors[name] = info
        self._find_rounding(config if reader == "eight-bit" else {})
        self.rounds_inputs = method == "torchao"
        if self.rounds_inputs:
            self.inputs |= {module: dynamic_fake_quantize(grid) for module, grid in self.grids.items()}

    def _torchao(self, config: Mapping[str, Any]) -> str:
        problem = torchao_problem()
        bits = None if problem else torchao.bits_of(config)
        if bits is None:
            raise ModelError(
                f"{self.folder}: quantized as torchao; "
                f"{problem or 'readable are dynamic int8 with a scale per row and symmetric 4 bits'}"
            )
        return f"torchao {bits}"

    def _find_rounding(self, config: Mapping[str, Any]) -> None:
        self.inputs: dict[str, FakeQuantize] = {}
        self.caches: dict[str, CacheFakeQuantize] = {}
        ends = (".input_scale", ".k_scale", ".v_scale")
        scales = self._checkpoint.load(n for n in self._checkpoint.tensors if config and n.endswith(ends))
        for module in self.grids if config else ():
            rounding = eight_bit.activation_fake_quantize(config, module, scales.get(f"{module}.input_scale"))
            if rounding is not None:
                self.inputs[module] = rounding
        if config.get("kv_cache_scheme"):
            for module in (name.removesuffix(".k_scale") for name in scales if name.endswith(".k_scale")):
                keys, values = (FakeQuantize(True, scales[f"{module}.{part}_scale"].float()) for part in "kv")
                self.caches[module] = CacheFakeQuantize(keys, values)

    def load(self, names: Iterable[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Weights by their dense names; quantized ones are float32 [O, I]."""
        wanted = list(names)
        sources: dict[str, list[str]] = {}
        for name in wanted:
            module = name.removesuffix(".weight")
            stored = [f"{module}.{part}" for part in self._parts] if module in self.grids else [name]
            sources[name] = [s for s in stored if s in self._checkpoint.tensors]
        raw = self._checkpoint.load([s for stored in sources.values() for s in stored], device)
        loaded = {}
        for name, stored in sources.items():
            module = name.removesuffix(".weight")
            if module in self.grids:
                local = {s.removeprefix(f"{module}."): raw.pop(s) for s in stored}
                loaded[name] = self._dequantize(local, self.grids[module])
            else:
                loaded[name] = raw.pop(name)
        return loaded


def _describe_compressed(infos: Mapping[str, Any], shape: Sequence[int]) -> Grid:
    packed, scale = infos["weight_packed"], infos["weight_scale"]
    if infos["weight_g_idx"] is not None:
        raise ModelError("stores an activation order (weight_g_idx), which can't be read here")
    if scale is None or not shape:
        raise ModelError(f"has no {'weight_shape' if scale is not None else 'weight_scale'}; get the files again")
    (rows, columns), groups = shape, scale.shape[1]
    bits = packed.shape[1] * 32 // columns
    if packed.shape != (rows, -(-columns * bits // 32)):
        raise ModelError(f"weight_packed of shape {list(packed.shape)} does not hold [{rows}, {columns}] without gaps")
    if scale.shape[0] != rows or columns % groups:
        raise ModelError(f"weight_scale of shape {list(scale.shape)} does not fit [{rows}, {columns}]")
    size = -1 if groups == 1 else columns // groups
    return Grid(bits, size, infos["weight_zero_point"] is None, _DTYPES[scale.dtype])


def _describe_eight_bit(infos: Mapping[str, Any], _: Sequence[int]) -> Grid:
    weight, scale = infos["weight"], infos["weight_scale"]
    if weight is None or weight.dtype not in ("I8", "F8_E4M3"):
        raise ModelError("has a weight_scale but no weight of 8 bits; get the files again")
    return eight_bit.grid_of(weight.dtype, weight.shape[0], scale.shape, _DTYPES[scale.dtype])


def _describe_gptq(infos: Mapping[str, Any], _: Sequence[int]) -> Grid:
    columns = infos["g_idx"].shape[0]
    groups = infos["scales"].shape[0]
    bits = infos["qweight"].shape[0] * 32 // columns
    return Grid(bits, -1 if groups == 1 else columns // groups, False, torch.float16, zero_minimum=1)


def _describe_torchao(bits: int) -> Callable[[Mapping[str, Any], Sequence[int]], Grid]:
    def describe(infos: Mapping[str, Any], _: Sequence[int]) -> Grid:
        codes, scale = infos["_weight_qdata"], infos["_weight_scale"]
        if scale is None or scale.shape[0] != codes.shape[0] or codes.shape[1] % scale.shape[1]:
            raise ModelError("has no _weight_scale that fits its _weight_qdata; get the files again")
        groups = scale.shape[1]
        size = -1 if groups == 1 else codes.shape[1] // groups
        return Grid(bits, size, True, _DTYPES[scale.dtype], signed_scale=False)

    return describe


def _load_torchao(tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return torchao.weight(torchao.unpack(tensors, grid), grid.scale_dtype)


def _dequantize_compressed(tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return compressed_tensors.unpack(tensors, grid).dequantize()


def _dequantize_eight_bit(tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return eight_bit.unpack(tensors, grid).dequantize()


def _dequantize_gptq(tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
    return gptq.dequantize(tensors, grid.bits)


_Reader = tuple[
    str,
    tuple[str, ...],
    Callable[[Mapping[str, Any], Sequence[int]], Grid],
    Callable[[Mapping[str, Tensor], Grid], Tensor],
]
_READERS: dict[str | None, _Reader] = {
    None: ("", (), _describe_gptq, _dequantize_gptq),
    "compressed-tensors": ("weight_packed", _COMPRESSED_TENSORS, _describe_compressed, _dequantize_compressed),
    "eight-bit": ("weight_scale", _EIGHT_BIT, _describe_eight_bit, _dequantize_eight_bit),
    "gptq": ("qweight", _GPTQ, _describe_gptq, _dequantize_gptq),
    "torchao 8": (torchao.PARTS[0], torchao.PARTS, _describe_torchao(8), _load_torchao),
    "torchao 4": (torchao.PARTS[0], torchao.PARTS, _describe_torchao(4), _load_torchao),
}
_FORMATS = (None, "pack-quantized", "gptq", *eight_bit.FORMATS)
