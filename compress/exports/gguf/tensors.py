"""The tensors of a GGUF file: which there are, in what type, and the bytes of one at a time.

Norms and biases are float32, as llama.cpp wants them; matrices are of one type, but for those whose codes lie on a grid
of ggml and are carried over as they are. What llama.cpp's converter does to values is done here: rows of q and k in the
order of its rotary pairs, 1 added to the norms of Gemma, no head where it is the embeddings.

Shapes: O output rows, I input columns.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    get_tensor_name_map,
    quant_shape_to_byte_shape,
    quantize,
)
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import ModelError
from compress.exports.gguf.blocks import as_blocks
from compress.exports.gguf.config import Header
from compress.exports.refused import ROUNDS_INPUTS
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.ggml import pack
from compress.formats.gguf import PARTS
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.block_types import BLOCK_TYPES, BlockType

_BLOCK = 32  # columns of a block of Q8_0
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_AT_ONCE = 1 << 24  # numbers that are quantized at a time
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_NAMES = 3


@dataclass(frozen=True)
class Entry:
    """A tensor of the file.

    Args:
        name: in the file.
        source: in the checkpoint, dense; empty for factors of the rotary frequencies.
        shape: as torch has it.
        type: in the file.
        carried: name of the block type whose codes the checkpoint has.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    carried: str | None = None

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape in bytes."""
        return tuple(quant_shape_to_byte_shape(self.shape, self.type))


class Tensors:
    """What is written of a checkpoint.

    Args:
        checkpoint: open.
        header: of the file.
        kind: type of matrices: F32, F16, BF16 or Q8_0.
        carry: take over codes that lie on a grid of ggml.

    Attributes:
        entries: all tensors, in the order in which they are written.
        view: the checkpoint, dense.

    Raises:
        ModelError: tensors that llama.cpp has no place for, that are missing or of other sizes than the config says.
    """

    def __init__(self, checkpoint: Checkpoint, header: Header, kind: str, carry: bool) -> None:
        self.folder, self.header, self.checkpoint = checkpoint.folder, header, checkpoint
        view = DequantizedCheckpoint(checkpoint)
        if view.rounds_inputs:
            raise self._error(ROUNDS_INPUTS)
        self.view = view.running_in(_DTYPES.get(kind, torch.float32))
        shapes = self._expected()
        self.entries = [self._entry(name, shape, kind, carry) for name, shape in shapes.items()]
        for name, factors in header.factors.items():
            self.entries.append(Entry(name, "", (len(factors),), GGMLQuantizationType.F32))

    def _error(self, words: str) -> ModelError:
        return ModelError(f"{self.folder}: {words}")

    def _expected(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that go into the file, by the names of the model that the config describes."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(self.header.config, dtype=torch.bfloat16)
        shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
        tied = set(model.all_tied_weights_keys)
        there = self.view.tensors.keys()
        if tied and self._has_own_head():
            if not self.header.target.own_head:
                raise self._error(f"has a head of its own, which llama.cpp's {self.header.target.architecture} has not")
            tied = set()
        shapes = {name: shape for name, shape in shapes.items() if name not in tied}
        missing = [name for name in shapes if name not in there]
        if missing:
            raise self._error(f"lacks {_some(missing)}; download the model again")
        left = [name for name in there if name not in {*shapes, *tied} and not name.endswith("rotary_emb.inv_freq")]
        if left:
            kind = self.header.config.model_type
            raise self._error(f"holds {_some(left)}, for which a {kind} model has no place; remove them")
        if _HEAD in shapes and not self.header.target.own_head:
            raise self._error(f"has a head of its own, which llama.cpp's {self.header.target.architecture} has not")
        return shapes

    def _has_own_head(self) -> bool:
        """Whether a head is stored that the config wrongly calls tied."""
        if _HEAD not in self.view.tensors:
            return False
        if "lm_head" in self.view.grids:
            return True
        return not self.checkpoint.equal(_HEAD, _EMBEDDINGS)

    def _entry(self, source: str, shape: tuple[int, ...], kind: str, carry: bool) -> Entry:
        module, _, part = source.rpartition(".")
        name = self._names.get_name(module)
        target = self.header.target
        if name is None or (part == "bias" and module.rpartition(".")[2] not in target.biases):
            raise self._error(f"has {source}, for which llama.cpp's {target.architecture} has no place")
        name = f"{name}.{part}"
        stored = self.view.tensors[source].shape
        if module not in self.view.grids and stored != shape:
            raise self._error(f"{source} has shape {list(stored)}, config.json says {list(shape)}; get both together")
        if len(shape) == 1:
            return Entry(name, source, shape, GGMLQuantizationType.F32)
        if carry and module in self.view.grids and (block := self._block_type(module)) is not None:
            return Entry(name, source, shape, GGMLQuantizationType(block.number), block.name)
        if kind == "Q8_0" and shape[1] % _BLOCK:
            kind = "F16"
        return Entry(name, source, shape, GGMLQuantizationType[kind])

    def _block_type(self, module: str) -> BlockType | None:
        """The grid of ggml on which a quantized module's codes lie; None where they lie on none."""
        grid = self.view.grids[module]
        if isinstance(grid, BlockType):
            return grid
        blocked = as_blocks(self.view.quantized(module))
        return None if blocked is None else blocked.type

    @cached_property
    def _names(self) -> Any:
        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.header.target.architecture)
        return get_tensor_name_map(architecture, self.header.config.num_hidden_layers)

    def load(self, entry: Entry) -> NDArray[Any]:
        """The bytes of a tensor, as an array of them or of wider numbers.

        Raises:
            ModelError: numbers that its type can't hold.
        """
        if not entry.source:
            return np.array(self.header.factors[entry.name], np.float32)
        if entry.carried is not None:
            module, order = entry.source.removesuffix(".weight"), self._order(entry)
            if isinstance(self.view.grids[module], BlockType):  # the bytes are there
                (packed,) = self.checkpoint.load([f"{module}.{part}" for part in PARTS]).values()
                return (packed if order is None else packed[order]).numpy()
            blocked = as_blocks(self.view.quantized(module), order)
            assert blocked is not None and blocked.type == BLOCK_TYPES[entry.carried]
            return pack(blocked).numpy()
        values = self.view.load([entry.source])[entry.source]
        if tuple(values.shape) != entry.shape:
            raise self._error(
                f"{entry.source} has shape {list(values.shape)}, config.json says {list(entry.shape)}; "
                "get both together"
            )
        order = self._order(entry)
        if order is not None:
            values = values[order]
        if entry.name.endswith("norm.weight") and self.header.target.family.norms_plus_one:
            values = values.float() + 1
        return self._encoded(values, entry)

    def _order(self, entry: Entry) -> Tensor | None:
        """Rows of q and k in the order of interleaved rotary pairs, as indices [O]; None as they are."""
        heads = {"attn_q": self.header.config.num_attention_heads, "attn_k": self.header.config.num_key_value_heads}
        part = entry.name.split(".")[-2]
        if not self.header.target.family.interleaved or part not in heads:
            return None
        return torch.arange(entry.shape[0]).view(heads[part], 2, -1).transpose(1, 2).flatten()

    def _encoded(self, values: Tensor, entry: Entry) -> NDArray[Any]:
        name = entry.type.name
        if name not in _DTYPES:
            rows = max(1, _AT_ONCE // values.shape[1])
            parts = [quantize(part.float().numpy(), entry.type) for part in values.split(rows)]
            return np.concatenate(parts)
        encoded = values.to(_DTYPES[name])
        if name == "F16" and bool((encoded.isinf() & values.isfinite()).any()):
            largest = float(values.float().abs().max())
            raise self._error(
                f"{entry.source} reaches {largest:g}, more than float16 can hold; write it with --type bf16"
            )
        return (encoded.view(torch.int16) if name == "BF16" else encoded).contiguous().numpy()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"
