"""A distill stage whose student has a shape of its own, as two stages: pruned, then trained. Never imports torch."""

from compress.model.shapes import Shapes
from compress.recipe.prune import PruneStage
from compress.recipe.shape import Shape
from compress.recipe.train import DistillShape, DistillStage, TrainStage
from compress.recipe.types import StageSpec
from compress.stages.contract import Setting


def parts(spec: TrainStage, shapes: Shapes | None, setting: Setting) -> list[StageSpec]:
    """A student of another shape is pruned out of the model first, as a stage of its own."""
    if not isinstance(spec, DistillStage) or spec.shape is None or not spec.shape.sizes:
        return [spec]
    sizes = Shape(**spec.shape.sizes)
    first = PruneStage.model_validate({"kind": "prune", "shape": sizes.model_dump(exclude_none=True)})
    tied = DistillShape.model_construct(tie_word_embeddings=True) if spec.shape.tie_word_embeddings else None
    return [first, spec.model_copy(update={"shape": tied})]
