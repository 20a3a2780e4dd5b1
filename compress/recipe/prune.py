"""What a prune stage may say: whole parts of a model, or single weights. Never imports torch."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.recipe.shape import AXIS_OF, Axis, Shape
from compress.recipe.train import Heal
from compress.recipe.types import DAMP, Closed, Count, Number, Size, StageSpec

Importance: TypeAlias = Literal["greedy", "activation", "magnitude", "fluctuation"]
Share: TypeAlias = Annotated[Number, Field(gt=0, lt=1, allow_inf_nan=False)]


class Target(Closed):
    """How small the model becomes; one of the three."""

    sparsity: Share | None = Field(default=None, description="Share of the parameters to remove, such as 0.35.")
    of: Literal["all", "layers"] = Field(
        default="all",
        description="What sparsity is a share of: all parameters, or those of the decoder layers alone.",
    )
    parameters: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Parameters to keep, embeddings included, such as 5.2B."
    )
    bytes: Size | None = Field(default=None, description="Most bytes of the checkpoint after all stages, such as 4GB.")

    @model_validator(mode="after")
    def _check_one(self) -> "Target":
        given = [key for key in ("sparsity", "parameters", "bytes") if getattr(self, key) is not None]
        if len(given) != 1:
            said = f"has {' and '.join(given)}" if given else "says nothing"
            raise PydanticCustomError("target", "{said}; give one of sparsity, parameters and bytes", {"said": said})
        if self.of == "layers" and self.sparsity is None:
            raise PydanticCustomError("of", "of is for sparsity; remove it")
        return self


OneOrMore: TypeAlias = Annotated[
    Annotated[Shape, Tag("one")] | Annotated[list[Shape], Field(min_length=1), Tag("more")],
    Discriminator(lambda value: "more" if isinstance(value, list) else "one"),
]


class PruneStage(StageSpec):
    """Remove whole channels, heads and layers: what is left is a smaller model of the same family."""

    kind: Literal["prune"] = Field(description="What the stage does: prune.")
    target: Target | None = Field(
        default=None, description="How small the model becomes; the nearest shape that loaders accept is taken."
    )
    shape: OneOrMore | None = Field(
        default=None,
        description="The sizes themselves, instead of a target; of a list, the shape with the least divergence on "
        "calibration text is taken.",
    )
    axes: list[Axis] | None = Field(
        default=None,
        min_length=1,
        description="What may be removed: MLP channels (ffn), attention heads (heads), residual channels (hidden), a "
        "block of decoder layers (layers). Null means ffn, or what shape names.",
    )
    importance: Importance | None = Field(
        default=None,
        description="How parts are ranked: by what they put out (activation, what null means), by the output "
        "error that removing them leaves when the others make up for it (greedy: better where calibration text is like "
        "the model's use, worse where it is not), by how much they vary (fluctuation), by their weights (magnitude).",
    )
    compensate: bool = Field(
        default=True,
        description="Solve the weights that are kept by least squares for the original model's outputs.",
    )
    damp: Number = Field(
        default=0.1,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="Share of each input's energy that holds its weights back when they are solved.",
    )
    reconstruct: Literal["off", "submodule"] = Field(
        default="off",
        description="submodule: train each layer's attention and MLP for some steps towards what the original's put "
        "out, one layer in memory. Minutes on a GPU.",
    )
    reconstruct_steps: Count = Field(default=200, ge=1, description="Steps of reconstruct for each layer.")
    block: Literal["kl", "influence"] = Field(
        default="kl",
        description="How the block of layers is chosen: by the divergence that removing it leaves (kl), or by how "
        "little it turns the hidden states (influence, one pass).",
    )
    multiple_of: Annotated[Count, Field(ge=1)] | None = Field(
        default=None,
        description="What widths are kept a multiple of; null means 128 (64 where a width is under 2048), and what a "
        "later stage's group_size needs.",
    )
    allocate: Literal["even", "auto"] = Field(
        default="even",
        description="Which of the shapes that meet the target: the one that shrinks all axes most evenly, or the best "
        "of three by divergence on calibration text (auto, three times the time).",
    )
    heal: Heal | None = Field(
        default=None,
        description="Train what is left, behind the stage or behind each of its steps: {loss: kl, tokens: 20M}.",
    )
    steps: Annotated[Count, Field(ge=1, le=100)] | None = Field(
        default=None,
        description="In how many steps the target is reached, each healed for its part of the tokens. Null means one, "
        "and more where heal is given and more than 35 % goes.",
    )
    schedule: Literal["cubic", "linear", "geometric"] = Field(
        default="cubic",
        description="How much each step removes: less and less (cubic), the same number of parameters (linear), or the "
        "same share of what there is (geometric).",
    )

    @field_validator("axes")
    @classmethod
    def _check_axes(cls, value: list[Axis] | None) -> list[Axis] | None:
        if value is not None and len(set(value)) < len(value):
            raise PydanticCustomError("axes", "names an axis twice; remove one")
        return value

    @field_validator("reconstruct")
    @classmethod
    def _check_reconstruct(cls, value: str, info: ValidationInfo) -> str:
        if value != "off" and info.data.get("compensate") is False:
            raise PydanticCustomError("reconstruct", "goes on from compensated weights; use compensate: true")
        return value

    @model_validator(mode="after")
    def _check_target(self) -> "PruneStage":
        if (self.target is None) == (self.shape is None):
            said = "needs a target or a shape" if self.target is None else "has target and shape; keep one"
            raise PydanticCustomError("prune_target", "{said}", {"said": said})
        if self.shape is not None:
            outside = [key for key in self.sizes if self.axes is not None and AXIS_OF[key] not in self.axes]
            if outside:
                axis = AXIS_OF[outside[0]]
                message = f"shape.{outside[0]} is of axis {axis}, which axes does not name; add it or remove axes"
                raise PydanticCustomError("prune_axes", "{message}", {"message": message})
            if isinstance(self.shape, list) and len(self.shape) > 1 and not self.compensate:
                message = "shapes are compared by a divergence that compensate: false does not measure; give one shape"
                raise PydanticCustomError("prune_shapes", message)
            if self.allocate == "auto":
                raise PydanticCustomError(
                    "prune_allocate", "allocate: auto chooses a shape and shape is given; remove one"
                )
        if self.steps not in (None, 1):
            if self.heal is None:
                raise PydanticCustomError("prune_steps", "steps need healing in between; give heal, or remove steps")
            if self.target is None or self.target.bytes is not None:
                message = "steps need a target in sparsity or parameters; give one, or remove steps"
                raise PydanticCustomError("prune_steps", message)
            if self.allocate == "auto":
                message = "allocate: auto chooses a shape for one step; use allocate: even, or remove steps"
                raise PydanticCustomError("prune_steps", message)
        if self.allocate == "auto" and not self.compensate:
            message = "auto compares shapes by a divergence that compensate: false does not measure; use even"
            raise PydanticCustomError("prune_allocate", message)
        return self

    def identity(self) -> dict[str, Any]:
        """The settings that its result hangs on; what it stands for beside itself are stages of their own."""
        return self.model_dump(mode="json", exclude={"heal", "steps", "schedule"})

    @property
    def over(self) -> list[Axis]:
        """The axes that `axes` means."""
        if self.axes is not None:
            return self.axes
        return ["ffn"] if self.shape is None else list(dict.fromkeys(AXIS_OF[key] for key in self.sizes))

    @property
    def sizes(self) -> list[str]:
        """Keys of config.json that `shape` names."""
        shapes = self.shape if isinstance(self.shape, list) else [self.shape]
        return list(dict.fromkeys(key for shape in shapes if shape is not None for key in shape.sizes))

    @property
    def ranking(self) -> Importance:
        """The ranking that `importance` means."""
        return self.importance or "activation"

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        return self.compensate or self.ranking != "magnitude" or bool({"layers", "hidden"} & set(self.over))

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"prune {', '.join(self.over)}"


class PatternStage(StageSpec):
    """Set single weights to zero; shapes stay."""

    kind: Literal["prune"] = Field(description="What the stage does: prune.")
    pattern: Literal["2:4", "4:8", "unstructured"] = Field(
        description="At most 2 of 4 (4 of 8) neighbouring weights are kept, or any that make up the sparsity."
    )
    sparsity: Share | None = Field(
        default=None, description="Share of zeros in every matrix; for unstructured, where null means 0.5."
    )
    method: Literal["sparsegpt", "wanda", "magnitude"] = Field(
        default="sparsegpt",
        description="sparsegpt makes up for each zero in the columns after it; wanda ranks by weight times input; "
        "magnitude by the weight alone.",
    )
    damp: Number = DAMP

    @model_validator(mode="before")
    @classmethod
    def _check_no_axes(cls, value: Any) -> Any:
        if isinstance(value, dict):
            other = [key for key in ("axes", "shape", "target") if key in value]
            if other:
                message = f"{other[0]} removes whole parts and pattern single weights; make them two stages"
                raise PydanticCustomError("pattern", "{message}", {"message": message})
        return value

    @field_validator("sparsity")
    @classmethod
    def _check_sparsity(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("pattern") != "unstructured":
            raise PydanticCustomError("sparsity", "follows from the pattern; remove it, or use pattern: unstructured")
        return value

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        return self.method != "magnitude"

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.pattern}"


def _member(value: object) -> str:
    has = "pattern" in value if isinstance(value, dict) else hasattr(value, "pattern")
    return PatternStage.__name__ if has else PruneStage.__name__


# The tags are the classes' names: messages look up by them which keys a stage may have.
PruneSpec: TypeAlias = Annotated[
    Annotated[PruneStage, Tag("PruneStage")] | Annotated[PatternStage, Tag("PatternStage")], Discriminator(_member)
]
