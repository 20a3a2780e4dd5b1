"""The auto-gptq v1 format, which GPTQModel, transformers (through optimum), vLLM and many others open.

Layout (GPTQModel's `nn_modules/qlinear`, AutoGPTQ before it): everything is transposed to [inputs, outputs], codes are
packed along the inputs, zero points along the outputs and less one, which is why an asymmetric grid here starts its
zero points at 1 (`zero_minimum`). `g_idx`, the group of every input, is always written.

Left out: gptq_v2 (zero points as they are; few loaders know it) and a permuted `g_idx` when writing. `dequantize`
reads a permuted one, and a file without any, whose groups lie in order.

What loaders make of it. GPTQModel opens every width, per-module schemes and a quantized head; asymmetric v1 files only
from a producer that it knows to keep zero points above 0, hence the second entry of `meta.quantizer`. transformers
with optimum opens one scheme for the decoder layers, and takes a quantized head for a missing one, which it fills with
random weights. vLLM matches `dynamic` against the names of the modules that it joins, for which rules are written where
all parts agree. ONNX Runtime GenAI matches it against names of tensors, for which patterns are open at their end.
Negative scales are plain numbers to all of them; only vLLM's
optional int8 activations (`VLLM_MARLIN_INPUT_DTYPE=int8`) misread them.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from compress import __version__
from compress.errors import ModelError
from compress.formats.base import DTYPES, Format, Infos, Scheme
from compress.formats.facts import GPTQ
from compress.formats.openers import JOINED
from compress.formats.packing import pack_rows, unpack_rows
from compress.formats.patterns import also_called, has_number, inside_layer, select
from compress.quant.grid import Grid, Quantized

_Kind = tuple[int, int, bool]  # bits, group_size, symmetric
_ALIGNMENT = 32  # codes in whole words, for every width


def check(shape: Sequence[int], grid: Grid) -> str | None:
    """Why the format can't hold a matrix of this shape (O, I) on this grid, in one line; None when it can."""
    rows, columns = shape
    for width, what in ((rows, "outputs"), (columns, "inputs")):
        if width % _ALIGNMENT:
            return (
                f"format gptq needs {what} divisible by {_ALIGNMENT}, this matrix has {width}; "
                "leave it out with `ignore`, or use format compressed-tensors"
            )
    if columns % grid.columns_per_group(columns):
        return f"group_size {grid.group_size} does not divide the {columns} inputs"
    return None


def pack(matrix: Quantized) -> dict[str, Tensor]:
    """The tensors of one module, by their names inside it; a bias stays as it is, beside them.

    Returns:
        qweight int32 [I * bits / 32, O]; qzeros int32 [G, O * bits / 32], zero - 1; scales float16 [G, O];
        g_idx int32 [I].
    """
    grid = matrix.grid
    rows, columns = matrix.codes.shape
    assert check((rows, columns), grid) is None, check((rows, columns), grid)
    assert grid.scale_dtype == torch.float16, "codes belong to scales that float16 holds"
    assert int(matrix.zero.min()) >= 1, "the format stores zero - 1"
    group = torch.arange(columns, dtype=torch.int32, device=matrix.codes.device) // grid.columns_per_group(columns)
    return {
        "qweight": pack_rows(matrix.codes, grid.bits).t().contiguous(),
        "qzeros": pack_rows(matrix.zero.t() - 1, grid.bits),
        "scales": matrix.scale.to(torch.float16).t().contiguous(),
        "g_idx": group,
    }


def unpack(tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
    """The matrix that `pack` gave as these tensors.

    Raises:
        ModelError: `g_idx` does not count up in whole groups (an activation order is stored): use `dequantize`.
    """
    columns = tensors["g_idx"].numel()
    in_order = torch.arange(columns, device=tensors["g_idx"].device) // grid.columns_per_group(columns)
    if not torch.equal(tensors["g_idx"].long(), in_order):
        raise ModelError(f"g_idx is not in order of groups of {grid.group_size}: the file stores an activation order")
    codes, zero = _codes_and_zero(tensors, grid.bits)
    scale = tensors["scales"].t().contiguous()
    return Quantized(codes=codes, scale=scale, zero=zero.to(torch.uint8), grid=grid)


def dequantize(tensors: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """The float32 weight [O, I] of any v1 file, also with a permuted `g_idx`: (code - zero) * scale of the group."""
    if "g_idx" not in tensors:
        columns = tensors["qweight"].shape[0] * 32 // grid.bits
        width = grid.columns_per_group(columns)
        tensors = {**tensors, "g_idx": torch.arange(columns, device=tensors["qweight"].device) // width}
    codes, zero = _codes_and_zero(tensors, grid.bits)
    group = tensors["g_idx"].long()
    scale = tensors["scales"].t().float()
    return (codes.float() - zero.float()[:, group]) * scale[:, group]


def _codes_and_zero(tensors: Mapping[str, Tensor], bits: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 [O, I] and zero points int16 [O, G]."""
    columns, rows = tensors["g_idx"].numel(), tensors["scales"].shape[1]
    codes = unpack_rows(tensors["qweight"].t(), bits, columns)
    zero = unpack_rows(tensors["qzeros"], bits, rows).t().to(torch.int16) + 1
    return codes, zero.contiguous()


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse a config whose values can't be read.

    Raises:
        ModelError: naming the value.
    """
    rules = config.get("dynamic") or {}
    if not isinstance(rules, Mapping) or not all(isinstance(each, Mapping) for each in rules.values()):
        raise ModelError(f"quantization_config.dynamic: {rules!r} is no object of objects; get config.json again")
    for rule in rules:
        try:
            re.compile(_pattern(rule))
        except re.error as error:
            raise ModelError(f"quantization_config.dynamic: {rule!r} is no pattern ({error})") from error
    for scheme in ({**config, **each} for each in ({}, *rules.values())):
        bits, size = scheme.get("bits"), scheme.get("group_size", -1)
        if bits not in (2, 3, 4, 8) or not isinstance(size, int) or not (size == -1 or size > 0):
            raise ModelError(f"quantization_config: bits {bits!r}, group_size {size!r}, which can't be read here")


def _pattern(rule: str) -> str:
    return rule.removeprefix("+:").removeprefix("-:")


def scheme_of(config: Mapping[str, Any], module: str) -> Scheme | None:
    """What a config says of a module, with the first of its `dynamic` rules that matches; None: it stays dense."""
    names = also_called(module)
    for rule, changes in (config.get("dynamic") or {}).items():
        if any(re.match(_pattern(rule), name) for name in names):
            return None if rule.startswith("-:") else {**config, **changes}
    return config


def describe(infos: Infos, _: Sequence[int], scheme: Scheme) -> Grid:
    """The grid of a module in a file.

    Args:
        infos: headers of its tensors, by their names inside the module.
        scheme: what the config says of it.

    Raises:
        ModelError: tensors that don't fit each other or the scheme, as a predicate.
    """
    missing = [part for part in ("qzeros", "scales") if part not in infos]
    if missing:
        raise ModelError(f"has no {missing[0]}; get the files again")
    words, (groups, rows), order = infos["qweight"].shape[0], infos["scales"].shape, infos.get("g_idx")
    said, size = scheme["bits"], scheme.get("group_size", -1)
    if order is None and scheme.get("desc_act"):
        raise ModelError("has no g_idx, without which its activation order (desc_act) is lost; get the files again")
    columns = words * 32 // said if order is None else order.shape[0]
    bits = words * 32 // columns
    width = columns if size == -1 else size
    if said != bits or groups != -(-columns // width):
        raise ModelError(
            f"holds {bits} bits in {groups} groups of {columns} inputs, config.json says {said} bits, group_size "
            f"{size}; get both from the same place"
        )
    if infos["qzeros"].shape != (groups, rows * bits // 32) or infos["scales"].dtype not in DTYPES:
        raise ModelError(f"qzeros of shape {list(infos['qzeros'].shape)} do not fit {groups} groups of {rows} outputs")
    return Grid(bits, -1 if groups == 1 else width, False, torch.float16, zero_minimum=1)


def quantization_config(grids: Mapping[str, Grid], unquantized: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json, and the content of `quantize_config.json` for older loaders.

    The commonest scheme is the model's; modules with another one, and those of the decoder layers that keep their
    weights, are rules of `dynamic`. A module without a number in its name is the output head.

    Args:
        grids: the grid of every quantized module, by its full name.
        unquantized: full names of the Linear modules that keep their weights.
    """
    schemes = {name: (grid.bits, grid.group_size, grid.symmetric) for name, grid in grids.items()}
    common = Counter(schemes.values()).most_common(1)[0][0]
    skipped = [name for name in unquantized if has_number(name)]
    by_name: dict[str, _Kind | None] = _with_joined(schemes | dict.fromkeys(skipped))
    everything = [*by_name, *unquantized]
    rules: dict[str, dict[str, Any]] = {}
    for scheme in [*dict.fromkeys(schemes.values()), None]:
        if scheme != common:
            names = [name for name in by_name if by_name[name] == scheme]
            sign, change = ("-:", {}) if scheme is None else ("+:", _scheme(scheme))
            rules |= {sign + _open(pattern, everything): change for pattern in select(names, everything)}
    config = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        **_scheme(common),
        "desc_act": False,
        "lm_head": not all(has_number(name) for name in grids),
        "pack_dtype": "int32",
        "meta": {"quantizer": _producers(grids)},
    }
    if rules:
        config["dynamic"] = rules
    if skipped and (kept := _parts_of_every_layer(grids, skipped)):
        config["modules_in_block_to_quantize"] = [kept]
    return config


_Choice = TypeVar("_Choice")


def _with_joined(choices: Mapping[str, _Choice]) -> dict[str, _Choice]:
    """Choices by module, with those of the modules that vLLM makes of several, where all of its parts agree."""
    joined = dict(choices)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in choices):
        for whole, parts in JOINED.items():
            found = [choices[name] for part in parts if (name := f"{parent}.{part}") in choices]
            if len(found) == len(parts) and len(set(found)) == 1:
                joined.setdefault(f"{parent}.{whole}", found[0])
    return joined


def _open(pattern: str, everything: Iterable[str]) -> str:
    """A pattern without the `$` at its end, where it matches no more modules so."""
    shorter = pattern.removesuffix("$")
    more = any(re.match(shorter, name) and not re.match(pattern, name) for name in everything)
    return pattern if more else shorter


def _scheme(scheme: _Kind) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    return {"bits": bits, "group_size": group_size, "sym": symmetric}


def _producers(grids: Mapping[str, Grid]) -> list[str]:
    """Who wrote the file, and the GPTQModel version whose layout it has: asymmetric files are opened from 0.9.0 on."""
    producers = [f"dscompress:{__version__}"]
    if not all(grid.symmetric for grid in grids.values()):
        producers.append("gptqmodel:0.9.0")
    return producers


def _parts_of_every_layer(grids: Mapping[str, Grid], skipped: Sequence[str]) -> list[str]:
    """Names inside a layer that are quantized in all layers, for optimum; none when layers differ."""
    kept = list(dict.fromkeys(inside_layer(name) for name in grids))
    return [] if any(inside_layer(name) in kept for name in skipped) else kept


def _problems(shapes: Mapping[str, tuple[int, int]], grids: Mapping[str, Grid], _: Sequence[str]) -> list[str]:
    found: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        problem = check(shape, grids[name])
        if problem is not None:
            found.setdefault(problem, []).append(name)
    return [f"{names[0]} ({len(names)} such layers): {problem}" for problem, names in found.items()]


FORMAT = Format(
    name=GPTQ,
    parts=("qweight", "qzeros", "scales", "g_idx"),
    pack=pack,
    unpack=unpack,
    describe=describe,
    config=lambda grids, unquantized, embeddings, inputs, cache: quantization_config(grids, unquantized),
    zero_minimum=1,
    problems=_problems,
    extra_files=lambda config: {"quantize_config.json": json.dumps(config, indent=2) + "\n"},
    read=lambda tensors, grid, dtype: dequantize(tensors, grid).to(dtype),
)
