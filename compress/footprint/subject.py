"""The model that a plan is about: its config, and the names and shapes of its tensors. No weight is read or fetched.

Where there are safetensors headers, they are what counts. Where there is a config alone, transformers builds the model
without memory (on torch's meta device) and its tensors are counted: families that transformers knows itself, no code
from elsewhere. All experts of a layer have one shape, so one of them stands for all.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.footprint.configs import built, known_config, text_config
from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint, TensorInfo
from compress.model.gguf.config import model_config
from compress.model.gguf.header import is_gguf, open_gguf
from compress.model.names import canonical_names, layers_beyond
from compress.model.numbers import check_numbers
from compress.model.shapes import Modules, Shapes, find_modules, is_tied
from compress.model.source import in_package, looks_local

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)\.")
_FIRST = ".experts.0."
_INNER = re.compile(r"^(?:model\.)?language_model\.(?:model\.)?")
_USED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")


@dataclass(frozen=True)
class Headers:
    """`Shapes` of tensors whose numbers are not here.

    Args:
        folder: where they come from, for messages.
        config: config.json; a multimodal model's, that of its text part.
        tensors: by name; of a layer's experts the first alone.
        bytes: of the safetensors files.
        alike: whether two tensors hold the same, as far as that is known.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    bytes: int
    alike: Callable[[str, str], bool] = field(default=lambda one, other: True)

    def equal(self, one: str, other: str) -> bool:
        """What can't be compared here is taken to be the same, as config.json says."""
        return self.alike(one, other)


@dataclass(frozen=True)
class Subject:
    """A model to plan.

    Args:
        name: as the user called it.
        shapes: its tensors in 16 or 32 bits.
        config: of the text model, with the defaults of its family.
        experts: of a layer; 0: it is dense.
        used: experts that a token is sent through.
        stored: bytes of the weights as they are stored; None where only a config is here.
        told: where the tensors are known from: headers, config or gguf.
        notes: what its user should hear, a line each.
        refused: why dscompress can't compress it, in a few words; None where it can.
    """

    name: str
    shapes: Shapes
    config: "PretrainedConfig"
    experts: int
    used: int
    stored: int | None
    told: str
    notes: tuple[str, ...] = ()
    refused: str | None = None

    @property
    def modules(self) -> Modules:
        """Where its parts are."""
        return find_modules(self.shapes)

    @property
    def positions(self) -> int | None:
        """Tokens that a sequence may have."""
        return positions_of(self.config.to_dict())

    def copies(self, name: str) -> int:
        """Tensors of a layer that one name stands for."""
        return self.experts if _FIRST in name else 1

    def reads(self, name: str) -> int:
        """How many of them one token needs."""
        return self.used if _FIRST in name else 1

    def loaded(self, shapes: Shapes | None = None) -> dict[str, TensorInfo]:
        """The tensors that are held in memory: a head that is tied to the embeddings is no tensor of its own."""
        shapes = self.shapes if shapes is None else shapes
        modules = find_modules(shapes)
        tied = f"{modules.head}.weight" if is_tied(shapes, modules) else None
        return {name: info for name, info in shapes.tensors.items() if name != tied}

    @property
    def parameters(self) -> int:
        """All of them."""
        return sum(math.prod(info.shape) * self.copies(name) for name, info in self.loaded().items())

    @property
    def active(self) -> int:
        """Those that one token is computed with: all but the experts that it is not sent through."""
        return sum(math.prod(info.shape) * self.reads(name) for name, info in self.loaded().items())


def open_subject(reference: str) -> Subject:
    """The model of a reference, without its weights.

    Args:
        reference: folder, config.json, .gguf file, "package:<name>/<file>", or hub id.

    Raises:
        ModelError: no such model, a family that transformers does not know, or a config that it can't build.
    """
    path = in_package(reference) if reference.startswith("package:") else Path(reference).expanduser()
    if not path.exists():
        if reference.lower().endswith((".gguf", ".json")) or looks_local(reference):
            raise ModelError(
                f"model: {reference} does not exist; give a folder, a config.json, a .gguf file or a hub id"
            )
        from compress.footprint.hub import fetch_headers

        return _of_headers(reference, fetch_headers(reference))
    if is_gguf(path):
        gguf = open_gguf(path)
        stored = sum(tensor.bytes for tensor in gguf.tensors.values())
        return replace(_of_config(reference, model_config(gguf), path), stored=stored, told="gguf")
    if path.is_file():
        return _of_config(reference, read_config(path), path)
    if any(path.glob("*.safetensors")):
        return _of_checkpoint(reference, path)
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no config.json, so this is no Hugging Face model folder; give one that has it")
    return _of_config(reference, read_config(path / "config.json"), path)


def read_config(file: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        ModelError: it holds no JSON object.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{file}: not valid JSON ({error}); give a model's config.json") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: holds no JSON object; give a model's config.json")
    check_numbers(config, file)
    return config


def _of_checkpoint(name: str, folder: Path) -> Subject:
    found = Checkpoint(folder)
    return _of_headers(name, Headers(folder, found.config, found.tensors, found.bytes, found.equal))


def _of_headers(name: str, headers: Headers) -> Subject:
    """A model by its headers; one that is stored in codes is counted by its config beside them."""
    stored = sum(info.bytes for info in headers.tensors.values())
    if headers.config.get("quantization_config"):
        return replace(_of_config(name, headers.config, headers.folder), stored=stored, told="headers")
    names = canonical_names(headers.tensors, headers.config, headers.folder)
    tensors = {names[each]: info for each, info in headers.tensors.items()}
    for beyond in layers_beyond(tensors, headers.config):
        stored -= tensors.pop(beyond).bytes
    return _subject(name, replace(headers, tensors=tensors), stored, "headers")


def _of_config(name: str, config: dict[str, Any], where: Path) -> Subject:
    """A model by its config alone, in 16 bits."""
    dense = {key: value for key, value in config.items() if key != "quantization_config"}
    shapes = built(dense, where)
    infos = {n: TensorInfo(where, n, "BF16", shape, 2 * math.prod(shape), 0) for n, shape in shapes.items()}
    found = _subject(name, Headers(where, dense, infos, sum(info.bytes for info in infos.values())), None, "config")
    if (quantization := config.get("quantization_config")) is None:
        return found
    method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
    note = f"its weights are stored quantized ({method}); the rows are of the same model from 16 bits"
    return replace(found, notes=(*found.notes, note), refused=f"it is quantized already ({method})")


def _subject(name: str, headers: Headers, stored: int | None, told: str) -> Subject:
    whole = known_config(headers.config, headers.folder)
    config, notes, refused = text_config(whole), [], None
    tensors = dict(headers.tensors)
    if config is not whole:
        notes.append("multimodal: the rows quantize its text model alone, and the rest stays in 16 bits")
        refused = "it is multimodal"
        tensors = {_inner_name(each): info for each, info in tensors.items()}
        headers = replace(headers, config=config.to_dict(), alike=lambda one, other: True)
    tensors, experts = _one_expert(tensors, int(getattr(config, "hidden_size", 0)))
    used = experts and next((n for key in _USED if isinstance(n := getattr(config, key, None), int)), 0)
    if experts and not used:
        raise ModelError(
            f"{name}: has {experts} experts in a layer, and config.json does not say how many a token uses"
        )
    if experts:
        refused = "it is a mixture of experts"
        notes.append("mixture of experts: a token is computed with the active parameters, and all are in memory")
    return Subject(name, replace(headers, tensors=tensors), config, experts, used, stored, told, tuple(notes), refused)


def _inner_name(name: str) -> str:
    """The name in the text model of a multimodal model's tensor; others keep theirs."""
    if not _INNER.match(name):
        return name
    rest = _INNER.sub("", name)
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def _one_expert(tensors: Mapping[str, TensorInfo], hidden: int) -> tuple[dict[str, TensorInfo], int]:
    """The tensors with the first expert of each layer for all, and how many there are; joined ones are split."""
    counts: set[int] = {0}
    found: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        match = _EXPERT.search(name)
        if match is not None:
            counts.add(int(match[1]) + 1)
            if match[1] == "0":
                found[name] = info
        elif ".experts." in name and len(info.shape) > 1:
            counts.add(info.shape[0])
            found |= {n: _part(info, shape) for n, shape in _split(name, info.shape[1:], hidden).items()}
        else:
            found[name] = info
    return found, max(counts)


def _part(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    width = info.bytes // max(1, math.prod(info.shape))
    return replace(info, shape=shape, bytes=width * math.prod(shape))


def _split(name: str, shape: tuple[int, ...], hidden: int) -> dict[str, tuple[int, ...]]:
    """An expert's own tensors of what transformers keeps joined, by the names and shapes [O, I] of checkpoints."""
    before, _, local = name.partition(".experts.")
    prefix = f"{before}{_FIRST}"
    if len(shape) == 1:  # biases
        return {f"{prefix}{local.removesuffix('_bias')}.bias": shape}
    into = local.startswith("gate_up")  # [2F, D], in some families [D, 2F]
    rows, columns = shape if (shape[1] == hidden) == into else shape[::-1]
    if not into:
        return {f"{prefix}{local}.weight": (rows, columns)}
    return {f"{prefix}{part}.weight": (rows // 2, columns) for part in ("gate_proj", "up_proj")}
