"""What a quantize stage may say whose result is a .gguf file. Never imports torch."""

from typing import Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Text, without_overridden
from compress.recipe.weights import WeightStage

# As llama.cpp calls them: types, and mixes of them.
Mixture: TypeAlias = Literal[
    "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "iq4_nl", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s",
    "q5_k_m", "q6_k", "q8_0",
]  # fmt: skip
Block: TypeAlias = Literal[
    "q2_k", "q3_k", "q4_0", "q4_1", "iq4_nl", "q4_k", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0"
]  # fmt: skip


class BlockOverride(Closed):
    """Another block type for the modules that a glob matches."""

    type: Block = Field(description="A block type of ggml, such as q6_k.")


class GgufStage(WeightStage):
    """Store all matrices in llama.cpp's block types, their codes solved on its grids, and write a .gguf file."""

    format: Literal["gguf"] = Field(description="gguf: one file for llama.cpp and what is built on it.")
    type: Mixture = Field(
        default="q4_k_m",
        description="A mix of block types or a type, by llama.cpp's name; embeddings and head included.",
    )
    overrides: dict[Text, BlockOverride] = Field(
        default={}, description='Other block types by glob on module names: {"*.down_proj": {type: q6_k}}.'
    )
    ignore: list[Text] = Field(default=[], description="Globs of modules to leave in 16 bits.")

    @field_validator("clip")
    @classmethod
    def _check_range(cls, value: str | None) -> str | None:
        if value == "none":
            message = "gguf has no grid without a search for its scales; use mse, hessian or null"
            raise PydanticCustomError("clip", message)
        return value

    @field_validator("ignore")
    @classmethod
    def _check_ignore(cls, value: list[str], info: ValidationInfo) -> list[str]:
        return without_overridden(value, info)

    @property
    def layout(self) -> str:
        """The format by its library's own name."""
        return self.format

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.type}"
