"""What training a model takes in memory, by what compress/train/memory.py says of our own trainer."""

from compress.footprint.load import CARD_COUNTS
from compress.footprint.records import Training
from compress.footprint.subject import Subject
from compress.model.shapes import Shapes
from compress.recipe.lengths import fitting_length
from compress.recipe.train import DistillStage, FinetuneStage, Lora, TrainStage
from compress.stages.training.plan import demand_of
from compress.train.memory import Optimizer, Setup

NOTE = (
    "each GPU holds its share of float32 weights and gradients (4 + 4 bytes a parameter) and moments (8, or 2.1 in "
    "8 bits), bf16 copies of what is at work, the loss, and a sequence of {length} tokens (layers computed again)"
)


def training_of(subject: Subject) -> tuple[list[Training], str]:
    """Bytes in each GPU for each way of training, and a line that says of what; nothing where it can't be trained."""
    if subject.refused is not None:
        return [], f"{subject.refused}, which dscompress does not train"
    shapes, length = subject.shapes, fitting_length(subject.positions)
    full = FinetuneStage(kind="finetune", loss="ce")
    ways: list[tuple[str, TrainStage, Shapes | None, Optimizer]] = [
        ("finetune, AdamW", full, None, "adamw"),
        ("finetune, 8-bit AdamW", full, None, "adamw8bit"),
        ("finetune, LoRA of rank 16", full.model_copy(update={"lora": Lora()}), None, "adamw"),
        ("distill from the base, AdamW", DistillStage(kind="distill", teacher="base"), shapes, "adamw"),
    ]
    found = []
    for way, spec, teacher, optimizer in ways:
        sizes = {
            world: demand_of(spec, shapes, teacher, length, 2, "cuda", world).bytes(Setup(1, optimizer, True))
            for world in CARD_COUNTS
        }
        found.append(Training(way=way, bytes=sizes))
    return found, NOTE.format(length=length)
