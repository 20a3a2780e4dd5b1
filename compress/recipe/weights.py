"""What stages that store weights alone in few bits have in common. Never imports torch."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import DAMP, Number, StageSpec

_METHODS = ("gptq", "rtn", "dynamic", "static", "auto")


def _check_method(value: object) -> object:
    """A method that is none gets the list of all: no union member alone knows it."""
    if value not in _METHODS:
        raise PydanticCustomError("literal_error", "", {"expected": f"{', '.join(_METHODS[:-1])} or {_METHODS[-1]}"})
    return value


class WeightStage(StageSpec):
    """How weights are rounded, whatever the grid."""

    last: ClassVar[bool] = True

    kind: Literal["quantize"] = Field(description="What the stage does: quantize.")
    method: Annotated[Literal["gptq", "rtn"], BeforeValidator(_check_method)] = Field(
        default="gptq",
        description="gptq compensates each column's rounding error in the columns after it; rtn only rounds.",
    )
    act_order: bool = Field(
        default=True,
        description="Quantize the columns with the largest inputs first (loaders see no difference); with a pattern, "
        "columns stay in their order.",
    )
    damp: Number = DAMP
    clip: Literal["none", "mse", "hessian"] | None = Field(
        default=None,
        description="How ranges are narrowed: not at all, for the least weight error (what null means for rtn), "
        "or for the least output error (what null means for gptq).",
    )
    drift_correction: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="Share of what earlier quantized layers have changed that a matrix's weights are moved to make "
        "good before they are rounded (null means 0.5 for gptq); 0 saves a forward pass of the original model.",
    )
    reference: Literal["parent", "base"] = Field(
        default="parent",
        description="Whose outputs the correction aims at: those of the model that this stage gets (parent), or of the "
        "recipe's own, before it was pruned (base).",
    )

    @field_validator("clip")
    @classmethod
    def _check_clip(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "hessian" and info.data.get("method") == "rtn":
            raise PydanticCustomError("clip", "needs the inputs, which rtn never sees; use mse, none or method: gptq")
        return value

    @field_validator("drift_correction")
    @classmethod
    def _check_correction(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value and info.data.get("method") == "rtn":
            raise PydanticCustomError("drift", "needs the inputs, which rtn never sees; remove it or use method: gptq")
        return value

    @field_validator("reference")
    @classmethod
    def _check_reference(cls, value: str, info: ValidationInfo) -> str:
        if value == "base" and (info.data.get("method") == "rtn" or info.data.get("drift_correction") == 0):
            raise PydanticCustomError("reference", "is what drift_correction aims at, which is off; remove one of them")
        return value

    @property
    def correction(self) -> float:
        """The share that `drift_correction` means."""
        default = 0.5 if self.method == "gptq" else 0.0
        return default if self.drift_correction is None else self.drift_correction

    @property
    def weight_rounding(self) -> Literal["gptq", "rtn"]:
        """How weights are rounded."""
        return self.method

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        return self.method == "gptq"
