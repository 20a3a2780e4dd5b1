"""The training stages by themselves, without a runner around them, and what an independent loop makes of the same."""

import json
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from dense_losses import dense_terms
from pruned import context as calibrated
from quantized import PROBE
from random_models import load_stock, random_tokens
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from compress.data.mixture import Mixture
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, write_part
from compress.recipe.prune import PatternStage
from compress.recipe.text import CalibrationSpec
from compress.recipe.train import DistillStage, FinetuneStage, TrainStage
from compress.records import Stage, Trained
from compress.stages.contract import Plan, Setting
from compress.stages.prune.run import run as run_pruning
from compress.stages.training.plan import plan
from compress.stages.training.run import LOG, run
from compress.system import distributed
from compress.system.progress import Advance, Reporter
from compress.train.losses.fused import Weights

LENGTH = 32
WORDS = ("the", "old", "fox", "saw", "a", "red", "dog", "ran", "over", "new", "house", "king", "went", "under", "it")
Tensors: TypeAlias = dict[str, torch.Tensor]


def write_text(file: Path, documents: int = 240, seed: int = 0, shortest: int = 3, longest: int = 40) -> Path:
    """A text with something to learn: documents of few words, each following the last by a rule and some chance."""
    chance = random.Random(seed)
    rows = []
    for _ in range(documents):
        place, words = chance.randrange(len(WORDS)), []
        for _ in range(chance.randint(shortest, longest)):
            words.append(WORDS[place])
            place = (3 * place + 1 + chance.randrange(2)) % len(WORDS)
        rows.append(json.dumps({"text": " ".join(words) + "."}) + "\n")
    file.write_text("".join(rows))
    return file


def spec(text: Path, **settings: Any) -> TrainStage:
    """A stage of 8 steps of 4 sequences, unless the settings say otherwise."""
    given: dict[str, Any] = {
        "kind": "finetune", "data": {"source": str(text), "sequence_length": LENGTH}, "batch_size": 4, "held_out": 4,
        "tokens": 4 * LENGTH * settings.pop("steps", 8), "learning_rate": 3e-3,
    }  # fmt: skip
    given |= settings
    schema: Any = DistillStage if given["kind"] == "distill" else FinetuneStage
    made: TrainStage = schema.model_validate(given)
    return made


def planned(parent: Checkpoint, stage: TrainStage, base: Checkpoint | None = None, **models: Path) -> Plan:
    text = CalibrationSpec(source="text.txt", sequence_length=LENGTH)
    return plan(stage, parent, Setting("stages.0", text, base=base or parent, models=models))


def context(work: Path, base: Checkpoint, dtype: torch.dtype = torch.float32, **models: Path) -> Context:
    probe = random_tokens(1, 24, 2)
    return Context(torch.device("cpu"), dtype, None, probe, Heard(), False, base=base, work=work, models=models)


class Heard(Reporter):
    """Says nothing aloud, and keeps what was said."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


class StopsTraining(Heard):
    """Stops training behind so many steps, as Ctrl-C does, and no other task."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    @contextmanager
    def task(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        yield self._advance if title == "training" else lambda note="": None

    def _advance(self, note: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def train(
    parent: Checkpoint, output: Path, stage: TrainStage, there: Context | None = None, base: Checkpoint | None = None
) -> Stage:
    """Plan and run a stage; what the finished model says to the probe goes into the file PROBE in `output`.

    Args:
        parent: what is trained.
        output: folder; its neighbour `work` is the work folder.
        stage: what to do.
        there: the context, where it is another than the usual one.
        base: the recipe's model, where it is not the parent.
    """
    there = there or context(output.parent / "work", base or parent)
    assert there.base is not None
    found = planned(parent, stage, there.base, **there.models)
    assert not found.problems and found.spec is not None, found.problems
    result = run(found.spec, parent, output, there)  # type: ignore[arg-type]
    if distributed.rank() == 0:
        write_part(output / PROBE, {"logits": result.logits}, {})
    return result.record


def trained(record: Stage) -> Trained:
    assert record.trained is not None
    return record.trained


def weights(folder: Path) -> Tensors:
    checkpoint = Checkpoint(folder)
    return checkpoint.load(checkpoint.tensors)


def log_of(output: Path) -> list[dict[str, Any]]:
    """Lines of the log of training, without what a clock says."""
    lines = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def state_of(output: Path) -> Tensors:
    """What the last state on disk holds of the trainee, by torch's own converter."""
    folder, file = max(output.glob("state-*")), output / "state.pt"
    dcp_to_torch_save(folder, file)
    found: Tensors = torch.load(file, weights_only=False)["model"]
    return found


def documents(batch: Any) -> list[tuple[int, slice]]:
    """Each document of a batch, as the row and the places that it takes."""
    found = []
    for row, numbers in enumerate(batch.documents.tolist()):
        starts = [n for n in range(len(numbers)) if not n or numbers[n] != numbers[n - 1]]
        ends = [*starts[1:], len(numbers)]
        found += [(row, slice(start, end)) for start, end in zip(starts, ends, strict=True)]
    return found


def plain_loop(
    student: Checkpoint, teacher: Checkpoint, mixture: Mixture, steps: int, terms: Weights, *, rate: float,
    warm_up: float, decay: float, clip: float = 1.0, vocabulary: int | None = None,
) -> tuple[list[float], Tensors]:  # fmt: skip
    """Loss of each step and the weights after the last one, by stock models in float64 and one document at a time."""
    model = load_stock(student.folder, torch.float64).requires_grad_(True)
    taught, own = load_stock(teacher.folder, torch.float64), list(model.parameters())
    groups = [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in own if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    rising, losses = round(warm_up * steps), []
    for step in range(steps):
        batch, total, count = mixture.batch(step), torch.zeros((), dtype=torch.float64), 0
        for row, place in documents(batch):
            tokens = batch.tokens[row, place]
            rows = batch.scored[row, place][1:].nonzero()[:, 0]
            said = model(tokens[None]).logits[0, rows, :vocabulary]
            wanted = taught(tokens[None]).logits[0, rows, :vocabulary]
            found = dense_terms(said, wanted, tokens[rows + 1], terms)
            total, count = total + sum(getattr(terms, name) * term for name, term in found.items()), count + len(rows)
        losses.append(float(total.detach()) / count)
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(own, clip)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
        for group in optimizer.param_groups:
            group["lr"] = rate * ((step + 1) / (rising + 1) if step < rising else cosine)
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def sparse(parent: Checkpoint, output: Path) -> Checkpoint:
    """The model with two of each four weights zero."""
    run_pruning(PatternStage(kind="prune", pattern="2:4", method="magnitude"), parent, output, calibrated())
    return Checkpoint(output / "checkpoint")


def missed(found: Tensors, wanted: Tensors, start: Tensors) -> float:
    """How far tensors are from where they should have gone, as a share of the way.

    Adam divides by the size of a gradient, so where that is next to nothing its rounding shows; such places are few.
    """
    assert found.keys() == wanted.keys()
    off = sum(float((found[name].double() - wanted[name].double()).square().sum()) for name in found)
    way = sum(float((start[name].double() - wanted[name].double()).square().sum()) for name in found)
    return math.sqrt(off / way)


def apart(found: Tensors, wanted: Tensors, names: Sequence[str] | None = None) -> float:
    """The largest difference between tensors of the same names."""
    assert names is not None or found.keys() == wanted.keys()
    return max(float((found[n].double() - wanted[n].double()).abs().max()) for n in names or found)
