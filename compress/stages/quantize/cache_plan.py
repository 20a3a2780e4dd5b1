"""Whether loaders can have an 8-bit cache of a model's keys and values, from headers and config alone: never torch."""

from compress.errors import RecipeError
from compress.model.shapes import LAYER, Shapes
from compress.recipe.quantize import QuantizeStage, WeightActivationStage

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")  # what loaders read, once for all layers
_PROJECTIONS = ("k_proj", "v_proj", "qkv_proj")
ONE_FOR_ALL = "and loaders know one for all layers; use kv_cache: null"


def check_cache(spec: QuantizeStage, checkpoint: Shapes, where: str) -> None:
    """Refuse an 8-bit cache for layers whose keys and values have widths of their own.

    Args:
        spec: the stage.
        checkpoint: the model.
        where: what errors start with, such as "stages.0".

    Raises:
        RecipeError: naming two layers, or the key of config.json.
    """
    if not isinstance(spec, WeightActivationStage) or spec.kv_cache is None:
        return
    first: dict[str, tuple[str, int]] = {}
    for name, info in checkpoint.tensors.items():
        match = LAYER.fullmatch(name)
        if match is None or len(info.shape) != 2 or not match[3].endswith(_PROJECTIONS):
            continue
        other, rows = first.setdefault(match[3], (name, info.shape[0]))
        if rows != info.shape[0]:
            widths = f"{other} has {rows} rows and {name} {info.shape[0]}"
            raise RecipeError(
                [f"{where}.kv_cache: the layers' keys and values differ in width ({widths}), {ONE_FOR_ALL}"]
            )
    layers = checkpoint.config.get("per_layer_config")
    own = layers.values() if isinstance(layers, dict) else []
    for key in HEADS:
        if isinstance(checkpoint.config.get(key), list) or any(isinstance(each, dict) and key in each for each in own):
            raise RecipeError([f"{where}.kv_cache: config.json has {key} for each layer, {ONE_FOR_ALL}"])
