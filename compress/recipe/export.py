"""What a recipe may say of exports: the finished checkpoint for other programs, too. Never imports torch.

`TARGETS` is the one list of them; `dscompress export` goes by it, and compress/runs/exporters.py has what writes each.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Size, Text

To: TypeAlias = Literal["gguf", "onnx", "openvino"]
Type: TypeAlias = Literal["auto", "f32", "bf16", "f16", "q8_0"]
_LONGEST = 200  # bytes of a file's name, to which endings are added


@dataclass(frozen=True)
class Target:
    """A program that checkpoints are written for.

    Args:
        program: its name.
        types: that matrices may have there.
        options: fields of `ExportSpec` beside `type` that mean something to it.
        suffix: of the file that is written; empty where that is a folder, which is called like the target.
    """

    program: str
    types: tuple[str, ...]
    options: tuple[str, ...]
    suffix: str = ""


TARGETS: Mapping[str, Target] = {
    "gguf": Target("llama.cpp", ("auto", "f32", "bf16", "f16", "q8_0"), ("split",), ".gguf"),
    "onnx": Target("ONNX Runtime GenAI", ("auto", "f32"), ("int8_inputs", "python")),
    "openvino": Target("OpenVINO", ("auto", "f32"), ("int8_inputs", "python")),
}


def targets_with(option: str) -> str:
    """The targets to which an option means something, in words."""
    return " or ".join(to for to, target in TARGETS.items() if option in target.options)


class ExportSpec(Closed):
    """The finished checkpoint once more, for another program, beside it in the output."""

    to: To = Field(
        description="gguf: a file for llama.cpp; onnx: a folder for ONNX Runtime GenAI; openvino: one for OpenVINO."
    )
    type: Type = Field(
        default="auto",
        description="Of matrices. auto keeps codes that the program has a place for, and otherwise the checkpoint's "
        "own dtype, for onnx float32.",
    )
    split: Size | None = Field(default=None, description="gguf: most bytes of tensors in a file, such as 4GB.")
    int8_inputs: bool = Field(
        default=False,
        description="onnx, openvino: round the inputs of linears to 8 bits as it runs: faster, and not exact.",
    )
    python: Text | None = Field(
        default=None,
        description="onnx, openvino: interpreter of an environment that has the program; null takes this "
        "environment's, or .venv-ort or .venv-openvino in the current folder or the clone (make clients).",
    )

    @field_validator("type")
    @classmethod
    def _check_type(cls, value: str, info: ValidationInfo) -> str:
        to = info.data.get("to")  # none where that is wrong, which is said
        if to is not None and value not in TARGETS[to].types:
            allowed = {"value": value, "to": to, "types": ", ".join(TARGETS[to].types)}
            raise PydanticCustomError("export_type", "'{value}' is not allowed with to: {to}; use {types}", allowed)
        return value

    @field_validator("split", "int8_inputs", "python")
    @classmethod
    def _check_option(cls, value: object, info: ValidationInfo) -> object:
        to, option = info.data.get("to"), str(info.field_name)
        if to is not None and value not in (None, False) and option not in TARGETS[to].options:
            raise PydanticCustomError(
                "export_option", "is for to: {others}; leave it out", {"others": targets_with(option)}
            )
        return value

    @property
    def target(self) -> Target:
        """The program."""
        return TARGETS[self.to]

    def file_name(self, stem: str) -> str:
        """The name of the file that is written: STEM.gguf, STEM-Q8_0.gguf; or of the folder: onnx, openvino."""
        if not self.target.suffix:
            return self.to
        return f"{stem}{'' if self.type == 'auto' else f'-{self.type.upper()}'}{self.target.suffix}"


def _parse_name(value: object) -> object:
    """A name alone takes the defaults."""
    return {"to": value} if isinstance(value, str) else value


Export: TypeAlias = Annotated[ExportSpec, BeforeValidator(_parse_name, json_schema_input_type=To | ExportSpec)]


def stem_of(name: str) -> str:
    """A recipe's name as the beginning of a file's."""
    plain = re.sub(r"[^\w.,=+-]+", "-", name).strip("-.")
    return plain.encode()[:_LONGEST].decode(errors="ignore") or "model"
