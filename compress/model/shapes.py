"""What a model is made of, from config.json and tensor headers alone. Never imports torch."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from compress.errors import ModelError
from compress.model.arch import FAMILIES, depth_of, positions_of
from compress.model.checkpoint import Checkpoint, TensorInfo
from compress.model.names import layers_prefix, says_tied

LAYER = re.compile(r"(.+?)\.(\d+)\.(.+)\.weight")
FLOATS = ("BF16", "F16", "F32")
DTYPE_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # in config.json, by those in safetensors
_DTYPES = {name: stored for stored, name in DTYPE_NAMES.items()}


class Shapes(Protocol):
    """A model without its numbers: an open `Checkpoint`, or what a stage will make of one."""

    @property
    def folder(self) -> Path:
        """Where the model comes from, for messages."""

    @property
    def config(self) -> dict[str, Any]:
        """config.json."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, by name."""

    @property
    def bytes(self) -> int:
        """Of the safetensors files."""

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same."""


@dataclass(frozen=True)
class PlannedShapes:
    """`Shapes` of a checkpoint that a stage will make of its parent."""

    parent: Shapes
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    bytes: int

    @property
    def folder(self) -> Path:
        """Where the first parent lies."""
        return self.parent.folder

    def equal(self, one: str, other: str) -> bool:
        """What is equal in the parent stays so."""
        return self.parent.equal(one, other)


@dataclass(frozen=True)
class Modules:
    """Where a checkpoint keeps its parts, from tensor names: the layers' prefix, embeddings, head, linears."""

    layers: str
    embeddings: str
    head: str
    linears: dict[str, tuple[int, int]]


def find_modules(checkpoint: Shapes) -> Modules:
    """Decoder layers, embeddings and head of a dense checkpoint, by the family's row or by the tensors' names.

    Raises:
        ModelError: no tensors that look like decoder layers, or weights that are no floats.
    """
    family = FAMILIES.get(str(checkpoint.config.get("model_type")))
    found = [(match, info) for name, info in checkpoint.tensors.items() if (match := LAYER.fullmatch(name))]
    layers = layers_prefix(checkpoint.tensors, checkpoint.config)
    linears = {
        match[0].removesuffix(".weight"): (info.shape[0], info.shape[1])
        for match, info in found
        if match[1] == layers and len(info.shape) == 2
    }
    if not linears:
        raise ModelError(f"{checkpoint.folder}: no decoder layers under {layers or 'any prefix'} in the weights")
    odd = next((n for n in linears if checkpoint.tensors[f"{n}.weight"].dtype not in FLOATS), None)
    if odd:
        dtype = checkpoint.tensors[f"{odd}.weight"].dtype
        raise ModelError(f"{checkpoint.folder}: {odd} is stored as {dtype}; give bf16, fp16 or fp32 weights")
    outside = {n.removesuffix(".weight"): i for n, i in checkpoint.tensors.items() if not n.startswith(layers + ".")}
    wide = [n for n, i in outside.items() if len(i.shape) == 2 and i.shape[0] == checkpoint.config.get("vocab_size")]
    embeddings = family.embeddings if family else next((n for n in wide if "embed" in n or n.endswith("wte")), "")
    head = family.head if family else next((n for n in wide if n != embeddings), "lm_head")
    return Modules(layers, embeddings, head, linears)


def model_dtype(checkpoint: Shapes) -> str:
    """The dtype in which a dense checkpoint runs where nobody asks for another: BF16, F16 or F32.

    It is what config.json says, as in transformers, or else what most of the decoder layers is stored in.
    """
    said = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")).removeprefix("torch.")
    if said in _DTYPES:
        return _DTYPES[said]
    stored: Counter[str] = Counter()
    for name, (rows, columns) in find_modules(checkpoint).linears.items():
        stored[checkpoint.tensors[f"{name}.weight"].dtype] += rows * columns
    return stored.most_common(1)[0][0]


def check_depth(checkpoint: Shapes) -> None:
    """Refuse weights of another depth than config.json says.

    Raises:
        ModelError: naming both.
    """
    prefix = find_modules(checkpoint).layers + "."
    layers = {name.removeprefix(prefix).partition(".")[0] for name in checkpoint.tensors if name.startswith(prefix)}
    depth = depth_of(checkpoint.config)
    if depth != len(layers):
        raise ModelError(
            f"{checkpoint.folder}: config.json says {depth} layers, the weights have {len(layers)}; "
            "get both from the same place"
        )


def check_length(checkpoint: Shapes, sequence_length: int, where: str) -> None:
    """Refuse sequences that are longer than the model's positions.

    Raises:
        ModelError: naming the field.
    """
    limit = positions_of(checkpoint.config)
    if limit is not None and sequence_length > limit:
        raise ModelError(f"{where}: {sequence_length} is more than the model's {limit} positions; use at most {limit}")


def check_vocabulary(checkpoint: Shapes, highest: int) -> None:
    """Refuse text with tokens that the model has no embedding for.

    Args:
        checkpoint: the model.
        highest: the largest token id of the text.

    Raises:
        ModelError: the tokenizer is another model's.
    """
    rows = checkpoint.config.get("vocab_size")
    if not checkpoint.config.get("quantization_config"):
        info = checkpoint.tensors.get(f"{find_modules(checkpoint).embeddings}.weight")
        rows = info.shape[0] if info is not None else rows
    if isinstance(rows, int) and highest >= rows:
        raise ModelError(
            f"{checkpoint.folder}: its tokenizer gives token {highest}, its embeddings end at {rows - 1}; "
            "tokenizer and weights are of different models"
        )


def is_tied(checkpoint: Shapes, modules: Modules) -> bool:
    """Whether the head is the embeddings: config.json says so, and no head with other values is stored.

    transformers ties by the same rule. Where both are stored, they are read once and compared.
    """
    head, embeddings = f"{modules.head}.weight", f"{modules.embeddings}.weight"
    if not says_tied(checkpoint.config) or embeddings not in checkpoint.tensors:
        return False
    return head not in checkpoint.tensors or checkpoint.equal(head, embeddings)


def has_own_head(checkpoint: Shapes, modules: Modules) -> bool:
    """Whether a head is stored that config.json wrongly calls tied: its values are others than the embeddings'."""
    stored = f"{modules.head}.weight" in checkpoint.tensors and f"{modules.embeddings}.weight" in checkpoint.tensors
    return stored and says_tied(checkpoint.config) and not is_tied(checkpoint, modules)


def remarks(checkpoint: Checkpoint) -> list[str]:
    """What the user should hear of how the model is read, a line each."""
    modules = find_modules(checkpoint)
    lines = list(checkpoint.remarks)
    if has_own_head(checkpoint, modules):
        lines.append(
            f"{checkpoint.folder}: config.json means tie_word_embeddings: true, but {modules.head}.weight is stored "
            "with other values: it is kept, as transformers does, and the result says tie_word_embeddings: false"
        )
    return lines


def parameter_count(checkpoint: Shapes) -> int:
    """Parameters of a dense checkpoint; a tied head that is stored twice counts once."""
    modules = find_modules(checkpoint)
    skipped = f"{modules.head}.weight" if is_tied(checkpoint, modules) else ""
    total = 0
    for name, info in checkpoint.tensors.items():
        if name != skipped and info.dtype in FLOATS:
            total += math.prod(info.shape)
    return total
