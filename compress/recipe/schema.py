"""The recipe: what one YAML file may say. Closed: a key that is not here is an error, never ignored.

This module is the schema alone, and it never imports torch: `dscompress validate` and `--help` answer at once.
Reading YAML, `--set`, paths and the wording of problems are in `load.py` and the two modules below it.

Left out on purpose: templating, includes and environment variables inside recipes. A recipe is read by people
and diffed; `--set` and `dscompress sweep` are where values vary.
"""

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from compress.recipe.export import Export, stem_of
from compress.recipe.gguf import GgufStage
from compress.recipe.sweep import Sweep
from compress.recipe.text import CalibrationSpec
from compress.recipe.train import TrackerName
from compress.recipe.types import Closed, Count, StageSpec, Text
from compress.stages import KINDS


def _parse_switch(value: object) -> object:
    """`evaluate: false` is null and `evaluate: true` the defaults; so is it for `serve`."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


PROSE, CHATS = "wikitext2", "chat_en"  # bundled texts


class EvaluateSpec(Closed):
    """How base and compressed model are compared."""

    text: (
        Annotated[
            Annotated[Text, Tag("name or path")] | Annotated[list[Text], Field(min_length=1), Tag("several")],
            Discriminator(lambda value: "several" if isinstance(value, list) else "name or path"),
        ]
        | None
    ) = Field(
        default=None,
        description="Text to measure on: a spec under calibration/, a path to one, or a path to a text or jsonl file; "
        "or several, the first of which gives the headline. Null takes wikitext2, and chat_en too for a model with a "
        "chat template.",
    )
    sequence_length: Annotated[Count, Field(ge=2)] | None = Field(
        default=None,
        description="Tokens per window; null takes 2048, or all positions of a model that has fewer. Figures of two "
        "lengths are never comparable.",
    )
    windows: Count | None = Field(default=64, ge=1, description="Number of windows; null takes the whole text.")
    prompts: list[Text] | None = Field(
        default=None,
        description="Prompts whose continuations by both models the report shows; null takes three general ones.",
    )
    tasks: list[Text] | None = Field(
        default=None,
        min_length=1,
        description="Benchmark tasks or groups of lm-eval, such as [arc_easy, hellaswag], that both models do.",
    )
    task_files: Text | None = Field(
        default=None, description="Folder of lm-eval task files of yours, which go before lm-eval's own."
    )
    limit: Count | None = Field(default=None, ge=1, description="Items of each task; null takes all.")
    fewshot: Count | None = Field(
        default=None, ge=0, description="Examples before each item of a task; null takes the task's own number."
    )
    chat: bool = Field(default=False, description="Word the prompts of tasks by the model's chat template.")

    @field_validator("task_files", "limit", "fewshot", "chat")
    @classmethod
    def _check_needed(cls, value: object, info: ValidationInfo) -> object:
        if value not in (None, False) and "tasks" in info.data and info.data["tasks"] is None:
            raise PydanticCustomError(
                "tasks", "is for tasks, and there are none; add tasks: [arc_easy, ...] or remove it"
            )
        return value

    def texts(self, chats: bool) -> list[str]:
        """What is measured on; `chats`: the model has a chat template."""
        if self.text is None:
            return [PROSE, CHATS] if chats else [PROSE]
        return [self.text] if isinstance(self.text, str) else self.text


class ServeSpec(Closed):
    """A serving engine that opens the finished checkpoint, and says what our reader says."""

    python: Text | None = Field(
        default=None,
        description="Interpreter of an environment that has vLLM; null takes this environment's vLLM, or .venv-vllm in "
        "the current folder or the clone (make clients).",
    )


def _kind(value: object) -> object:
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


def _check_kind(value: object) -> object:
    """A kind that is none gets the list of all: no stage's own schema knows it."""
    if isinstance(value, dict) and not (isinstance(kind := value.get("kind"), str) and kind in KINDS):
        raise PydanticCustomError(
            "stage_kind", "{kinds}", {"kinds": f"{', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]}"}
        )
    return value


if TYPE_CHECKING:
    Stage: TypeAlias = StageSpec
else:  # a union of what the kinds may say; pydantic wants no discriminator where there is one
    _members = [Annotated[kind.load_spec(), Tag(name)] for name, kind in KINDS.items()]
    _union = Annotated[reduce(or_, _members), Discriminator(_kind)] if _members[1:] else _members[0]
    Stage = Annotated[_union, BeforeValidator(_check_kind)]


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
    serve: Annotated[ServeSpec | None, BeforeValidator(_parse_switch)] = Field(
        default=None,
        description="Open the result in a real vLLM, compare it with our reader, and time it beside its base; true "
        "takes the vLLM that is found, false or null skips it.",
    )
    export: list[Export] = Field(
        default=[],
        description="Other programs to write the result for, beside the checkpoint: gguf, onnx, openvino, or a mapping "
        "with to.",
    )
    tracker: TrackerName | None = Field(
        default=None,
        description="Also log the report's figures there at the end, as one run by the recipe's name, and the steps of "
        "stages that train, as a run each; if it is installed.",
    )
    sweep: Sweep | None = Field(
        default=None, description="Values to vary, for `dscompress sweep`: one result for each, and what each costs."
    )
    output: Text = Field(description="Folder of the finished checkpoint and its report, such as outputs/my_model.")

    def shown(self) -> dict[str, Any]:
        """What was given, without defaults, as JSON can hold it."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @field_validator("stages")
    @classmethod
    def _check_order(cls, value: list[Stage]) -> list[Stage]:
        for stage in value[:-1]:
            if stage.last:
                message = "{kind} comes once, as the last stage; remove or move the others"
                raise PydanticCustomError("order", message, {"kind": stage.kind})
        return value

    @field_validator("export")
    @classmethod
    def _check_exports(cls, value: list[Export], info: ValidationInfo) -> list[Export]:
        if value and getattr(info.data.get("stages", [None])[-1], "format", None) == "gguf":
            raise PydanticCustomError(
                "contradiction",
                "is for a checkpoint, and the last stage (format: gguf) leaves a .gguf file alone; remove one of the "
                "two, or run dscompress export on the model that it starts from",
            )
        names = [each.file_name(stem_of(info.data.get("name", ""))) for each in value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise PydanticCustomError("twice", "two would be called {name}; keep one", {"name": twice[0]})
        return value

    @property
    def writes_gguf(self) -> bool:
        """Whether the result is a .gguf file, or parts of one."""
        return isinstance(self.stages[-1], GgufStage)


def bundled_dir(kind: Literal["recipes", "calibration"]) -> Path:
    """Folder of what comes with dscompress: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parent.parent
    installed = package / kind
    return installed if installed.is_dir() else package.parent / kind


def json_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe as it may be written, for editors that complete and check YAML."""
    schema = Recipe.model_json_schema()
    for switch in ("evaluate", "serve"):
        schema["properties"][switch]["anyOf"].append({"type": "boolean"})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
