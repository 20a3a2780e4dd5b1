"""python -m compress.model.gguf.convert FOLDER FILE: a GGUF file as a bf16 Hugging Face checkpoint.

A process of its own, because it imports torch and transformers, which `dscompress validate` does not need. Tensors are
dequantized one by one and written in parts, so the model need not fit into memory. Each parameter of the model comes
from one tensor of the file, and each tensor of the file goes into the model or into its config; else it is refused.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import UserError
from compress.model.checkpoint import merge_parts, write_part
from compress.model.gguf.config import Family, family_of, model_config
from compress.model.gguf.header import Gguf, GgufTensor, open_gguf
from compress.model.gguf.keys import REMEDY
from compress.model.gguf.rope import FREQS, LONG, SHORT
from compress.model.gguf.tokenizer import make_tokenizer, special_ids
from compress.model.layout import MAX_SHARD_BYTES

if TYPE_CHECKING:
    from torch import Tensor

_MOST_NAMES = 3


def convert(file: Path, folder: Path, shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write weights, config and tokenizer of a GGUF file to a folder.

    Args:
        file: the GGUF file, or any part of a split one.
        folder: an empty folder.
        shard_bytes: of a safetensors file.

    Raises:
        ModelError: what about the file is not supported, missing or left over.
    """
    gguf = open_gguf(file)
    config = model_config(gguf)
    tokenizer = make_tokenizer(gguf)
    model = _skeleton(gguf, config | special_ids(gguf))
    sources = _sources(gguf, model)
    parts = folder / "parts"
    parts.mkdir()
    written = [parts / f"{number}.safetensors" for number, _ in enumerate(_shards(model, sources, shard_bytes))]
    for part, names in zip(written, _shards(model, sources, shard_bytes), strict=True):
        write_part(part, {name: _load(gguf, sources[name], model.config) for name in names}, {})
    merge_parts(written, folder, lambda _: {}, shard_bytes)
    shutil.rmtree(parts)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _skeleton(gguf: Gguf, config: dict[str, Any]) -> Any:
    """The model on the meta device: its parameters' names and shapes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        made = AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise gguf.error(f"its header describes no model that transformers can build ({reason}); {REMEDY}") from error
    model.config.architectures = [type(model).__name__]
    return model


def _sources(gguf: Gguf, model: Any) -> dict[str, str]:
    """The file's tensor for each parameter.

    Raises:
        ModelError: naming tensors that the file lacks, that the model has no place for, or that have another shape.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == gguf.architecture)
    names = get_tensor_name_map(architecture, model.config.num_hidden_layers)
    shapes = {name: tuple(values.shape) for name, values in model.state_dict().items()}
    sources = {}
    for parameter in (name for name in shapes if name not in model.all_tied_weights_keys):
        module, _, kind = parameter.rpartition(".")
        sources[parameter] = f"{names.get_name(module) or module}.{kind}"
    missing = [source for source in sources.values() if source not in gguf.tensors]
    if missing:
        raise gguf.error(f"lacks {_some(missing)}, which a {model.config.model_type} model has; download it again")
    left = [name for name in gguf.tensors if name not in {*sources.values(), FREQS, LONG, SHORT}]
    if left:
        raise gguf.error(f"holds {_some(left)}, for which a {model.config.model_type} model has no place; {REMEDY}")
    for parameter, source in sources.items():
        shape = gguf.tensors[source].shape
        if shape != shapes[parameter]:
            raise gguf.error(
                f"{source} has shape {list(shape)}, its header says {list(shapes[parameter])}; download it again"
            )
    return sources


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


def _shards(model: Any, sources: dict[str, str], most: int) -> Iterator[list[str]]:
    """Names of parameters, as many as fit into a file."""
    shapes, taken = model.state_dict(), 0
    names: list[str] = []
    for name in sources:
        size = 2 * shapes[name].numel()
        if names and taken + size > most:
            yield names
            names, taken = [], 0
        names.append(name)
        taken += size
    yield names


def _load(gguf: Gguf, source: str, config: Any) -> "Tensor":
    """One parameter, dequantized by the gguf package, in transformers' order, bf16."""
    import numpy as np
    import torch

    tensor, family = gguf.tensors[source], family_of(gguf)
    values = _undo(family, source, _dequantized(gguf, source, tensor), config)
    return torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)


def _dequantized(gguf: Gguf, name: str, tensor: GgufTensor) -> Any:
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize, quant_shape_to_byte_shape

    kind = GGMLQuantizationType(tensor.type)
    raw = np.fromfile(tensor.file, np.uint8, tensor.bytes, offset=tensor.offset)
    try:
        return dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
    except (NotImplementedError, ValueError) as error:
        raise gguf.error(
            f"{name} is stored as {kind.name}, which gguf cannot dequantize ({error}); {REMEDY}"
        ) from error


def _undo(family: Family, source: str, values: Any, config: Any) -> Any:
    """Take back what llama.cpp's converter did to the values [O, I] or [O]."""
    if family.norms_plus_one and source.endswith("norm.weight"):
        return values - 1
    if family.interleaved and (".attn_q." in source or ".attn_k." in source):
        heads = config.num_attention_heads if ".attn_q." in source else config.num_key_value_heads
        rest = values.shape[1:]
        return values.reshape(heads, -1, 2, *rest).swapaxes(1, 2).reshape(values.shape)
    return values


def main(folder: str, file: str) -> int:
    """Convert, and say in one line of stderr what is wrong with the file."""
    try:
        convert(Path(file), Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        print(f"model: {file}: needs the package {error.name}; run: pip install {error.name}", file=sys.stderr)
    else:
        return 0
    return UserError.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
