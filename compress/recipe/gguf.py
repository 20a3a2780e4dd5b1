"""What a quantize stage may say whose result is a .gguf file. Never imports torch."""

from typing import Any, Literal, TypeAlias

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Size, Text, without_overridden
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

    format: Literal["gguf"] = Field(description="gguf: a file for llama.cpp and what is built on it.")
    type: Mixture = Field(
        default="q4_k_m",
        description="A mix of block types or a type, by llama.cpp's name; embeddings and head included.",
    )
    overrides: dict[Text, BlockOverride] = Field(
        default={}, description='Other block types by glob on module names: {"*.down_proj": {type: q6_k}}.'
    )
    ignore: list[Text] = Field(default=[], description="Globs of modules to leave in 16 bits.")
    imatrix: bool = Field(
        default=False,
        description="Also write the importance matrix of the calibration text, NAME.imatrix.gguf, for llama.cpp's "
        "llama-quantize --imatrix: sums over the tokens of the squared inputs of each linear in the layers, in the "
        "model that this stage gets.",
    )
    split: Size | None = Field(
        default=None,
        description="Most bytes of tensors in a file, such as 4GB; a larger model becomes parts, "
        "NAME-00001-of-00003.gguf and so on, of which programs are given the first.",
    )

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

    @field_validator("imatrix")
    @classmethod
    def _check_summed(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("method") == "rtn":
            raise PydanticCustomError("imatrix", "needs the inputs, which rtn never sees; use method: gptq")
        if value and info.data.get("drift_correction") == 0:
            raise PydanticCustomError(
                "imatrix", "is summed in the pass of the original model that drift_correction: 0 saves; remove one"
            )
        if value and info.data.get("reference") == "base":
            raise PydanticCustomError(
                "imatrix", "is of the model that this stage gets, and reference: base runs another one; remove one"
            )
        return value

    def identity(self) -> dict[str, Any]:
        """As of every stage, whatever files its result is written to; `imatrix` counts where it is true."""
        return self.model_dump(mode="json", exclude={"split"} if self.imatrix else {"split", "imatrix"})

    @property
    def layout(self) -> str:
        """The format by its library's own name."""
        return self.format

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.type}"
