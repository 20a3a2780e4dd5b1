"""Text that a recipe names: what a model is calibrated on, and what it is trained on. Never imports torch."""

import re
from typing import Annotated

from pydantic import Field, StringConstraints, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Count, Number, Text

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
DEFAULT_LENGTH = 2048


def is_local_source(source: str) -> bool:
    """Whether a calibration source names a file here (by its suffix or a leading . / ~), not a hub dataset."""
    return source.lower().removesuffix(".gz").endswith(LOCAL_SUFFIXES) or source.startswith((".", "/", "~"))


class SourceSpec(Closed):
    """Where a text comes from, and how it becomes sequences of tokens."""

    name: Text | None = Field(
        default=None, description="What reports call this text; a spec file's own name when left out."
    )
    source: Text = Field(
        description="A hub dataset (allenai/c4) or a local .jsonl, .json, .parquet or .txt file, each also .gz."
    )
    licence: Text | None = Field(default=None, description="The text's licence, copied into reports.")
    license: Text | None = Field(default=None, description="The same as licence.")
    sha256: Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True)] | None = Field(
        default=None, description="Checksum of the local file's bytes; a file with another one is refused."
    )
    sequence_length: Annotated[Count, Field(ge=2)] | None = Field(
        default=None,
        description="Tokens per sequence; documents are packed, never padded. Null takes 2048, or all positions of a "
        "model that has fewer.",
    )
    seed: Count = Field(default=0, ge=0, description="Seed of the sampling.")
    split: Text = Field(default="train", description="Split of a hub dataset.")
    subset: Text | None = Field(default=None, description="Configuration of a hub dataset, such as `en`.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    field: Text | None = Field(
        default=None,
        description="Column that holds the text or chats; left out, the first of `text`, `content`, `messages` and "
        "`conversations` that is filled, or else question and answer (prompt and completion, instruction and output).",
    )

    @field_validator("license")
    @classmethod
    def _check_license(cls, value: str | None, info: ValidationInfo) -> str | None:
        other = info.data.get("licence")
        if None not in (value, other) and value != other:
            message = "is {value} and licence is {other}; keep one"
            raise PydanticCustomError("license", message, {"value": repr(value), "other": repr(other)})
        return value

    @property
    def length(self) -> int:
        """Tokens per sequence for a model with positions enough."""
        return DEFAULT_LENGTH if self.sequence_length is None else self.sequence_length

    @field_validator("sha256")
    @classmethod
    def _check_sha256(cls, value: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source")
        if value is not None and not re.fullmatch("[0-9a-f]{64}", value):
            raise PydanticCustomError("sha256", "not a checksum")
        if value is not None and source is not None and not is_local_source(source):
            raise PydanticCustomError("hub", "is for a local file; pin a hub dataset with revision instead")
        return value

    @field_validator("split", "subset", "revision")
    @classmethod
    def _check_hub_only(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value not in (None, "train") and is_local_source(info.data.get("source", "")):
            raise PydanticCustomError("local", "is for a hub dataset and source is a local file; remove it")
        return value


class CalibrationSpec(SourceSpec):
    """Text that a model is run on: `samples` sequences of `sequence_length` tokens."""

    samples: Count = Field(default=128, ge=1, description="Number of sequences.")


class TrainingText(SourceSpec):
    """Text that a model is trained on; its source may be a folder of files too."""

    samples: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Most sequences to use; null takes as many as the stage's tokens need."
    )
    weight: Number = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Its share of the tokens, beside other texts' weights."
    )
