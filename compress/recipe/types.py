"""What the models of a recipe are made of: closed models, counts such as 20M, sizes such as 4GB, numbers, plain text.

Never imports torch.
"""

import re
from decimal import Decimal
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from compress.system.units import parse_size

_COUNT = r"([+-]?[0-9][0-9_]*(?:\.[0-9]+)?(?:[eE]\+?[0-9]{1,3})?) ?([kKmMbB]?)"
_MULTIPLES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_LARGEST_COUNT = 10**18


def parse_count(value: object) -> int:
    """A whole number as people write it: 128, 1_000, 64k (64 000), 20M, 1.5B, 1e6.

    Raises:
        PydanticCustomError: `value` is not such a number (validation reports it with its line).
    """
    match = None if isinstance(value, bool) else re.fullmatch(_COUNT, str(value).strip())
    if match:
        number = Decimal(match[1].replace("_", "")) * _MULTIPLES[match[2].lower()]
        if number == number.to_integral_value() and abs(number) <= _LARGEST_COUNT:
            return int(number)
    raise PydanticCustomError("count", "not a whole number")


def parse_number(value: object) -> object:
    """Floats that YAML 1.1 reads as text (`1e-4` has no dot) become numbers; the rest is left to pydantic."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _parse_bytes(value: object) -> int:
    size = None if isinstance(value, bool) else parse_size(str(value))
    if not size:
        raise PydanticCustomError("size", "not a size")
    return size


def _without_nul(text: str) -> str:
    if "\0" in text:
        raise PydanticCustomError("nul", "holds a NUL character, which no name or path can have; remove it")
    return text


Count: TypeAlias = Annotated[
    int,
    BeforeValidator(parse_count),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": f"^{_COUNT}$"}]}),
]
Size: TypeAlias = Annotated[
    int, BeforeValidator(_parse_bytes), WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string"}]})
]
Number: TypeAlias = Annotated[float, BeforeValidator(parse_number)]
Text: TypeAlias = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True), AfterValidator(_without_nul)]
DAMP: Any = Field(
    default=0.01,
    gt=0,
    le=1,
    allow_inf_nan=False,
    description="Fraction of the Hessian's mean diagonal that is added to its diagonal.",
)


class Closed(BaseModel):
    """A model whose keys are all known; a key that is not is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StageSpec(Closed):
    """What every stage of a recipe has, whatever its kind."""

    last: ClassVar[bool] = False  # whether no stage may follow

    kind: str

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The stage in a few words."""
        raise NotImplementedError

    @property
    def starts_from(self) -> str | None:
        """Another model that the stage works on, as the recipe calls it; None: what the stage before has made."""
        return None

    def identity(self) -> dict[str, Any]:
        """The settings that its result hangs on, as JSON can hold them."""
        return self.model_dump(mode="json")


def without_overridden(ignore: list[str], info: ValidationInfo) -> list[str]:
    """A stage's `ignore`, none of whose globs is in its `overrides` too."""
    both = [glob for glob in ignore if glob in info.data.get("overrides", {})]
    if both:
        message = "holds {globs}, which overrides has too; keep one of the two"
        raise PydanticCustomError("contradiction", message, {"globs": ", ".join(both)})
    return ignore
