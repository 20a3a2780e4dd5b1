"""Where a stage's teaching comes from: nobody, a teacher asked at each step, or targets drawn from one before."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from compress.data.mixture import Mixture
from compress.loop.context import Context
from compress.loop.skeleton import head_name, skeleton, stored_name
from compress.model.checkpoint import Checkpoint
from compress.model.identity import identity
from compress.recipe.train import BASE, DistillStage, TrainStage
from compress.stages.training.texts import in_use
from compress.system import distributed
from compress.system.fingerprint import fingerprint
from compress.train.loop import Place, Teach
from compress.train.losses.inputs import Head
from compress.train.teacher.cached import TeacherCache, fill
from compress.train.teacher.online import OnlineTeacher
from compress.train.trainee import Inputs, Taught, inputs_of

CODE_VERSION = 1
_AT_ONCE = {"cuda": 16384, "cpu": 2048}  # tokens that the teacher is asked about together


def teacher_of(spec: TrainStage, context: Context) -> Checkpoint:
    """The checkpoint of a stage's teacher."""
    if spec.teacher == BASE:
        assert context.base is not None, "the runner gives it"
        return context.base
    return Checkpoint(context.models[spec.teacher])


def nobody(_: Sequence[Place], __: Inputs) -> None:
    """Teaches nothing."""


def online(
    spec: TrainStage, teacher: Checkpoint, context: Context, mesh: DeviceMesh, compute: torch.dtype, compiled: bool
) -> Teach:
    """A teacher that is asked once for each forward pass of the student."""
    asked = open_teacher(teacher, context, mesh, compute, compiled)
    layers = tuple((spec.hidden_layers or {}).values()) if isinstance(spec, DistillStage) else ()

    def teach(_: Sequence[Place], inputs: Inputs) -> Taught:
        return Taught(asked(inputs, layers), asked.head)

    return teach


def open_teacher(
    teacher: Checkpoint, context: Context, mesh: DeviceMesh, compute: torch.dtype, compiled: bool = False
) -> OnlineTeacher:
    """The teacher, ready to be asked."""
    model, arch = skeleton(teacher.folder, torch.float32, context.trust_remote_code)
    decoder: nn.ModuleList = model.get_submodule(arch.layers)
    head = head_name(model, arch)

    def load(names: Sequence[str]) -> dict[str, Tensor]:
        stored = {name: stored_name(name, head, arch, teacher.tensors) for name in names}
        found = teacher.load(set(stored.values()))
        return {name: found[stored[name]] for name in names}

    asked = OnlineTeacher(model, decoder)
    asked.fill(mesh, compute, load, context.device, str(teacher.folder), compiled)
    return asked


def cached(
    spec: TrainStage,
    teacher: Checkpoint,
    context: Context,
    mesh: DeviceMesh,
    compute: torch.dtype,
    mixture: Mixture,
    steps: int,
    vocabulary: int,
    held: ExitStack,
) -> tuple[Teach, TeacherCache]:
    """Targets for all sequences that training will read, drawn now where they are not there yet."""
    assert context.work is not None
    who = distributed.first(lambda: identity(teacher, context.work))  # type: ignore[arg-type]
    keys = [text.key for text in mixture.texts]
    key = fingerprint(
        "teacher", CODE_VERSION, who, str(compute), vocabulary, spec.draws, spec.seed
    )  # texts name the sequences
    folder = context.work / "teachers" / key
    held.enter_context(in_use(folder, context))
    cache = TeacherCache(folder, spec.draws, key)
    places = dict.fromkeys(place for step in range(steps) for place in mixture.indices(step))
    wanted = [(keys[text], number) for text, number in [*mixture.held_out(), *places]]
    for torn in cache.torn:
        context.reporter.warn(f"{torn}: is cut off; the teacher is asked again")
    missing = distributed.first(lambda: cache.missing(wanted))
    if missing:
        _ask(open_teacher(teacher, context, mesh, compute), missing, cache, spec, context, mixture, vocabulary)
    distributed.barrier()
    cache = TeacherCache(cache.folder, spec.draws, key)
    each = cache.bytes_per_token
    if each is not None:
        context.reporter.say(f"teacher's targets: {spec.draws} draws and {each:.0f} bytes for each token")

    def teach(places: Sequence[Place], inputs: Inputs) -> Taught:
        found = cache.read([(keys[text], number) for text, number in places])
        device = inputs.tokens.device
        moved = [each.to(device) for each in (found.ids, found.shares, found.entropy)]
        return Taught(sampled=type(found)(*moved))

    return teach, cache


def _ask(
    asked: OnlineTeacher,
    missing: Sequence[tuple[str, int]],
    cache: TeacherCache,
    spec: TrainStage,
    context: Context,
    mixture: Mixture,
    vocabulary: int,
) -> None:
    """Draw the targets that are missing; each process takes its part."""
    numbers = {text.key: number for number, text in enumerate(mixture.texts)}
    at_once = max(1, _AT_ONCE[context.device.type] // mixture.sequence_length)

    def rows_of(names: list[tuple[str, int]]) -> tuple[Tensor, Head, list[int]]:
        batch = mixture.read([(numbers[key], number) for key, number in names])
        states = asked(inputs_of(batch, context.device))
        return states.last, asked.head, batch.scored[:, 1:].sum(1).tolist()

    world = distributed.world()
    share = -(-len(missing) // world)
    # sharded layers are read by all processes together: each asks as often as the others, some about a sequence twice
    own = [missing[n % len(missing)] for n in range(distributed.rank() * share, (distributed.rank() + 1) * share)]
    with context.reporter.task("asking the teacher", len(own), "sequence") as advance:
        fill(cache, own, rows_of, vocabulary=vocabulary, seed=spec.seed, at_once=at_once, advance=advance)
