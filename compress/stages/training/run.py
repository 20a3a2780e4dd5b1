"""The stages that train: finetune and distill. One process or several, to the same batches."""

import json
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from compress import records
from compress.data import mixture
from compress.data.mixture import Mixture, whole_shares
from compress.errors import UserError
from compress.forecast_records import Forecast
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.model.identity import identity
from compress.model.shapes import find_modules
from compress.model.tokenizer import load_tokenizer
from compress.recipe.train import DistillStage, TrainStage
from compress.stages.contract import Result
from compress.stages.layerwise import Layerwise
from compress.stages.training import teachers, texts
from compress.stages.training.plan import body_of, demand_of, taught, vocabulary_of
from compress.stages.training.student import Gather, Student, Written, build, chosen, fill, refill, zeros_of
from compress.system import distributed
from compress.system.extras import missing_extra
from compress.system.files import write_text
from compress.system.memory import PeakMemory, available
from compress.system.tracker import EVENTS
from compress.train import sharded
from compress.train.flops import peak_of, step_flops
from compress.train.log import Log
from compress.train.loop import Loop, Settings, Teach
from compress.train.losses.fused import Weights
from compress.train.memory import Setup
from compress.train.optimizer import make_optimizer
from compress.train.progress import Progress
from compress.train.trainee import Objective, Trainee

CODE_VERSION = (3, teachers.CODE_VERSION, mixture.CODE_VERSION)
LOG = "train_log.jsonl"
_EAGER, _WORTH_COMPILING = 0.15, 600.0  # share of a GPU's arithmetic without compiling; seconds
_STATE_TOKENS = 5_000_000  # trained between two states that are large: writing one takes about as long as 500k of them


def reads(spec: TrainStage, context: Context) -> list[Any]:
    """What identifies the texts, the teacher and a student of its own: for the stage's fingerprint."""
    assert context.base is not None and context.work is not None
    work, base = context.work, context.base.folder
    folder = base if spec.starts_from is None else context.models[spec.starts_from]
    models = [] if spec.starts_from is None else [Checkpoint(folder)]
    models += [teachers.teacher_of(spec, context)] if taught(spec) else []
    tokenizer = load_tokenizer(folder, context.trust_remote_code)

    def found() -> list[Any]:
        shares = whole_shares([text.weight for text in texts.texts_of(spec)])
        return [[identity(model, work) for model in models], texts.keys_of(spec, tokenizer), shares]

    return distributed.first(found)


def run(spec: TrainStage, parent: Checkpoint, output: Path, context: Context) -> Result:
    """Train a checkpoint.

    Args:
        spec: the stage, resolved.
        parent: a dense checkpoint, what is trained.
        output: folder of states, parts and, at the end, `output/checkpoint`; what is there already is continued.
        context: device, base, work folder, progress.

    Raises:
        UserError: no room, or numbers that don't go together.
        ModelError: a family that can't be trained here.
        NumericalError: the loss breaks out.
        OutputError: nothing can be written.
    """
    if distributed.rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    with distributed.reaching(), sharded.mesh_of(context.device) as mesh, ExitStack() as held:
        return _Training(spec, parent, output, context, mesh, held).run()


class _Training:
    """One stage under way."""

    def __init__(
        self, spec: TrainStage, parent: Checkpoint, output: Path, context: Context, mesh: DeviceMesh, held: ExitStack
    ) -> None:
        self.spec, self.parent, self.output, self.context, self.mesh = spec, parent, output, context, mesh
        self.held = held
        self.compute = context.dtype if context.dtype == torch.float32 else torch.bfloat16
        self.started, self.memory = time.monotonic(), PeakMemory(context.device)
        tied = isinstance(spec, DistillStage) and spec.shape is not None and bool(spec.shape.tie_word_embeddings)
        self.student = Student(parent, output / "student", tied)
        self.mixture: Mixture = texts.mixture_of(spec, parent.folder, context, held)
        self.steps = texts.planned_steps(spec, self.mixture, context)
        batch, world = self.mixture.batch_size, distributed.world()
        if batch % world:
            raise UserError(
                f"batch_size: {batch} sequences can't be shared by {world} processes; use a multiple of their number, "
                f"such as {-(-batch // world) * world}"
            )
        self.teacher = teachers.teacher_of(spec, context) if taught(spec) else None
        self.asked = self.teacher if spec.targets == "online" else None  # at each step
        self.vocabulary = None if self.teacher is None else self._vocabulary(self.teacher)

    def _vocabulary(self, teacher: Checkpoint) -> int | None:
        tokenizer = load_tokenizer(self.parent.folder, self.context.trust_remote_code)
        return vocabulary_of(self.parent, teacher, len(tokenizer))

    def run(self) -> Result:
        """Train, write, and say what came of it."""
        if self._compiled():
            torch.compiler.reset()  # what earlier stages compiled counts towards torch's limits
        teach, bytes_per_token = self._teaching()
        trainee, decoder, names = build(
            self.student, self._objective(), self._widths(), self.spec.lora, self.context.trust_remote_code
        )
        trained = sharded.set_trained(
            trainee, lambda own: chosen(own, names, self.spec.train, self.spec.lora is not None), self.compute
        )
        setup = self._setup()
        fill(
            trainee, decoder, self.student, names, self.mesh, self.compute, self.context.device, setup, self._compiled()
        )
        zeros = zeros_of(trainee, names, find_modules(self.parent).linears)
        self._check_zeros(zeros)
        loop = self._loop(trainee, names, teach, setup, zeros)
        before = time.monotonic() - self.started
        progress = loop.run()
        foreseen = Forecast(seconds=loop.foresight.seconds).later(before + progress.earlier)
        del loop, teach  # and with them moments and teacher
        host, gpu = self.memory.peak()  # writing counts anew
        result = self._write(trainee, names)
        figures = {
            "trained": self._figures(progress, setup, trained, bytes_per_token, len(zeros)),
            "seconds": time.monotonic() - self.started + progress.earlier,
            "forecast": foreseen,
            "peak_memory_bytes": host,
            "peak_gpu_memory_bytes": gpu,
        }
        return replace(result, record=result.record.model_copy(update=figures))

    def _teaching(self) -> tuple[Teach, float | None]:
        """Where the teaching comes from, and the bytes of a token's targets where they are cached."""
        spec, context = self.spec, self.context
        if self.teacher is None:
            return teachers.nobody, None
        if self.asked is not None:
            return teachers.online(spec, self.asked, context, self.mesh, self.compute, self._compiled()), None
        size = self.vocabulary or body_of(self.parent).vocabulary
        teach, cache = teachers.cached(
            spec, self.teacher, context, self.mesh, self.compute, self.mixture, self.steps, size, self.held
        )
        return teach, cache.bytes_per_token

    def _objective(self) -> Objective:
        spec = self.spec
        if not isinstance(spec, DistillStage):
            return Objective(Weights(**{spec.loss: 1.0}), vocabulary=self.vocabulary)
        losses = {name: getattr(spec.losses, name) for name in spec.losses.used if name != "hidden"}
        weights = Weights(**losses, temperature=spec.temperature, beta=spec.beta)
        return Objective(weights, spec.losses.hidden, spec.hidden_layers, self.vocabulary)

    def _widths(self) -> tuple[int, int] | None:
        """Of student and teacher, where hidden states are compared."""
        if self.teacher is None or not isinstance(self.spec, DistillStage) or self.spec.hidden_layers is None:
            return None
        return body_of(self.parent).hidden, body_of(self.teacher).hidden

    def _setup(self) -> Setup:
        """What memory allows; the choice is kept, so that training that is continued goes on as it began."""
        spec, context, world = self.spec, self.context, distributed.world()
        share = self.mixture.batch_size // world
        demand = demand_of(
            spec,
            self.parent,
            self.asked,
            self.mixture.sequence_length,
            self.compute.itemsize,
            context.device.type,
            world,
        )
        free = min(distributed.gather(self._free()))
        kept, wanted = self.output / f"setup-{world}.json", [spec.micro_batch, spec.checkpoint_activations]

        def choose() -> list[Any]:
            files = self.output.glob("setup-*.json")
            chosen = {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
            if kept.name in chosen and chosen[kept.name][1] == wanted:
                return list(chosen[kept.name][0])
            optimizer: str = spec.optimizer
            if optimizer == "auto" and chosen:  # a state on disk has its moments
                optimizer = next(iter(chosen.values()))[0][1]
            elif optimizer == "auto" and missing_extra("torchao", "train") is not None:
                optimizer = "adamw"
            found = demand.choose(share, free, spec.kind, spec.micro_batch, optimizer, spec.checkpoint_activations)
            values = [found.micro_batch, found.optimizer, found.again]
            write_text(kept, json.dumps([values, wanted]))
            return values

        setup = Setup(*distributed.first(choose))
        again = ", layers computed again in the backward pass" if setup.again else ""
        context.reporter.say(
            f"{spec.title}: {self.steps} steps of {self.mixture.batch_size} x {self.mixture.sequence_length} tokens, "
            f"{setup.micro_batch} sequences at a time, {setup.optimizer}{again}"
        )
        return setup

    def _free(self) -> int:
        """Bytes for the training of this process, those of a teacher that is there already included."""
        device, limit = self.context.device, self.context.max_memory
        shared = distributed.here() if device.type == "cpu" else 1
        free = available(device) // shared
        if self.asked is not None:
            free += body_of(self.asked).parameters * self.compute.itemsize // distributed.world()
        return free if limit is None else min(free, limit // shared)

    def _check_zeros(self, zeros: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        if not zeros:
            return
        if self.spec.lora is not None:
            raise UserError(
                f"lora: {len(zeros)} matrices have zeros that an earlier stage made, and low-rank additions would fill "
                "them; train the weights themselves (remove lora)"
            )
        self.context.reporter.say(f"{self.spec.title}: the zeros of {len(zeros)} sparse matrices are kept")

    def _loop(
        self,
        trainee: Trainee,
        names: dict[str, str],
        teach: Teach,
        setup: Setup,
        zeros: Sequence[tuple[nn.Parameter, Tensor]],
    ) -> Loop:
        spec, context = self.spec, self.context
        optimizer = make_optimizer(trainee, setup.optimizer, spec.weight_decay)

        def start_over() -> None:
            refill(trainee, self.student, names)
            optimizer.state.clear()

        def keep_zeros() -> None:
            for parameter, there in zeros:
                sharded.own_part(parameter.data).masked_fill_(there, 0)

        assert spec.learning_rate is not None and spec.evaluate_every is not None
        tokens = self.mixture.batch_size * self.mixture.sequence_length
        settings = Settings(
            steps=self.steps, micro_batch=setup.micro_batch, rate=spec.learning_rate, warm_up=spec.warm_up,
            clip=spec.clip, held_out=self.mixture.held_out(), evaluate_every=spec.evaluate_every,
            state_every=state_every(spec.evaluate_every, tokens, trainee), patience=spec.patience,
            save_every=spec.save_every,
        )  # fmt: skip
        log = None
        if distributed.rank() == 0:
            assert context.work is not None
            events, tracker = context.work / EVENTS, spec.tracker or context.tracker
            name = f"{context.tracked}/{spec.kind}-{self.output.name[:8]}"  # the folder has the stage's fingerprint
            log = Log(self.output / LOG, tracker, events, name, spec.model_dump(mode="json"), context.reporter)
        kept_in = {own: self.student.dtype(stored) for own, stored in names.items()}
        return Loop(
            trainee, optimizer, self.mixture, teach, settings, tokens, self.output, context.device,
            context.reporter, log, start_over, keep_zeros, kept_in, self._flops(),
        )  # fmt: skip

    def _compiled(self) -> bool:
        """Whether layers are compiled: the minute that it takes is worth it where training takes many."""
        if self.spec.compile is not None or self.context.device.type != "cuda":
            return bool(self.spec.compile)
        flops = self._flops()
        tokens = self.mixture.tokens(self.steps)
        return flops is not None and tokens * flops[0] / (_EAGER * flops[1]) > _WORTH_COMPILING

    def _flops(self) -> tuple[float, float] | None:
        """Operations for one token, and those of all devices in a second; None where that is not known."""
        device = self.context.device
        peak = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        if peak is None:
            return None
        share = 1.0 if self.spec.lora is None and self.spec.train is None else 0.0
        teacher = None if self.asked is None else body_of(self.asked)
        attended = 2 * (float(self.mixture.batch(0).positions.double().mean()) + 1)  # inside documents
        each = step_flops(body_of(self.parent), teacher, round(attended), share)
        return each, peak * distributed.world()

    def _write(self, trainee: Trainee, names: dict[str, str]) -> Result:
        """The trained weights as a checkpoint."""
        self.student.gather = Gather(self.student, trainee, names)
        context = self.context
        stream = LayerStream(self.student, context.device, context.dtype, context.trust_remote_code)
        result = Layerwise(self.spec, self.parent, stream, self.output, context).run(Written(self.student, stream))
        if distributed.rank() == 0:
            shutil.copyfile(self.output / LOG, self.output / "checkpoint" / LOG)
        return result

    def _figures(
        self, progress: Progress, setup: Setup, trained: int, bytes_per_token: float | None, zeros: int
    ) -> records.Trained:
        spec, mixture, steps = self.spec, self.mixture, progress.step
        passes = mixture.passes(steps)
        read = [
            records.TrainedText(name=name, licence=text.licence, tokens=text.tokens, passes=passes[name])
            for name, text in zip(mixture.names, mixture.texts, strict=True)
        ]
        tokens = mixture.tokens(steps)
        flops = self._flops()
        pace = tokens / progress.seconds if progress.seconds else None
        assert spec.learning_rate is not None and self.context.base is not None
        return records.Trained(
            loss=_loss_words(spec),
            teacher=None if self.teacher is None else spec.teacher,
            tokens=tokens, scored=progress.scored, steps=steps, planned_steps=self.steps,
            batch_size=mixture.batch_size, sequence_length=mixture.sequence_length,
            learning_rate=spec.learning_rate, optimizer=setup.optimizer, trainable=trained, texts=read,
            losses=progress.losses, held_out=progress.held_out,
            best_step=None if progress.best is None else progress.best[0], tokens_per_second=pace,
            mfu=None if flops is None or pace is None else pace * flops[0] / flops[1],
            cached_bytes_per_token=bytes_per_token, rolled_back=progress.rolled_back,
            stopped=progress.stopped, zeros_kept=zeros,
        )  # fmt: skip


def _loss_words(spec: TrainStage) -> str:
    """What was minimised, in a few words."""
    if not isinstance(spec, DistillStage):
        return spec.loss
    weighed = [(getattr(spec.losses, name), name) for name in spec.losses.used]
    words = " + ".join(name if weight == 1 else f"{weight:g} {name}" for weight, name in weighed)
    words += f" at temperature {spec.temperature:g}" if spec.temperature != 1 else ""
    return words + (f", beta {spec.beta:g}" if "jsd" in spec.losses.used else "")


def state_every(evaluate_every: int, tokens: int, trainee: nn.Module) -> int:
    """Steps between two states that training can go back to; the fewer weights are trained, the smaller states are."""
    sizes = [(each.numel(), each.requires_grad) for each in trainee.parameters()]
    share = sum(size for size, trained in sizes if trained) / sum(size for size, _ in sizes)
    return evaluate_every * max(1, math.ceil(_STATE_TOKENS * share / (evaluate_every * tokens)))
