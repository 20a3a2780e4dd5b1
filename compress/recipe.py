"""The recipe: what one YAML file may say. Closed: a key that is not here is an error, never ignored.

This module is the schema alone, and it never imports torch: `dscompress validate` and `--help` answer at once.
Reading YAML, `--set`, paths and the wording of problems are in `recipe_yaml.py` and the two modules below it.

Left out on purpose: templating, includes and environment variables inside recipes. A recipe is read by people
and diffed; `--set` and `dscompress sweep` are where values vary.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from compress.recipe_eight_bit import EightBitStage
from compress.recipe_types import DAMP, Closed, Count, Number, Text, without_overridden

LOCAL_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")


def _parse_switch(value: object) -> object:
    """`evaluate: false` is null and `evaluate: true` the defaults."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


Bits: TypeAlias = Literal[2, 3, 4, 8]
GroupSize: TypeAlias = Literal[-1, 32, 64, 128]


def is_local_source(source: str) -> bool:
    """Whether a calibration source names a file here (by its suffix or a leading . / ~), not a hub dataset."""
    return source.lower().removesuffix(".gz").endswith(LOCAL_SUFFIXES) or source.startswith((".", "/", "~"))


class CalibrationSpec(Closed):
    """Text that a model is run on, and how it is sampled: `samples` sequences of `sequence_length` tokens."""

    name: Text | None = Field(
        default=None, description="What reports call this text; a spec file's own name when left out."
    )
    source: Text = Field(
        description="A hub dataset (allenai/c4) or a local .jsonl, .json, .parquet or .txt file, each also .gz."
    )
    licence: Text | None = Field(default=None, description="The text's licence, copied into reports.")
    sha256: Annotated[str, StringConstraints(strip_whitespace=True, to_lower=True)] | None = Field(
        default=None, description="Checksum of the local file's bytes; a file with another one is refused."
    )
    samples: Count = Field(default=128, ge=1, description="Number of sequences.")
    sequence_length: Count = Field(
        default=2048, ge=2, description="Tokens per sequence; documents are packed, never padded."
    )
    seed: Count = Field(default=0, ge=0, description="Seed of the sampling.")
    split: Text = Field(default="train", description="Split of a hub dataset.")
    subset: Text | None = Field(default=None, description="Configuration of a hub dataset, such as `en`.")
    revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub dataset.")
    field: Text | None = Field(
        default=None,
        description="Column that holds the text; left out: `text`, else the chats in `messages` or `conversations`.",
    )

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


class EvaluateSpec(Closed):
    """How base and compressed model are compared."""

    text: Text = Field(
        default="wikitext2",
        description="Text to measure on: a spec under calibration/, a path to one, or a path to a text or jsonl file.",
    )
    sequence_length: Count = Field(
        default=2048, ge=2, description="Tokens per window. Figures of two lengths are never comparable."
    )
    windows: Count | None = Field(default=64, ge=1, description="Number of windows; null takes the whole text.")
    prompts: list[Text] | None = Field(
        default=None,
        description="Prompts whose continuations by both models the report shows; null takes three general ones.",
    )


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


_METHODS = ("gptq", "rtn", "dynamic", "static", "auto")


def _check_method(value: object) -> object:
    """A method that is none gets the list of all: no union member alone knows it."""
    if value not in _METHODS:
        raise PydanticCustomError("literal_error", "", {"expected": f"{', '.join(_METHODS[:-1])} or {_METHODS[-1]}"})
    return value


class QuantizeStage(Closed):
    """Store the weights of linear layers as small integers with a scale per group of columns."""

    kind: Literal["quantize"] = Field(description="What the stage does: quantize.")
    method: Annotated[Literal["gptq", "rtn"], BeforeValidator(_check_method)] = Field(
        default="gptq",
        description="gptq compensates each column's rounding error in the columns after it; rtn only rounds.",
    )
    bits: Bits = Field(default=4, description="Width of a weight.")
    group_size: GroupSize = Field(
        default=128, description="Columns that share a scale; -1: the whole row. It must divide the layers' widths."
    )
    symmetric: bool = Field(
        default=True, description="True: zero point fixed in the middle; false: a zero point per group."
    )
    act_order: bool = Field(
        default=True,
        description="Quantize the columns with the largest inputs first (loaders see no difference).",
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
    overrides: dict[Text, Override] = Field(
        default={}, description='Other settings by glob on module names: {"*.down_proj": {bits: 8}}.'
    )
    ignore: list[Text] = Field(default=[], description="Globs of modules to leave in 16 bits.")
    lm_head: bool = Field(default=False, description="Quantize the output head too.")
    embeddings: bool = Field(default=False, description="Quantize the token embeddings too.")
    format: Literal["compressed-tensors", "gptq"] = Field(
        default="compressed-tensors", description="Layout on disk. Both open in transformers and vLLM."
    )

    @field_validator("clip")
    @classmethod
    def _check_clip(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value == "hessian" and info.data.get("method") == "rtn":
            raise PydanticCustomError("clip", "needs the inputs, which rtn never sees; use mse, none or method: gptq")
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

    @field_validator("drift_correction")
    @classmethod
    def _check_correction(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value and info.data.get("method") == "rtn":
            raise PydanticCustomError("drift", "needs the inputs, which rtn never sees; remove it or use method: gptq")
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

    @property
    def layout(self) -> str:
        """The format by the name that compress/export/formats.py gives it."""
        return self.format

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"{self.method} {self.bits}-bit"


def _member(value: object) -> str:
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    return EightBitStage.__name__ if method in ("dynamic", "static", "auto") else QuantizeStage.__name__


# The tags are the classes' names: messages look up by them which keys a stage may have.
Stage: TypeAlias = Annotated[
    Annotated[QuantizeStage, Tag("QuantizeStage")] | Annotated[EightBitStage, Tag("EightBitStage")],
    Discriminator(_member),
]


class Recipe(Closed):
    """One compression job, from a model to a checkpoint with a report."""

    name: Text = Field(description="What reports call this job.")
    model: Text = Field(
        description="A hub id (org/name), a folder, a .gguf file, or package:NAME/FILE.gguf of an installed package."
    )
    revision: Text | None = Field(default=None, description="Branch, tag or commit of a hub model.")
    trust_remote_code: bool = Field(
        default=False,
        description="Allow code that comes with the model to run. Only for models whose code you have read.",
    )
    calibration: Annotated[
        Annotated[Text, Tag("name or path")] | Annotated[CalibrationSpec, Tag("inline spec")],
        Discriminator(lambda value: "inline spec" if isinstance(value, dict | CalibrationSpec) else "name or path"),
    ] = Field(
        default="general_en",
        description="Text that the layers are calibrated on: a spec under calibration/, a path to one, or one inline.",
    )
    stages: list[Stage] = Field(
        min_length=1,
        description="What to do, in order; each item is a mapping with its kind, such as {kind: quantize, bits: 4}.",
    )
    evaluate: Annotated[EvaluateSpec | None, BeforeValidator(_parse_switch)] = Field(
        default=EvaluateSpec(), description="How the result is measured; false or null skips it."
    )
    output: Text = Field(description="Folder of the finished checkpoint and its report, such as outputs/my_model.")

    @field_validator("stages")
    @classmethod
    def _check_order(cls, value: list[Stage]) -> list[Stage]:
        if any(stage.kind == "quantize" for stage in value[:-1]):
            message = "quantize comes once, as the last stage; remove or move the others"
            raise PydanticCustomError("order", message)
        return value


def bundled_dir(kind: Literal["recipes", "calibration"]) -> Path:
    """Folder of what comes with dscompress: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / kind
    return installed if installed.is_dir() else package.parent / kind


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe as it may be written, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    schema["properties"]["evaluate"]["anyOf"].append({"type": "boolean"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
