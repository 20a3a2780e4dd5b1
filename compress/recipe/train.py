"""What stages that train may say: finetune, distill, and the healing inside of prune. Never imports torch."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from compress.recipe.shape import Shape
from compress.recipe.text import TrainingText
from compress.recipe.types import Closed, Count, Number, StageSpec, Text

BASE = "base"

_NamedOrInline: TypeAlias = Annotated[
    Annotated[Text, Tag("name or path")] | Annotated[TrainingText, Tag("inline spec")],
    Discriminator(lambda value: "inline spec" if isinstance(value, dict | TrainingText) else "name or path"),
]
Data: TypeAlias = Annotated[
    Annotated[Text, Tag("name or path")]
    | Annotated[TrainingText, Tag("inline spec")]
    | Annotated[list[_NamedOrInline], Field(min_length=1), Tag("several")],
    Discriminator(
        lambda value: (
            "several"
            if isinstance(value, list)
            else "inline spec"
            if isinstance(value, dict | TrainingText)
            else "name or path"
        )
    ),
]
Weight: TypeAlias = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
TrackerName: TypeAlias = Literal["tensorboard", "trackio", "wandb"]


# What is known by its content instead, and what changes how work is done but not what comes out.
_NOT_IDENTITY = {"teacher", "student", "micro_batch", "checkpoint_activations", "compile", "save_every", "tracker"}


class Lora(Closed):
    """Train low-rank additions to linears instead of the weights themselves, and merge them at the end."""

    rank: Count = Field(default=16, ge=1, description="Rank of the additions.")
    alpha: Number | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Their factor is alpha / rank; null means 2 x rank."
    )
    targets: list[Text] | None = Field(
        default=None, min_length=1, description="Linears, by the end of their names; null means all in the layers."
    )

    def takes(self, linear: str) -> bool:
        """Whether a linear of the layers gets an addition."""
        return self.targets is None or any(linear.endswith(f".{target}") for target in self.targets)


class TrainSettings(Closed):
    """How a model is trained, whatever for."""

    data: Data | None = Field(
        default=None,
        description="Text to train on: a spec under calibration/, a path to one, one inline, or a list of those, each "
        "with a weight. Null takes the recipe's calibration text.",
    )
    tokens: Count = Field(default=20_000_000, ge=1, description="Tokens to train on, repeats counted: 20M, 1B.")
    exhausted: Literal["wrap", "stop"] = Field(
        default="wrap",
        description="Where a text has fewer tokens: go through it again (wrap; said, with the number of passes), or "
        "train on what there is (stop).",
    )
    after: Count = Field(
        default=0,
        ge=0,
        description="Tokens of the text to pass over first: what an earlier stage with the same seed was trained on.",
    )
    assistant_only: bool = Field(
        default=False, description="In conversations, learn only what the assistant says; needs a chat template."
    )
    learning_rate: Annotated[Number, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Peak of the cosine; null chooses by what is trained."
    )
    warm_up: Number = Field(default=0.05, ge=0, le=1, description="Share of the steps in which the rate rises.")
    weight_decay: Number = Field(default=0.0, ge=0, allow_inf_nan=False, description="AdamW's, on matrices alone.")
    clip: Number = Field(default=1.0, gt=0, description="Largest norm of the gradient.")
    batch_size: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Sequences per step, over all processes; null means about 32k tokens."
    )
    micro_batch: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Sequences per forward pass of a process; null takes what fits the memory."
    )
    optimizer: Literal["auto", "adamw", "adamw8bit"] = Field(
        default="auto", description="adamw8bit keeps its moments in 8 bits (torchao); auto takes it where memory asks."
    )
    checkpoint_activations: bool | None = Field(
        default=None, description="Compute each layer again in the backward pass; null: where memory asks for it."
    )
    compile: bool | None = Field(
        default=None,
        description="Compile each layer (torch.compile); null: on a GPU, where training takes longer than ten minutes.",
    )
    lora: Lora | None = Field(default=None, description="Train low-rank additions; {} takes rank 16.")
    train: list[Text] | None = Field(
        default=None, min_length=1, description='Globs of the parameters to train, such as ["*norm*"]; null is all.'
    )
    held_out: Count = Field(default=16, ge=0, description="Sequences that are kept out and measured on the way.")
    evaluate_every: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Steps between two measurements on them; null makes about ten."
    )
    patience: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Stop after so many measurements without a better one; null never does."
    )
    save_every: Annotated[Count, Field(ge=1)] | None = Field(
        default=None, description="Steps between two states on disk; null saves about every five minutes."
    )
    tracker: TrackerName | None = Field(
        default=None,
        description="Also log each step there, if it is installed; null takes the recipe's. The JSON lines are always "
        "written.",
    )
    seed: Count = Field(default=0, ge=0, description="Of the order of the text, beside the text's own.")

    @model_validator(mode="after")
    def _check_trained(self) -> "TrainSettings":
        if self.lora is not None and self.train is not None:
            raise PydanticCustomError("lora", "lora and train both say what is trained; keep one")
        if self.patience is not None and not self.held_out:
            raise PydanticCustomError("patience", "patience needs sequences to measure on; use held_out: 16")
        return self


class _Taught(Closed):
    """Where a teacher's predictions come from."""

    teacher: Text = Field(
        default=BASE, description="Whose predictions are learned: base (the recipe's model), a folder, or a hub id."
    )
    targets: Literal["online", "cached"] = Field(
        default="online",
        description="Ask the teacher at each step, or once: `draws` samples of its prediction for each token, kept in "
        "the work folder for later passes and other runs.",
    )
    draws: Count = Field(default=64, ge=1, le=255, description="Samples for each token, where targets are cached.")


class Heal(TrainSettings, _Taught):
    """Training behind a prune stage, or behind each of its steps."""

    loss: Literal["kl", "ce"] = Field(
        default="kl", description="kl: the divergence from the teacher. ce: the text's own tokens."
    )

    @model_validator(mode="after")
    def _check_loss(self) -> "Heal":
        _check_teaching(self, self.loss == "ce")
        return self


def _check_teaching(spec: _Taught, alone: bool) -> None:
    taught = [key for key in _Taught.model_fields if key in spec.model_fields_set]
    if alone and taught:
        raise PydanticCustomError("teacher", "{key} is for a loss that has a teacher; remove it", {"key": taught[0]})


class FinetuneStage(StageSpec, TrainSettings, _Taught):
    """Train a model on text, or towards another model's predictions."""

    kind: Literal["finetune"] = Field(description="What the stage does: finetune.")
    loss: Literal["kl", "ce"] = Field(
        default="ce", description="ce: the text's own tokens. kl: the divergence from the teacher."
    )

    @model_validator(mode="after")
    def _check_loss(self) -> "FinetuneStage":
        _check_teaching(self, self.loss == "ce")
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        return False

    def identity(self) -> dict[str, Any]:
        """The settings that its result hangs on; texts and models are known by their content."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | {"data"})

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"finetune ({self.loss})"


class Losses(Closed):
    """Weights of what is minimised; each is in nats per token, hidden a relative squared error."""

    kl: Weight = Field(default=0.0, description="Forward KL, KL(teacher || student).")
    reverse_kl: Weight = Field(default=0.0, description="Reverse KL, KL(student || teacher).")
    jsd: Weight = Field(default=0.0, description="Generalised Jensen-Shannon divergence with `beta`.")
    ce: Weight = Field(default=0.0, description="Cross-entropy of the text's own tokens.")
    hidden: Weight = Field(default=0.0, description="Hidden states of the layers in `hidden_layers`.")

    @model_validator(mode="after")
    def _check_any(self) -> "Losses":
        if not any(getattr(self, name) for name in Losses.model_fields):
            raise PydanticCustomError("losses", "has no weight above 0; use {{kl: 1.0}}")
        return self

    @property
    def used(self) -> list[str]:
        """Names of those with a weight."""
        return [name for name in Losses.model_fields if getattr(self, name)]


def _layer_map(value: object) -> object:
    """Layer numbers are keys, which YAML may hold as text."""
    if not isinstance(value, dict):
        return value
    keys = [int(key) if isinstance(key, str) and key.isdecimal() else key for key in value]
    return dict(zip(keys, value.values(), strict=True))


class DistillShape(Shape):
    """Sizes of the student."""

    tie_word_embeddings: Literal[True] | None = Field(
        default=None, description="true: the student's head is its embeddings, whatever the teacher's is."
    )

    @model_validator(mode="after")
    def _check_not_empty(self) -> "DistillShape":
        if not self.sizes and not self.tie_word_embeddings:
            keys = ", ".join(DistillShape.model_fields)
            raise PydanticCustomError("empty_shape", "says nothing; give it one of {keys}", {"keys": keys})
        return self


class DistillStage(StageSpec, TrainSettings, _Taught):
    """Train a student towards a teacher's predictions."""

    kind: Literal["distill"] = Field(description="What the stage does: distill.")
    shape: DistillShape | None = Field(
        default=None,
        description="Sizes of the student, by their names in config.json: the model before this stage is pruned to "
        "them first. Null trains that model as it is.",
    )
    student: Text | None = Field(
        default=None, description="A folder or hub id to train instead of the model before this stage."
    )
    losses: Losses = Field(
        default=Losses(kl=1.0), description="What is minimised, by weight; forward KL alone is best."
    )
    temperature: Number = Field(default=1.0, gt=0, allow_inf_nan=False, description="Of kl, reverse_kl and jsd.")
    beta: Number = Field(default=0.5, gt=0, lt=1, description="Of jsd: the teacher's share of the mixture.")
    hidden_layers: Annotated[dict[int, int], BeforeValidator(_layer_map)] | None = Field(
        default=None,
        min_length=1,
        description="Layers of the student and the teacher's layer that each follows, counted from 0: {5: 11, 11: 23}.",
    )

    @model_validator(mode="after")
    def _check_losses(self) -> "DistillStage":
        if self.student is not None and self.shape is not None:
            raise PydanticCustomError("student", "student and shape both say what is trained; keep one")
        if bool(self.losses.hidden) != (self.hidden_layers is not None):
            raise PydanticCustomError("hidden", "losses.hidden and hidden_layers need each other; give both or none")
        other = [name for name in self.losses.used if name not in ("kl", "ce")]
        if self.targets == "cached" and other:
            message = "targets: cached keeps what kl needs, and not what {name} does; use online"
            raise PydanticCustomError("cached", message, {"name": other[0]})
        if self.targets == "cached" and self.temperature != 1:
            raise PydanticCustomError("cached", "targets: cached is drawn at temperature 1; use online")
        _check_teaching(self, self.losses.used == ["ce"])
        return self

    @property
    def calibrates(self) -> bool:
        """Whether the stage looks at calibration text."""
        return False

    @property
    def starts_from(self) -> str | None:
        """The student, where it is a model of its own."""
        return self.student

    def identity(self) -> dict[str, Any]:
        """The settings that its result hangs on; texts and models are known by their content."""
        return self.model_dump(mode="json", exclude=_NOT_IDENTITY | {"data"})

    @property
    def title(self) -> str:
        """The stage in a few words."""
        return f"distill ({', '.join(self.losses.used)})"


TrainStage: TypeAlias = FinetuneStage | DistillStage
