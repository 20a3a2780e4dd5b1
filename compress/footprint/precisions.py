"""The rows of the table: every precision and what its weights take, from the plans of the stages that make it.

Bytes are of tensors in memory, without the headers of files. llama.cpp's are about right: it stores matrices in blocks
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h), the head in q6_k and what has one dimension in
float32; where 256 does not divide a width it takes the next type with blocks of 32. Its mixtures (_S, _M) keep some
matrices finer.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from compress.errors import ModelError, RecipeError
from compress.footprint.configs import known_config
from compress.footprint.subject import Subject
from compress.formats.facts import bytes_on_disk
from compress.formats.openers import VLLM_BITS
from compress.model.shapes import Shapes, model_dtype
from compress.recipe.load import load_calibration_spec
from compress.recipe.prune import PruneStage
from compress.recipe.quantize import QuantizeStage
from compress.stages.contract import Setting
from compress.stages.prune.plan import plan as plan_pruning
from compress.stages.quantize.matrix import Matrix
from compress.stages.quantize.plan import plan_matrices
from compress.stages.quantize.written import output_bytes

Made = Literal["as it is", "dscompress", "llama.cpp"]
_ROUTERS = ("mlp.gate", "router", "mlp.shared_expert_gate")  # which choose experts: a few rows, left in 16 bits
_BLOCKS = {  # weights and bytes of a block
    "q8_0": (32, 34), "q6_k": (256, 210), "q5_k": (256, 176), "q4_k": (256, 144), "q4_0": (32, 18),
    "q3_k": (256, 110), "q2_k": (256, 84), "q5_1": (32, 24), "q5_0": (32, 22), "iq4_nl": (32, 18), "f16": (1, 2),
}  # fmt: skip
_NARROW = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@dataclass(frozen=True)
class Precision:
    """A row.

    Args:
        name: of the row.
        bits: width of what is multiplied, or kept.
        stage: what a recipe's quantize stage says; None: no such stage.
        sparsity: share of the layers' parameters that a prune stage removes before.
        block: llama.cpp's type.
        format: that a card should have kernels for: bf16, int8, fp8, int4.
    """

    name: str
    bits: int
    stage: Mapping[str, Any] | None = None
    sparsity: float = 0.0
    block: str | None = None
    format: str | None = None

    @property
    def made(self) -> Made:
        """By what."""
        if self.block is not None:
            return "llama.cpp"
        return "dscompress" if self.stage is not None or self.sparsity else "as it is"

    @property
    def width(self) -> int:
        """Bytes of a number in the cache and in activations."""
        return 4 if self.bits == 32 else 2

    @property
    def openers(self) -> str:
        """Which programs open it (README, "What is written, and who opens it")."""
        if self.block is not None:
            return "llama.cpp"
        return "GPTQModel" if (self.stage or {}).get("format") == "gptq" else "vLLM, transformers"


def _gptq(bits: int, group: int) -> dict[str, Any]:
    """3 bits in format gptq: what opens them in compressed-tensors unpacks them to 16 bits in memory."""
    more = {} if bits in VLLM_BITS else {"format": "gptq"}
    return {"kind": "quantize", "method": "gptq", "bits": bits, "group_size": group, **more}


_EIGHT = {"kind": "quantize", "method": "dynamic"}
PRECISIONS: Sequence[Precision] = (
    Precision("fp32", 32),
    Precision("bf16", 16, format="bf16"),
    Precision("int8", 8, {**_EIGHT, "dtype": "int8", "smooth": "auto"}, format="int8"),
    Precision("fp8", 8, {**_EIGHT, "dtype": "fp8"}, format="fp8"),
    Precision("int4 g64", 4, _gptq(4, 64), format="int4"),
    Precision("int4 g128", 4, _gptq(4, 128), format="int4"),
    Precision("int3 g64", 3, _gptq(3, 64)),
    Precision("int3 g128", 3, _gptq(3, 128)),
    Precision("pruned 25 %, bf16", 16, sparsity=0.25, format="bf16"),
    Precision("pruned 40 %, bf16", 16, sparsity=0.4, format="bf16"),
    Precision("pruned 25 %, int4", 4, _gptq(4, 128), 0.25, format="int4"),
    Precision("pruned 40 %, int4", 4, _gptq(4, 128), 0.4, format="int4"),
    *(Precision(f"gguf {n}", 0, block=n) for n in ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k")),
)


@dataclass(frozen=True)
class Weights:
    """Weights of a model in a precision.

    Args:
        bytes: in memory.
        read: of them, what one token needs: not the other rows of the embeddings, nor experts that it does not use.
        shapes: of the model, pruned where the precision says so.
        config: of it, with its family's defaults.
        stages: what a recipe says to make it.
        file_bytes: of the safetensors files that a run writes, as its --dry-run says; None where dscompress makes none.
    """

    bytes: int
    read: int
    shapes: Shapes
    config: Any
    stages: tuple[Any, ...] = ()
    file_bytes: int | None = None


def weights_of(subject: Subject, precision: Precision) -> Weights | str:
    """What a precision's weights take, or why it can't be made."""
    shapes, config = subject.shapes, subject.config
    stages: list[Any] = []
    stage = None if precision.stage is None else TypeAdapter(QuantizeStage).validate_python(dict(precision.stage))
    if precision.sparsity:
        if subject.refused is not None:
            return f"{subject.refused}, which can't be pruned"
        if stage is not None and not _divides(stage, shapes):
            stage = stage.model_copy(update={"group_size": 64})
        pruned = _pruned(subject, precision.sparsity, [] if stage is None else [stage])
        if isinstance(pruned, str):
            return pruned
        prune, shapes = pruned
        config, stages = known_config(shapes.config, shapes.folder), [prune]
    loaded = subject.loaded(shapes)
    written = shapes.bytes if stages and subject.refused is None else None
    if stage is not None:
        try:
            matrices = _matrices(stage, shapes)
        except RecipeError as error:
            return _brief(error.problems[0])
        stages.append(stage)
        dtype = model_dtype(shapes)
        sizes = {f"{matrix.name}.weight": bytes_on_disk(stage.layout, matrix, dtype) for matrix in matrices}
        written = output_bytes(stage, matrices, shapes) if subject.refused is None else None
    elif precision.block is not None:
        sizes = _in_blocks(precision.block, subject, shapes)
    else:
        sizes = {name: math.prod(info.shape) * precision.bits // 8 for name, info in loaded.items()}
    each = {name: sizes.get(name, info.bytes) for name, info in loaded.items()}
    once = _looked_up(subject, shapes)
    return Weights(
        sum(number * subject.copies(name) for name, number in each.items()),
        sum(number * subject.reads(name) for name, number in each.items() if name != once),
        shapes, config, tuple(stages), written,
    )  # fmt: skip


def _divides(stage: Any, shapes: Shapes) -> bool:
    try:
        plan_matrices(stage, shapes, "")
    except RecipeError:
        return False
    return True


def _pruned(subject: Subject, sparsity: float, following: list[Any]) -> tuple[PruneStage, Shapes] | str:
    """The shapes that a prune stage leaves, as its plan says; or why it can't."""
    text = load_calibration_spec("general_en", base=Path.cwd())
    problem = "can't be pruned"
    for axes in (["ffn", "heads"], ["ffn"]):
        spec = PruneStage(kind="prune", target={"sparsity": sparsity, "of": "layers"}, axes=axes)  # type: ignore[arg-type]
        try:
            plan = plan_pruning(spec, subject.shapes, Setting("", text, following, subject.shapes))
        except ModelError as error:
            return str(error)
        if not plan.problems and plan.shapes is not None:
            return spec, plan.shapes
        problem = _brief(plan.problems[0])
    return problem


def _brief(problem: str) -> str:
    """A problem of a stage without the key that it stands under, and without the names of matrices."""
    return re.sub(r"^\.?(group_size)?: ", "", problem).partition(" of model.")[0]


def _matrices(stage: Any, shapes: Shapes) -> list[Matrix]:
    """What a quantize stage replaces; the routers of a mixture of experts stay.

    Raises:
        RecipeError: groups that don't divide a width.
    """
    modules = {name.removesuffix(".weight") for name in shapes.tensors}
    kept = sorted({router for router in _ROUTERS if any(name.endswith(f".{router}") for name in modules)})
    return plan_matrices(stage.model_copy(update={"ignore": [f"*.{router}" for router in kept]}), shapes, "")


def _in_blocks(block: str, subject: Subject, shapes: Shapes) -> dict[str, int]:
    """Bytes of every tensor as llama.cpp stores it."""
    modules, loaded = subject.modules, subject.loaded(shapes)
    head = f"{modules.head}.weight" if f"{modules.head}.weight" in loaded else f"{modules.embeddings}.weight"
    sizes = {}
    for name, info in loaded.items():
        if len(info.shape) < 2 or name.removesuffix(".weight").endswith(_ROUTERS):
            sizes[name] = 4 * math.prod(info.shape)
            continue
        kind = "q6_k" if name == head and block != "q8_0" else block
        width = info.shape[-1]
        kind = kind if width % _BLOCKS[kind][0] == 0 else _NARROW.get(kind, "f16")
        weights, stored = _BLOCKS[kind if width % _BLOCKS[kind][0] == 0 else "f16"]
        sizes[name] = math.prod(info.shape) // weights * stored
    return sizes


def _looked_up(subject: Subject, shapes: Shapes) -> str:
    """The embeddings where they are not the head too: of those a token needs a row."""
    modules, loaded = subject.modules, subject.loaded(shapes)
    return f"{modules.embeddings}.weight" if f"{modules.head}.weight" in loaded else ""
