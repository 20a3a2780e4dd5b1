"""What a quantize stage may say: weights alone, or weights and activations. Never imports torch."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from compress.recipe.gguf import GgufStage
from compress.recipe.types import DAMP, Closed, Number, StageSpec, Text, parse_number, without_overridden
from compress.recipe.weights import WeightStage
from compress.system.extras import torchao_problem

Bits: TypeAlias = Literal[2, 3, 4, 8]
GroupSize: TypeAlias = Literal[-1, 32, 64, 128]


class Override(Closed):
    """What differs for the modules that a glob matches; null keeps the stage's value."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _check_not_empty(self) -> "Override":
        if self.bits is None and self.group_size is None and self.symmetric is None:
            raise PydanticCustomError("empty", "changes nothing; give it bits, group_size or symmetric, or remove it")
        return self


_FORMATS = ("compressed-tensors", "gptq", "gguf")


def _check_format_name(value: object) -> object:
    """A format that is none gets the list of all, gguf too, which has a stage of its own."""
    if value not in _FORMATS:
        raise PydanticCustomError("literal_error", "", {"expected": f"{', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"})
    return value


class WeightOnlyStage(WeightStage):
    """Store the weights of linear layers as small integers with a scale per group of columns."""

    bits: Bits = Field(default=4, description="Width of a weight.")
    group_size: GroupSize = Field(
        default=128, description="Columns that share a scale; -1: the whole row. It must divide the layers' widths."
    )
    symmetric: bool = Field(
        default=True, description="True: zero point fixed in the middle; false: a zero point per group."
    )
    pattern: Literal["2:4", "4:8"] | None = Field(
        default=None,
        description="Keep 2 of every 4 (4 of every 8) neighbouring weights in the layers; the others become exact "
        "zeros in the same pass (SparseGPT). Zeros that a prune stage has made so stay where they are.",
    )
    overrides: dict[Text, Override] = Field(
        default={}, description='Other settings by glob on module names: {"*.down_proj": {bits: 8}}.'
    )
    ignore: list[Text] = Field(default=[], description="Globs of modules to leave in 16 bits.")
    lm_head: bool = Field(default=False, description="Quantize the output head too.")
    embeddings: bool = Field(default=False, description="Quantize the token embeddings too.")
    format: Annotated[Literal["compressed-tensors", "gptq"], BeforeValidator(_check_format_name)] = Field(
        default="compressed-tensors",
        description="Layout on disk. Both open in transformers and vLLM. gguf, for llama.cpp, has settings of its own.",
    )

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("method") == "rtn":
            raise PydanticCustomError(
                "pattern", "needs the inputs, which rtn never sees; remove it or use method: gptq"
            )
        return value

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, value: list[str], info: ValidationInfo) -> list[str]:
        return without_overridden(value, info)

    @field_validator("format")
    @classmethod
    def _check_format(cls, value: str, info: ValidationInfo) -> str:
        if value == "gptq" and info.data.get("embeddings"):
            message = "gptq can't hold quantized embeddings; use compressed-tensors or embeddings: false"
            raise PydanticCustomError("format", message)
        return value

    @property
    def layout(self) -> str:
        """The format by its library's own name."""
        return "pack-quantized" if self.format == "compressed-tensors" else self.format

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.bits}-bit" + (f" {self.pattern}" if self.pattern else "")


class MethodOverride(Closed):
    """How the inputs of the modules that a glob matches are quantized."""

    method: Literal["dynamic", "static"] = Field(description="dynamic or static, as for the stage.")


class WeightActivationStage(StageSpec):
    """Store the weights of linear layers in 8 (or 4) bits, and quantize their inputs to 8 bits as the model runs."""

    last: ClassVar[bool] = True
    act_order: ClassVar[bool] = True  # of columns; no group is torn
    clip: ClassVar[None] = None

    kind: Literal["quantize"] = Field(description="What the stage does: quantize.")
    method: Literal["dynamic", "static", "auto"] = Field(
        description="Scales of the inputs: of each token as the model runs (dynamic), one for all from calibration "
        "text (static), or for each linear the one that its output error allows (auto)."
    )
    dtype: Literal["int8", "fp8"] = Field(default="int8", description="fp8 is e4m3: 4 bits of exponent, 3 of mantissa.")
    bits: Literal[4, 8] = Field(default=8, description="Width of a weight; 4 is for format: torchao.")
    group_size: Literal[-1, 32, 64, 128] | None = Field(
        default=None, description="With bits: 4, columns that share a scale (null means 32); -1: the whole row."
    )
    weight_rounding: Literal["gptq", "rtn"] = Field(
        default="gptq",
        description="gptq compensates each column's rounding error in the columns after it; rtn only rounds.",
    )
    granularity: Literal["channel", "tensor", "block"] = Field(
        default="channel",
        description="Weights that share a scale: an output channel, the matrix, or 128 x 128 (fp8 only).",
    )
    symmetric: bool = Field(default=True, description="Only true: no runtime loads 8-bit weights with zero points.")
    observer: Literal["minmax", "moving_average", "percentile", "mse"] = Field(
        default="minmax",
        description="How a static range is found: the extremes, a moving average of the batches' extremes, the "
        "99.99th percentile, or the range with the least rounding error.",
    )
    smooth: Annotated[Number, Field(ge=0, le=1, allow_inf_nan=False)] | Literal["auto"] | None = Field(
        default=None,
        description="SmoothQuant: large input channels move into the weights, by this power (0 to 1), or by the "
        "power that gives each layer the least output error (auto).",
    )
    kv_cache: Literal["fp8", "fp8_per_head"] | None = Field(
        default=None,
        description="Calibrated scales for an 8-bit cache of keys and values: one of each per layer (fp8), or per "
        "head (fp8_per_head).",
    )
    budget: Number = Field(
        default=0.05,
        ge=0,
        allow_inf_nan=False,
        description="For auto: static is kept where it raises a linear's output error by at most this share.",
    )
    damp: Number = DAMP
    overrides: dict[Text, MethodOverride] = Field(
        default={}, description='Another method by glob on module names: {"*.down_proj": {method: dynamic}}.'
    )
    ignore: list[Text] = Field(default=[], description="Globs of modules to leave in 16 bits.")
    format: Literal["compressed-tensors", "torchao"] = Field(
        default="compressed-tensors",
        description="Layout on disk. compressed-tensors opens in transformers and vLLM; torchao in transformers, which "
        "then computes in int8 on a CPU too (method: dynamic and dtype: int8 only).",
        validate_default=True,
    )

    @field_validator("symmetric")
    @classmethod
    def _check_symmetric(cls, value: bool) -> bool:
        if not value:
            raise PydanticCustomError(
                "symmetric", "no runtime loads 8-bit weights with zero points; remove it, or use method: gptq"
            )
        return value

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("bits") == 8:
            raise PydanticCustomError("group_size", "is for bits: 4; with 8 bits a row shares a scale; remove it")
        return value

    @field_validator("granularity")
    @classmethod
    def _check_granularity(cls, value: str, info: ValidationInfo) -> str:
        if value == "block" and info.data.get("dtype") == "int8":
            raise PydanticCustomError("block", "block is for dtype: fp8; use channel or tensor")
        if value == "block" and info.data.get("method") in ("static", "auto"):
            raise PydanticCustomError("block", "block scales its inputs as the model runs; use method: dynamic")
        return value

    @field_validator("smooth", mode="before")
    @classmethod
    def _check_smooth(cls, value: object) -> object:
        value = parse_number(value)
        if value is not None and value != "auto" and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PydanticCustomError("smooth", "not a power")
        return value

    @field_validator("overrides")
    @classmethod
    def _check_overrides(cls, value: dict[str, MethodOverride], info: ValidationInfo) -> dict[str, MethodOverride]:
        if info.data.get("granularity") == "block" and any(each.method == "static" for each in value.values()):
            raise PydanticCustomError("block", "granularity: block scales its inputs as the model runs; remove static")
        return value

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, value: list[str], info: ValidationInfo) -> list[str]:
        return without_overridden(value, info)

    @field_validator("format")
    @classmethod
    def _check_format(cls, value: str, info: ValidationInfo) -> str:
        has = info.data
        if value != "torchao":
            if has.get("bits") == 4:
                raise PydanticCustomError("format", "bits: 4 with 8-bit inputs needs format: torchao")
            return value
        wanted = {"method": "dynamic", "dtype": "int8", "granularity": "channel", "kv_cache": None}
        odd = next((key for key, allowed in wanted.items() if has.get(key, allowed) != allowed), None)
        if odd is None and any(each.method == "static" for each in has.get("overrides", {}).values()):
            odd = "method"  # of an override
        if odd is not None:
            message = f"torchao holds {odd}: {wanted[odd] or 'null'} only; change {odd}, or use compressed-tensors"
            raise PydanticCustomError("format", "{message}", {"message": message})
        problem = torchao_problem()
        if problem is not None:
            raise PydanticCustomError("format", "{problem}", {"problem": problem})
        return value

    @property
    def layout(self) -> str:
        """The format by its library's own name."""
        if self.format == "torchao":
            return "torchao"
        return "float-quantized" if self.dtype == "fp8" else "int-quantized"

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        static = self.method != "dynamic" or any(each.method == "static" for each in self.overrides.values())
        return static or self.weight_rounding == "gptq" or self.smooth is not None or self.kv_cache is not None

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.dtype}" + (", 4-bit weights" if self.bits == 4 else "")


def _member(value: object) -> str:
    method, form = (
        value.get(key) if isinstance(value, dict) else getattr(value, key, None) for key in ("method", "format")
    )
    if form == "gguf":
        return GgufStage.__name__
    return WeightActivationStage.__name__ if method in ("dynamic", "static", "auto") else WeightOnlyStage.__name__


# The tags are the classes' names: messages look up by them which keys a stage may have.
QuantizeStage: TypeAlias = Annotated[
    Annotated[WeightOnlyStage, Tag("WeightOnlyStage")]
    | Annotated[WeightActivationStage, Tag("WeightActivationStage")]
    | Annotated[GgufStage, Tag("GgufStage")],
    Discriminator(_member),
]
