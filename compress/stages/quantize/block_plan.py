"""Which matrix becomes which of ggml's block types, for a stage that writes a .gguf file. Never imports torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from compress.formats.ggml_mixes import Model, Role, fitting, tensor_type
from compress.model.arch import depth_of
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.model.gguf.config import FAMILIES
from compress.model.shapes import LAYER, Shapes, find_modules, is_tied
from compress.recipe.gguf import GgufStage
from compress.stages.quantize.matrix import Matrix

_ROLES: Mapping[str, Role] = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "qkv_proj": "qkv", "o_proj": "o", "gate_proj": "gate",
    "up_proj": "up", "gate_up_proj": "up", "down_proj": "down",
}  # fmt: skip
_MODEL_TYPES = sorted({family.model_type for family in FAMILIES.values()} | {"mistral"})


def block_problems(shapes: Shapes, where: str) -> list[str]:
    """Why no .gguf file can be made of this model, a line each."""
    kind = shapes.config.get("model_type")
    if kind in _MODEL_TYPES:
        return []
    return [f"{where}.format: gguf can't hold model_type {kind!r}; it can hold {', '.join(_MODEL_TYPES)}"]


def block_matrices(spec: GgufStage, linears: Mapping[str, tuple[int, int]], shapes: Shapes) -> list[Matrix]:
    """The matrices that get a block type; those whose widths no block divides are left out.

    Args:
        spec: the stage.
        linears: shapes (O, I) of what may be quantized, by module.
        shapes: the model.
    """
    found, model, modules = [], _model(shapes), find_modules(shapes)
    outer: dict[str, Role] = {modules.embeddings: "embeddings", modules.head: "head"}
    for name, shape in linears.items():
        role = outer.get(name) or _ROLES.get(name.rpartition(".")[2])
        kind = _type_of(spec, name, role, shape[1], model)
        if kind is not None:
            block = BLOCK_TYPES[kind]
            found.append(Matrix(name, shape, block.bits, block.sub_width, not block.has_min, block=kind))
    return found


def block_lines(spec: GgufStage, matrices: Sequence[Matrix], shapes: Shapes) -> list[tuple[str, str]]:
    """Lines of a dry run: how many matrices get which type, and which are not what the mix says because of widths."""
    counts = Counter(str(matrix.block) for matrix in matrices)
    lines = [("types", ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items())))]
    model, other = _model(shapes), Counter[int]()
    for name, (_, columns) in find_modules(shapes).linears.items():
        role = _ROLES.get(name.rpartition(".")[2])
        if role is not None and tensor_type(spec.type, role, columns, model, _layer(name))[1]:
            other[columns] += 1
    for columns, count in sorted(other.items()):
        said = f"{count} matrices are {columns} wide, which blocks of {spec.type} do not divide"
        lines.append(("types", f"{said}: they get the types that llama.cpp gives them then"))
    if spec.imatrix:
        lines.append(("imatrix", "the importance matrix of the calibration text, as a file for llama-quantize beside"))
    return lines


def _type_of(spec: GgufStage, name: str, role: Role | None, columns: int, model: Model) -> str | None:
    """The block type of a matrix; None where it stays in 16 bits."""
    named = [other.type for glob, other in spec.overrides.items() if fnmatchcase(name, glob)]
    if named:
        kind = fitting(named[-1], columns)
    elif role is None:
        return None
    else:
        kind = tensor_type(spec.type, role, columns, model, _layer(name))[0]
    return kind if kind in BLOCK_TYPES else None


def _layer(name: str) -> int:
    match = LAYER.fullmatch(f"{name}.weight")
    return int(match[2]) if match else 0


def _model(shapes: Shapes) -> Model:
    config, modules = shapes.config, find_modules(shapes)
    heads = int(config["num_attention_heads"])
    return Model(
        layers=int(depth_of(config) or 0),
        heads=heads,
        key_value_heads=int(config.get("num_key_value_heads") or heads),
        tied=is_tied(shapes, modules),
    )
