"""What a quantize stage will write, tensor by tensor, from shapes alone. Never imports torch."""

from collections.abc import Sequence

from compress.formats import torchao_header
from compress.formats.facts import TORCHAO, packed, scale_dtype
from compress.model.layout import Planned, Stored, by_layer, merged_bytes
from compress.model.shapes import LAYER, Shapes, find_modules, is_tied, model_dtype
from compress.recipe.quantize import QuantizeStage, WeightActivationStage
from compress.stages.quantize.matrix import Matrix

_CACHED = ("k_proj", "v_proj", "qkv_proj", "kv_b_proj")  # by which compressed-tensors knows an attention module


def output_bytes(spec: QuantizeStage, matrices: Sequence[Matrix], checkpoint: Shapes) -> int:
    """Bytes of the safetensors files that the stage makes of a model."""
    layers = find_modules(checkpoint).layers
    metadata = {}
    if spec.layout == TORCHAO:
        replaced = {f"{matrix.name}.weight" for matrix in matrices}
        others = [name for name in _kept(checkpoint) if name not in replaced]
        metadata = torchao_header.metadata(matrices, others, model_dtype(checkpoint))
    return merged_bytes(by_layer(_written(spec, matrices, checkpoint), layers), metadata)


def _kept(checkpoint: Shapes) -> list[str]:
    """Names of a model's tensors; a tied head is stored once."""
    modules = find_modules(checkpoint)
    tied = f"{modules.head}.weight" if is_tied(checkpoint, modules) else ""
    return [name for name in checkpoint.tensors if name != tied]


def _written(spec: QuantizeStage, matrices: Sequence[Matrix], checkpoint: Shapes) -> dict[str, Stored]:
    model = model_dtype(checkpoint)
    found: dict[str, Stored] = {name: checkpoint.tensors[name] for name in _kept(checkpoint)}
    for matrix in matrices:
        found.pop(f"{matrix.name}.weight", None)
        found |= {f"{matrix.name}.{part}": info for part, info in packed(spec.layout, matrix, model).items()}
    if isinstance(spec, WeightActivationStage) and spec.kv_cache is not None:
        heads = checkpoint.config.get("num_key_value_heads") if spec.kv_cache == "fp8_per_head" else None
        scale = Planned(scale_dtype(spec.layout, model), (1,) if heads is None else (int(heads), 1, 1))
        for attention in _attentions(checkpoint):
            found |= {f"{attention}.{part}_scale": scale for part in "kv"}
    return found


def _attentions(checkpoint: Shapes) -> list[str]:
    """The modules that cache keys and values."""
    matches = [match for name in checkpoint.tensors if (match := LAYER.fullmatch(name))]
    owners = [match[0].removesuffix(".weight").rpartition(".") for match in matches if match[3].endswith(_CACHED)]
    return list(dict.fromkeys(owner for owner, _, _ in owners))
