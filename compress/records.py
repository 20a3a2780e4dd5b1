"""Typed records: `report.json`, what a run came to, and `dscompress.json`, how a checkpoint came to be.

A field added later comes with a default, so that the reports of older versions still load. Sizes are bytes measured
on disk, times are seconds, `bits_per_weight` is 8 * bytes / parameters. None means: not measured, never zero.
"""

from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, ValidationError

from compress.export_records import Export
from compress.forecast_records import Forecast
from compress.record_types import Count, Typed
from compress.served_records import Served
from compress.task_records import Task, TaskDecision

RECORD = "dscompress.json"

Interval = tuple[float, float]
Seconds = Annotated[float, Field(ge=0)]


class Base(Typed):
    """The model before: where it came from and its safetensors bytes (or the bytes that they would be)."""

    model: str
    bytes: Count
    parameters: Count
    fingerprint: str | None = None


class Compressed(Typed):
    """The checkpoint written. `quantized_bits_per_weight` counts the quantized matrices only, their scales included.

    `file` is the .gguf file inside `path` that holds its weights, whose bytes are counted, the first of `files` where
    there are parts; None: safetensors do.
    """

    path: str
    bytes: Count
    parameters: Count
    bits_per_weight: float
    quantized_bits_per_weight: float | None = None
    format: str | None = None
    file: str | None = None
    files: Count | None = None


class Perplexity(Typed):
    """Perplexity of both models on the same tokens; never compare two protocols. `tokens` counts the predicted ones."""

    base: float
    compressed: float
    dataset: str
    sequence_length: Count
    windows: Count | None = None
    tokens: Count


class Divergence(Typed):
    """KL(base || compressed), nats per token: mean with its 95 % interval (None for one window), 99th percentile."""

    mean: float
    ci95: Interval | None
    p99: float


class Agreement(Typed):
    """Share of positions, 0 to 1, at which both models rank the same token first."""

    mean: float
    ci95: Interval | None


class Place(Typed):
    """A place of the text: what stood before it, what came, and the likeliest tokens of both with their probabilities.

    `position` is that of the token that came, in its window.
    """

    window: Count
    position: Count
    kl: float
    before: str
    came: str
    base: list[tuple[str, float]]
    compressed: list[tuple[str, float]]


class Quality(Typed):
    """What compression cost, and how that was measured (`protocol`, in words)."""

    perplexity: Perplexity
    kl: Divergence
    top1_agreement: Agreement
    tasks: dict[str, Task] = {}
    task_decision: TaskDecision | None = None
    kl_per_window: list[float] = []
    worst: list[Place] = []
    dtype: str | None = None
    protocol: str | None = None


class Module(Typed):
    """One quantized matrix of shape [O, I].

    `error` is the relative output error ||(W - W^) X||^2 / ||W X||^2 on the calibration inputs (None without
    calibration), `weight_error` is ||W - W^||^2 / ||W||^2. `fallback` says what was used instead, and why.
    `inputs` is how its inputs are rounded as the model runs (dynamic, static; None: not at all); `error` then counts
    that too. `errors` are those under either, where one was chosen by them; `smooth` is SmoothQuant's power,
    from which `auto` goes on.
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    error: float | None = None
    weight_error: float | None = None
    damp: float | None = None
    fallback: str | None = None
    dtype: str = "int"
    inputs: str | None = None
    errors: dict[str, float] = {}
    smooth: float | None = None


class PrunedModule(Typed):
    """One linear of a pruned layer, solved anew: [O, I] is its shape now, `before` what it was.

    `error` is |W' X - T|^2 / |T|^2, where T is what the original model's linear puts out with the drift of what comes
    before it, `error_cut` the same of the weights that were merely kept; None where it was not measured.
    Beside a layer's last linear, `layer_error` and `layer_error_trained` are the whole layer's relative output error on
    calibration text that it was not trained on, before and after reconstruction.
    """

    name: str
    shape: tuple[int, int]
    before: tuple[int, int]
    error: float | None = None
    error_cut: float | None = None
    layer_error: float | None = None
    layer_error_trained: float | None = None


class SparseModule(Typed):
    """One matrix of shape [O, I] in which single weights were set to zero; `error` is as for `Module`."""

    name: str
    shape: tuple[int, int]
    zeros: float
    error: float | None = None


AnyModule: TypeAlias = Module | PrunedModule | SparseModule


class Pruned(Typed):
    """What structured pruning removed: sizes by config.json's names, parameters, and which layers (numbers before).

    `calibration_kl` is the divergence from the parent on calibration text, nats per token; `tried` has it for every
    shape that was compared.
    """

    before: dict[str, int]
    after: dict[str, int]
    parameters_before: Count
    parameters: Count
    share: float
    share_of_layers: float
    removed_layers: list[int] = []
    calibration_kl: float | None = None
    tried: dict[str, float] = {}


class TrainedText(Typed):
    """A text that was trained on: `tokens` of it are different ones, `passes` is how often they were gone through."""

    name: str
    licence: str | None = None
    tokens: Count
    passes: float


class Trained(Typed):
    """What training did.

    `loss` says what was minimised ("kl", "kl + 0.1 ce"), `losses` and `held_out` are (step, mean loss) pairs: of the
    steps since the pair before, and on sequences that were not trained on (first of them: before training). `tokens`
    counts all positions of all batches, `scored` those with a loss. `best_step` is whose weights were kept.
    `rolled_back` lists the steps at which the loss broke out and training went back to an earlier state. `mfu` is the
    share of the device's arithmetic that was used, teacher included; None where its peak is not known.
    """

    loss: str
    teacher: str | None = None
    tokens: Count
    scored: Count
    steps: Count
    planned_steps: Count
    batch_size: Count
    sequence_length: Count
    learning_rate: float
    optimizer: str
    trainable: Count
    texts: list[TrainedText]
    losses: list[tuple[int, float]] = []
    held_out: list[tuple[int, float]] = []
    best_step: Count | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    cached_bytes_per_token: float | None = None
    rolled_back: list[int] = []
    stopped: str | None = None
    zeros_kept: Count = 0


class Layer(Typed):
    """One decoder layer; `layer` is None for what lies outside of the layers (head, embeddings)."""

    layer: int | None
    seconds: Seconds
    modules: list[AnyModule] = []


class Stage(Typed):
    """One stage as it ran: its spec, cost and layers. `cached`: taken from an earlier run, whose cost it states.

    `format` is that of the checkpoint it wrote (None for a dense one), `quantized_bits_per_weight` counts the quantized
    matrices alone, their scales included. `parameters` and `bytes` are those of its checkpoint; `perplexity` and `kl`
    (from the recipe's model) are measured like the report's own, where a recipe has several stages. `forecast` is what
    it was expected to take.
    """

    kind: str
    spec: dict[str, Any] = {}
    seconds: Seconds
    peak_memory_bytes: Count | None
    peak_gpu_memory_bytes: Count | None = None
    cached: bool
    device: str | None = None
    dtype: str | None = None
    resumed_layers: Count = 0
    layers: list[Layer] = []
    pruned: Pruned | None = None
    trained: Trained | None = None
    parameters: Count | None = None
    bytes: Count | None = None
    perplexity: float | None = None
    kl: float | None = None
    format: str | None = None
    quantized_bits_per_weight: float | None = None
    forecast: Forecast | None = None


class Calibration(Typed):
    """The calibration text that was used."""

    name: str | None
    source: str
    licence: str | None = None
    sequences: Count
    sequence_length: Count
    tokens: Count
    sha256: str | None = None


class Generation(Typed):
    """Greedy continuations of one prompt."""

    prompt: str
    base: str
    compressed: str


class Verified(Typed):
    """The written checkpoint opened again by `loader` and compared with what was computed."""

    loader: str
    max_logit_difference: float | None
    tolerance: float | None = None
    passed: bool
    note: str | None = None


class Pace(Typed):
    """A checkpoint opened by the stock loader in a process of its own: medians. Memory is what is resident, all told.

    `prefill` is one pass over the prompt, `decode` greedy, token by token, with the cache that the prompt left.
    `waited` is the share of its time that a thread stood ready while something else had the core.
    """

    dtype: str
    prefill_tokens_per_second: Annotated[float, Field(gt=0)]
    decode_tokens_per_second: Annotated[float, Field(gt=0)]
    loaded_bytes: Count
    peak_bytes: Count
    waited: Annotated[float, Field(ge=0)]


class Speed(Typed):
    """Base in bf16 and result on one CPU, by turns, `rounds` times. `cpu_flags`: its instructions for small numbers."""

    cpu: str
    cpu_flags: list[str]
    threads: Count
    prompt_tokens: Count
    new_tokens: Count
    rounds: Count
    base: Pace
    compressed: Pace

    @property
    def busy(self) -> bool:
        """Whether other work slowed them so much that the figures say little."""
        return max(self.base.waited, self.compressed.waited) > 0.05


class Machine(Typed):
    """Where it ran."""

    cpu: str
    cores: Count
    memory_bytes: Count
    gpu: str | None = None


class Report(Typed):
    """`report.json`. `size_ratio` is base bytes / compressed bytes; `created` is ISO 8601; `seconds` the whole run.

    `quality` is on the first text of the evaluation, `further` on the others.
    """

    name: str
    recipe: dict[str, Any]
    created: str
    seconds: Seconds
    base: Base
    compressed: Compressed
    size_ratio: float
    quality: Quality | None
    further: list[Quality] = []
    stages: list[Stage]
    calibration: Calibration | None = None
    generations: list[Generation] = []
    generations_note: str | None = None
    verified: Verified | None
    speed: Speed | None = None
    speed_note: str | None = None
    served: Served | None = None
    exports: list[Export] = []
    machine: Machine | None = None
    versions: dict[str, str]
    warnings: list[str] = []


class Probe(Typed):
    """What the model in memory said to a few tokens, so that the checkpoint can be asked the same anywhere.

    Args:
        tokens: token ids, one sequence.
        best: the most likely next token at every position.
        logit: its logit.
        dtype: in what precision.
    """

    tokens: list[int]
    best: list[int]
    logit: list[float]
    dtype: str


class Record(Typed):
    """dscompress.json: how a checkpoint came to be; `files` has the SHA-256 of each of its other files, by name."""

    fingerprint: str
    parent: str
    base: str
    stage: Stage
    probe: Probe
    files: dict[str, str]
    created: str
    versions: dict[str, str]


def read_record(folder: Path) -> Record | None:
    """The record of an artefact, or None where there is none that this version can read."""
    try:
        return Record.model_validate_json((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def now() -> str:
    """The time, ISO 8601, UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
