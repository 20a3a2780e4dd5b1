"""What training will do to a model: shape, steps, memory and time, from config.json and headers alone. Never torch."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from compress.errors import UserError
from compress.forecast_records import Forecast
from compress.model.arch import depth_of, positions_of, width_of
from compress.model.checkpoint import Checkpoint
from compress.model.layout import by_layer, merged_bytes
from compress.model.shapes import PlannedShapes, Shapes, find_modules, is_tied, parameter_count
from compress.recipe.lengths import fitting_length
from compress.recipe.load import load_training_texts
from compress.recipe.text import TrainingText
from compress.recipe.train import BASE, DistillStage, TrainStage
from compress.stages.contract import Place, Plan, Setting
from compress.system.extras import missing_extra
from compress.system.tracker import tracker_problem
from compress.system.units import count, size
from compress.train.body import Body
from compress.train.flops import PEAKS, step_flops
from compress.train.memory import LIBRARIES, Demand, Setup

_BATCH_TOKENS, _LEAST_STEPS = 32_768, 100
_EVALUATIONS = 10
_FULL_RATE, _FULL_WIDTH = (
    5e-4,
    576,
)  # peak of the rate for weights of a model so wide; it falls with the root of the width
_LORA_RATE, _TEXT_SHARE = 2e-4, 0.2  # text alone pulls a model away from what it knows, and gets less
_TOKENIZER = "tokenizer.json"
_OLDER_FORMS = (("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_NAMED, _USED = "H100", 0.4  # of its arithmetic, for the hours that a dry run prints


def plan(spec: TrainStage, shapes: Shapes | None, setting: Setting) -> Plan:
    """What the stage will do to a model of these shapes; None where it is not here."""
    where, problems = setting.where, _missing(spec, setting.where)
    if isinstance(spec, DistillStage) and spec.student is not None:
        folder = setting.models.get(spec.student)
        shapes = None if folder is None else Checkpoint(folder)
    texts = load_training_texts(spec.data, setting.text)
    if shapes is None:
        return Plan(None, problems)
    problems += _student_problems(spec, shapes, where)
    teacher = teacher_shapes(spec, setting)
    if teacher is not None:
        problems += _teacher_problems(spec, shapes, teacher, where)
    if spec.starts_from is not None and setting.base is not None and teacher is not setting.base:
        problems += _stranger_problems(shapes, setting.base, where)
    texts, text_problems = _fitted(texts, shapes, teacher, where)
    problems += text_problems
    if problems:
        return Plan(shapes, problems)
    spec = resolved(spec, shapes, texts)
    after = _after(spec, shapes)
    student, length = body_of(after), int(texts[0].length)
    asked, place = None if spec.targets == "cached" else teacher, setting.place
    named = demand_of(spec, after, asked, length, 2, "cuda", 1)
    here = demand_of(spec, after, asked, length, place.width, place.device, place.world)
    return Plan(
        after,
        lines=_lines(spec, student, named, None if teacher is None else body_of(teacher)),
        forecast=_forecast(spec, after, here, place),
        splits=True,
        spec=spec,
        builds=after.config != shapes.config,
    )


def _missing(spec: TrainStage, where: str) -> list[str]:
    """Packages that the stage needs and that are not here, and a tracker."""
    found = [
        missing_extra("peft", "train") if spec.lora is not None else None,
        missing_extra("torchao", "train") if spec.optimizer == "adamw8bit" else None,
        tracker_problem(spec.tracker),
    ]
    return [f"{where}: {problem}" for problem in found if problem]


def teacher_shapes(spec: TrainStage, setting: Setting) -> Shapes | None:
    """The teacher; None where the stage has none, or it is not here."""
    if not taught(spec):
        return None
    if spec.teacher == BASE:
        return setting.base
    folder = setting.models.get(spec.teacher)
    return None if folder is None else Checkpoint(folder)


def taught(spec: TrainStage) -> bool:
    """Whether the stage learns from a teacher."""
    return spec.losses.used != ["ce"] if isinstance(spec, DistillStage) else spec.loss == "kl"


def _student_problems(spec: TrainStage, shapes: Shapes, where: str) -> list[str]:
    problems = []
    if shapes.config.get("quantization_config"):
        problems.append(
            f"{where}: the model is quantized, and dense weights are trained; put this stage before quantize"
        )
    if shapes.config.get("auto_map"):
        problems.append(f"{where}: the model comes with code of its own; training knows transformers' families only")
    if problems:
        return problems
    if spec.train is not None:
        names = [name for name in shapes.tensors if any(fnmatchcase(name, glob) for glob in spec.train)]
        if not names:
            example = next(iter(shapes.tensors))
            problems.append(f"{where}.train: no parameter is called {' or '.join(spec.train)}; one is {example}")
    if spec.lora is not None:
        linears = find_modules(shapes).linears
        if not any(map(spec.lora.takes, linears)):
            called = ", ".join(spec.lora.targets or [])
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
            problems.append(f"{where}.lora.targets: no linear of the layers is called {called}; use {known}")
    return problems


def _stranger_problems(student: Shapes, base: Shapes, where: str) -> list[str]:
    """Why a student of its own can't take the place of the recipe's model."""
    different = tokenizers_differ(student.folder, base.folder)
    if different is None:
        return []
    return [
        f"{where}.student: its tokenizer is not that of the recipe's model ({different}), and what it becomes is "
        "measured on that one's tokens; make the student `model`"
    ]


def _teacher_problems(spec: TrainStage, shapes: Shapes, teacher: Shapes, where: str) -> list[str]:
    """Why this teacher can't teach this student."""
    problems = []
    if teacher.config.get("quantization_config"):
        problems.append(f"{where}.teacher: is quantized; name a dense model")
    if (different := tokenizers_differ(shapes.folder, teacher.folder)) is not None:
        problems.append(
            f"{where}.teacher: its tokenizer is another one ({different}), so its predictions are of other tokens; "
            "use a teacher with the student's tokenizer"
        )
    elif (problem := _vocabulary_problem(shapes, teacher)) is not None:
        problems.append(f"{where}.{problem}")
    if isinstance(spec, DistillStage) and spec.hidden_layers is not None:
        for what, numbers, model in (
            ("the student", spec.hidden_layers.keys(), shapes),
            ("the teacher", spec.hidden_layers.values(), teacher),
        ):
            depth = depth_of(model.config) or 0
            bad = [number for number in numbers if not 0 <= number < depth]
            if bad:
                problems.append(f"{where}.hidden_layers: {what} has layers 0 to {depth - 1}, and no {bad[0]}")
    return problems


def tokenizers_differ(one: Path, other: Path) -> str | None:
    """What differs between two folders' tokenizers, in a few words; None where they give the same tokens."""
    if one.resolve() == other.resolve():
        return None
    if all((folder / _TOKENIZER).is_file() for folder in (one, other)):
        return _tokenizer_files_differ(one / _TOKENIZER, other / _TOKENIZER)
    for form in _OLDER_FORMS:
        if all((folder / name).is_file() for folder in (one, other) for name in form):
            names = (*form, "added_tokens.json")
            return next((name for name in names if _content(one / name) != _content(other / name)), None)
    return "they are stored in different forms"


def _tokenizer_files_differ(one: Path, other: Path) -> str | None:
    """What differs between two files tokenizer.json, as to the tokens that they give."""
    if one.read_bytes() == other.read_bytes():
        return None
    try:
        first, second = (json.loads(file.read_text(encoding="utf-8")) for file in (one, other))
        for part in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
            if first.get(part) != second.get(part):
                return f"{part.replace('_', ' ')} in {_TOKENIZER}"
    except (OSError, ValueError, AttributeError):
        return _TOKENIZER
    return None


def _content(file: Path) -> object:
    """What a tokenizer's file holds, however its JSON is laid out; None without it."""
    if not file.is_file():
        return None
    content = file.read_bytes()
    try:
        return json.loads(content) if file.suffix == ".json" else content
    except ValueError:
        return content


def tokens_of(folder: Path) -> int | None:
    """Tokens that a folder's tokenizer.json names; None where that does not say it."""
    try:
        said = json.loads((folder / _TOKENIZER).read_text(encoding="utf-8"))
        vocabulary = said["model"]["vocab"]
        names = set(vocabulary) if isinstance(vocabulary, dict) else {name for name, _ in vocabulary}
        return len(names | {token["content"] for token in said.get("added_tokens") or []})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def vocabulary_of(student: Shapes, teacher: Shapes, tokens: int) -> int | None:
    """Logits that count where two models are padded differently; None: all.

    Args:
        student: one model.
        teacher: the other.
        tokens: of their tokenizer.

    Raises:
        UserError: the smaller one has no logit for a token.
    """
    problem = _vocabulary_problem(student, teacher, tokens)
    if problem is not None:
        raise UserError(problem)
    sizes = [int(model.config["vocab_size"]) for model in (student, teacher)]
    return None if sizes[0] == sizes[1] else min(sizes)


def _vocabulary_problem(student: Shapes, teacher: Shapes, tokens: int | None = None) -> str | None:
    """Why two models' logits can't be compared; without `tokens`, as far as the student's tokenizer.json tells."""
    sizes = [model.config.get("vocab_size") for model in (student, teacher)]
    known = [size for size in sizes if isinstance(size, int)]
    if sizes[0] == sizes[1] or len(known) < len(sizes):
        return None
    tokens = tokens_of(student.folder) if tokens is None else tokens
    if tokens is None or min(known) >= tokens:
        return None
    return (
        f"teacher: the vocabularies have {sizes[1]} (teacher) and {sizes[0]} logits and the tokenizer {tokens} tokens; "
        "they may differ in padding alone: use a teacher and a student with a logit for each token"
    )


def _fitted(
    texts: Sequence[TrainingText], shapes: Shapes, teacher: Shapes | None, where: str
) -> tuple[list[TrainingText], list[str]]:
    """The texts with one length, which the model and its teacher have positions for."""
    limits = {"model": positions_of(shapes.config)}
    limits |= {} if teacher is None else {"teacher": positions_of(teacher.config)}
    whose, positions = min(limits.items(), key=lambda each: math.inf if each[1] is None else each[1])
    lengths = {text.sequence_length for text in texts if text.sequence_length is not None}
    if len(lengths) > 1:
        said = " and ".join(map(str, sorted(lengths)))
        return [], [f"{where}.data: its texts have sequence_length {said}; a batch has one, so give them the same"]
    length = lengths.pop() if lengths else fitting_length(positions)
    if positions is not None and length > positions:
        return [], [f"{where}.data: sequence_length {length} is more than the {whose}'s {positions} positions"]
    return [text.model_copy(update={"sequence_length": length}) for text in texts], []


def resolved(spec: TrainStage, shapes: Shapes, texts: Sequence[TrainingText]) -> TrainStage:
    """The stage with everything filled in that its result hangs on."""
    length, hidden = texts[0].length, width_of(shapes.config) or _FULL_WIDTH
    few = max(1, min(_BATCH_TOKENS // length, spec.tokens // (_LEAST_STEPS * length)))
    batch = spec.batch_size or 1 << (few.bit_length() - 1)  # which most numbers of processes divide
    steps = steps_of(spec.tokens, batch, length)
    full = _FULL_RATE * math.sqrt(_FULL_WIDTH / hidden) * (1.0 if taught(spec) else _TEXT_SHARE)
    return spec.model_copy(
        update={
            "data": list(texts),
            "batch_size": batch,
            "learning_rate": spec.learning_rate or float(f"{_LORA_RATE if spec.lora is not None else full:.2g}"),
            "evaluate_every": spec.evaluate_every or max(1, steps // _EVALUATIONS),
        }
    )


def steps_of(tokens: int, batch: int, length: int) -> int:
    """Steps that so many tokens take."""
    return max(1, -(-tokens // (batch * length)))


def _after(spec: TrainStage, shapes: Shapes) -> PlannedShapes:
    """The student's shapes; a tied head is not stored."""
    shape = spec.shape if isinstance(spec, DistillStage) else None
    modules, config, head = find_modules(shapes), dict(shapes.config), ""
    ties = shape is not None and bool(shape.tie_word_embeddings)
    if is_tied(shapes, modules) or ties:
        head = f"{modules.head}.weight"
    if ties and not is_tied(shapes, modules):
        config["tie_word_embeddings"] = True
    tensors = {name: info for name, info in shapes.tensors.items() if name != head}
    return PlannedShapes(shapes, config, tensors, merged_bytes(by_layer(tensors, modules.layers), {}))


def _forecast(spec: TrainStage, after: PlannedShapes, demand: Demand, place: Place) -> Forecast:
    """What one process takes that trains it; no memory where what is free is not known, since that decides it."""
    memory = None
    if place.free is not None and spec.batch_size is not None:
        optimizer = spec.optimizer
        if optimizer == "auto" and missing_extra("torchao", "train") is not None:
            optimizer = "adamw"
        share = max(1, spec.batch_size // place.world)
        with suppress(UserError):  # which the run says
            again = spec.checkpoint_activations
            memory = demand.bytes(demand.choose(share, place.free, spec.kind, spec.micro_batch, optimizer, again))
    disk = 2 * after.bytes + 44 * trainable(spec, after) + (spec.after + spec.tokens) * 5
    on_gpu = place.device == "cuda"
    gpu = None if memory is None or not on_gpu else memory - LIBRARIES
    if memory is not None and place.held is not None:
        memory += place.held - LIBRARIES
    return Forecast(
        output_bytes=after.bytes, memory_bytes=None if on_gpu else memory, gpu_memory_bytes=gpu, disk_bytes=disk
    )


def body_of(shapes: Shapes) -> Body:
    """A model in numbers."""
    config, modules = shapes.config, find_modules(shapes)
    hidden = width_of(config) or next(iter(modules.linears.values()))[1]
    heads = int(config.get("num_attention_heads") or 1)
    width = int(config.get("head_dim") or hidden // heads)
    vocabulary = int(config.get("vocab_size") or 0)
    inside = sum(math.prod(shape) for shape in modules.linears.values())
    layers = depth_of(config) or 1
    ffn = int(config.get("intermediate_size") or config.get("ffn_dim") or 4 * hidden)
    keys = int(config.get("num_key_value_heads") or heads) * width
    return Body(
        parameter_count(shapes), inside + vocabulary * hidden, layers, hidden, ffn, heads * width, keys, vocabulary
    )


def trainable(spec: TrainStage, shapes: Shapes) -> int:
    """Weights that are trained."""
    if spec.lora is not None:
        linears = find_modules(shapes).linears
        return spec.lora.rank * sum(sum(shape) for name, shape in linears.items() if spec.lora.takes(name))
    if spec.train is not None:
        chosen_names = [name for name in shapes.tensors if any(fnmatchcase(name, glob) for glob in spec.train)]
        return sum(math.prod(shapes.tensors[name].shape) for name in chosen_names)
    return parameter_count(shapes)


def demand_of(
    spec: TrainStage, shapes: Shapes, teacher: Shapes | None, length: int, width: int, device: str, world: int
) -> Demand:
    """What the stage needs memory for; `teacher` where it is asked at each step."""
    asked = None if teacher is None else body_of(teacher)
    return Demand(body_of(shapes), trainable(spec, shapes), asked, length, width, device, world, _cacheable(spec))


def _cacheable(spec: TrainStage) -> bool:
    """Whether a teacher's targets can be drawn once and kept: for forward KL at temperature 1."""
    return not isinstance(spec, DistillStage) or (set(spec.losses.used) <= {"kl", "ce"} and spec.temperature == 1)


def _lines(spec: TrainStage, student: Body, demand: Demand, teacher: Body | None) -> list[tuple[str, str]]:
    assert spec.batch_size is not None
    length = demand.length
    steps = steps_of(spec.tokens, spec.batch_size, length)
    tokens = steps * spec.batch_size * length
    asked = teacher if spec.targets == "online" or teacher is None else None
    each = step_flops(student, asked, length, demand.trainable / student.parameters)
    drawn = 0.0 if spec.targets == "online" or teacher is None else teacher.forward(length)
    total = tokens * (each + drawn)
    least, most = Setup(1, "adamw8bit", True), Setup(max(1, _BATCH_TOKENS // length), "adamw", False)
    hours = total / (PEAKS[_NAMED] * _USED) / 3600
    texts = spec.data if isinstance(spec.data, list) else []
    names = ", ".join(text if isinstance(text, str) else text.name or Path(text.source).name for text in texts)
    how = f"lora of rank {spec.lora.rank}" if spec.lora is not None else "all weights" if spec.train is None else "some"
    return [
        ("stage", f"{spec.title}: {how}, {count(demand.trainable)} of {count(student.parameters)} parameters trained"),
        ("text", f"{names}: {steps} steps of {spec.batch_size} x {length}, {count(tokens)} tokens"),
        ("memory", f"{size(demand.bytes(least))} to {size(demand.bytes(most))} on one GPU, by what is free"),
        ("time", f"{total:.2g} operations, {_hours(hours)} on an {_NAMED} at {100 * _USED:.0f} % of its arithmetic"),
    ]


def _hours(hours: float) -> str:
    return f"{60 * hours:.1f} minutes" if hours < 1 else f"{hours:.1f} hours"
