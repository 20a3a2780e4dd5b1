"""Sizes of a model, as a recipe names them. Never imports torch."""

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Count

Axis: TypeAlias = Literal["ffn", "heads", "hidden", "layers"]

AXIS_OF: dict[str, Axis] = {
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "heads",
    "hidden_size": "hidden",
    "num_hidden_layers": "layers",
}


class Shape(Closed):
    """Sizes of the model afterwards, by their names in config.json; what is left out stays."""

    intermediate_size: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="Channels of an MLP.")
    num_attention_heads: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="Query heads.")
    num_key_value_heads: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="Key-value heads.")
    hidden_size: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="Residual channels.")
    num_hidden_layers: Annotated[Count, Field(ge=1)] | None = Field(default=None, description="Decoder layers.")

    @property
    def sizes(self) -> dict[str, int]:
        """Those that are given."""
        return {key: value for key in AXIS_OF if (value := getattr(self, key)) is not None}

    @model_validator(mode="after")
    def _check_not_empty(self) -> "Shape":
        if not self.sizes:
            raise PydanticCustomError(
                "empty_shape", "says nothing; give it one of {keys}", {"keys": ", ".join(AXIS_OF)}
            )
        return self
