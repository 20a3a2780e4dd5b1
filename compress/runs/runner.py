"""Runs a recipe: stages in order, each skipped when its artefact is there; then verification, evaluation, the report.

What is finished is named by fingerprints, so the same command continues a run that was stopped anywhere, and never
does anything twice. The output folder appears by one rename, with the checkpoint and its report in it.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress import records
from compress.data.calibration import TokenSet, load_calibration
from compress.errors import OutputError, RecipeError, UserError
from compress.evaluation.base import check_base
from compress.evaluation.served import find_engine
from compress.evaluation.stock import loader_ahead, start_anew
from compress.evaluation.tasks.ask import Scores
from compress.evaluation.tasks.compared import base_scores
from compress.evaluation.verify import probe_of, probe_tokens
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.identity import DIGESTS, identity
from compress.model.shapes import check_vocabulary, model_dtype, parameter_count
from compress.model.source import lock_of, resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.load import load_recipe
from compress.recipe.schema import Recipe
from compress.recipe.types import StageSpec
from compress.runs.artefact import (
    MATTERS,
    StageArtefact,
    check_output,
    check_work,
    is_work,
    work_folder,
    write_output,
)
from compress.runs.builds import check_planned
from compress.runs.exported import check_exports, make_exports, note_unasked
from compress.runs.exporters import Exporter
from compress.runs.foreseen import place_now, with_forecast
from compress.runs.gguf_file import make_gguf, planned_files, with_gguf
from compress.runs.measure import Measurement, answers, calibration_of, prompts_of, read_windows, with_figures
from compress.runs.plan import RunPlan, other_models, plan_run
from compress.runs.tracked import track
from compress.stages import KINDS
from compress.stages.contract import Result
from compress.system import distributed
from compress.system.compute import pick_device, pick_dtype
from compress.system.files import make_writable, writing
from compress.system.fingerprint import fingerprint
from compress.system.locks import FileLock, InUseError, remove_unused_locks
from compress.system.machine import machine, versions
from compress.system.memory import available, fitting
from compress.system.programs import Engine
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    overrides: Sequence[str] = (),
    model: str | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    work_dir: str | Path | None = None,
    fresh: bool = False,
    max_memory: int | None = None,
    reporter: Reporter | None = None,
) -> records.Report | None:
    """Run a recipe: compress a model, verify the checkpoint, measure what it cost.

    The same call continues a run that was stopped, and repeats nothing that is finished.

    Args:
        recipe: a recipe, its keys and values, its path, or the name of a bundled one.
        overrides: `path=value` assignments such as `stages.0.bits=3`.
        model: replaces the recipe's.
        output: replaces the recipe's.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: for intermediate artefacts; None is `.dscompress` beside the output.
        fresh: forget what earlier runs of this recipe finished.
        max_memory: bytes of memory to keep to on the device; None is what is free.
        reporter: told what happens; None says it on standard error.

    Returns:
        The report, as it is written beside the checkpoint; None in a process that only helped another one.

    Raises:
        UserError: something in the recipe, the model, the text or the folders that the user can mend.
        DscompressError: a run that failed otherwise.
    """
    if not isinstance(recipe, Recipe):
        reference = recipe if isinstance(recipe, Mapping) else str(recipe)
        where = None if output is None else str(output)
        recipe = load_recipe(reference, overrides=overrides, model=model, output=where)
    if recipe.sweep is not None:
        raise RecipeError([f"{recipe.name}: has a sweep, which gives many results; use dscompress sweep"])
    work = None if work_dir is None else Path(work_dir).absolute()
    job = _Job(recipe, device, work, fresh, max_memory, reporter or Reporter())
    with job.in_its_place(), fitting(), loader_ahead(device, max_memory), ExitStack() as kept:
        job.prepare(kept)
        parent, parent_id = job.base, job.base_id
        stages = []
        for number in range(len(job.planned.parts)):
            spec = job.planned.specs[number]
            if spec.starts_from is not None:
                parent, job.layers = Checkpoint(job.models[spec.starts_from]), None
            artefact, stage = job.find(spec, parent, parent_id, kept)
            if stage is None:
                foreseen = job.planned.forecast(number, parent, place_now(job.context))
                result = job.work_of(number, parent, parent_id, artefact)()
                stage = job.commit(artefact, with_forecast(result, foreseen), parent_id)
            parent, parent_id = Checkpoint(artefact.folder), artefact.key
            job.went_through(number, stage, artefact, parent)
            stages.append(stage)
        return job.finish(stages) if distributed.leave() else None


_ROOMY = 16 * 2**30  # free bytes of a GPU, of which a waiting loader may hold half a gigabyte


class _Job:
    """One run under way; `prepare` finds what the stages start from."""

    base: Checkpoint
    base_id: str
    models: dict[str, Path]
    planned: RunPlan
    context: Context
    windows: list[TokenSet]
    engine: Engine | str | None
    exporters: list[Exporter]

    def __init__(
        self,
        recipe: Recipe,
        device: str,
        work_dir: Path | None,
        fresh: bool,
        max_memory: int | None,
        reporter: Reporter,
    ) -> None:
        self.recipe, self.device, self.fresh, self.max_memory = recipe, device, fresh, max_memory
        self.reporter = reporter
        self.output = Path(recipe.output).resolve()  # behind a link: what is replaced is the folder, not the link
        self.work = work_folder(self.output, work_dir)
        self.cache = self.work / "evaluations"
        self.started = time.monotonic()
        self.layers: list[int] | None = None  # of the base, that the last stage's result has
        self.made: list[StageArtefact] = []
        self.scores: Scores | None = None

    @contextmanager
    def in_its_place(self) -> Iterator[None]:
        """Hold the output against other runs; a run that fails before it has made anything leaves no work folder.

        Raises:
            OutputError: folders that can't be written, or an output that another run is writing.
        """
        if distributed.rank() > 0:
            distributed.barrier()
            with writing(self.work):
                yield
            return
        check_output(self.output)
        check_work(self.work, self.output, self.recipe.model)
        lock = FileLock(self.output.with_name(f".{self.output.name}.lock"))
        try:
            lock.acquire(exclusive=True)
        except InUseError as error:
            raise OutputError(
                f"{self.output}: being written by {error.holder}; wait for that run, or choose another --output"
            ) from None
        try:
            make_writable(self.work)
            distributed.barrier()
            with writing(self.work):
                yield
        except BaseException:
            if not any(is_work(path) for path in self.work.rglob("*")):
                with suppress(OSError):  # there may be a file in the folder's place
                    (self.work / DIGESTS).unlink()
                remove_unused_locks(self.work)
                with suppress(OSError):
                    self.work.rmdir()
            raise
        finally:
            lock.remove()

    def prepare(self, kept: ExitStack) -> None:
        """Open the model, check everything that can be checked, read the text; `kept` holds on to the model."""
        distributed.check_shared(self.work)
        recipe, folder = self.recipe, self._model()
        if folder.parent == self.work / "base" and distributed.rank() == 0:
            kept.enter_context(lock_of(folder)).acquire(exclusive=False, waiting=self.reporter.say)
        self.models = self._other_models()
        self.planned = plan_run(recipe, folder, self.models)
        check_planned(self.planned)
        assert self.planned.base is not None, "the model has been found"
        base = self.base = self.planned.base
        for line in self.planned.warnings:
            self.reporter.warn(line)
        gguf = recipe.writes_gguf  # which llama.cpp serves
        self.gguf_bytes = sum(planned_files(self.planned).values()) if gguf else 0
        self.exporters = check_exports(self.planned) if distributed.rank() == 0 else []
        note_unasked(self.exporters, self.reporter)
        self.engine = None
        if recipe.serve is not None and not gguf and distributed.rank() == 0:
            self.engine = find_engine(recipe.serve.python)
        if isinstance(self.engine, str):  # now, not after hours
            self.reporter.warn(f"serve: {self.engine}")
        tokenizer = load_tokenizer(base.folder, recipe.trust_remote_code)
        self.context = self._context(tokenizer)
        self.windows = []
        if recipe.evaluate is not None and distributed.rank() == 0:  # a text that can't be used stops the run at once
            self.windows = read_windows(recipe.evaluate, tokenizer, self.planned.windows, self.reporter)
        read = [each.tokens for each in (self.context.tokens, *self.windows) if each is not None]
        check_vocabulary(base, max(int(tokens.max()) for tokens in [self.context.probe, *read]))
        self.base_id = distributed.first(lambda: identity(base, self.work))
        prompts = prompts_of(recipe.evaluate) if self.planned.stages[-1].generates else []
        check_base(base, self.base_id, self.context, self.cache, prompts, self.fresh)
        device = self.context.device
        if device.type == "cuda" and available(device, self.max_memory) < _ROOMY:
            start_anew()
        if recipe.evaluate is not None and recipe.evaluate.tasks is not None:
            self.scores = distributed.first(self._base_scores)

    def _base_scores(self) -> Scores:
        spec, stock = self.recipe.evaluate, self.planned.stages[-1].generates
        assert spec is not None
        return base_scores(self.base, self.base_id, spec, self.context, answers(self.cache), self.fresh, stock)

    def find(
        self, spec: StageSpec, parent: Checkpoint, parent_id: str, kept: ExitStack
    ) -> tuple[StageArtefact, records.Stage | None]:
        """A stage's artefact, and its record if it was finished before; `kept` holds on to it until the run ends."""
        context, kind = self.context, KINDS[spec.kind].run()
        needed = context.tokens.sha256 if context.tokens is not None and spec.calibrates else None
        # several processes round sums in another order; training can be taken up by another number of them
        more = [distributed.world()] if distributed.world() > 1 else []
        if hasattr(kind, "reads"):
            more = kind.reads(spec, self.sharing(parent_id))
        key = fingerprint(spec.identity(), parent_id, needed, str(context.dtype), kind.CODE_VERSION, *more)
        if distributed.first(lambda: key) != key:
            raise UserError(
                f"process {distributed.rank()} has another model, precision or version of dscompress than process 0; "
                "start all with the same"
            )
        artefact = kept.enter_context(StageArtefact(self.work, key, f"{spec.kind} stage", self.reporter.say))
        found = distributed.first(lambda: artefact.find(self.fresh, context.device.type, parent.folder))
        if found is None:
            return artefact, None
        self.reporter.say(f"{spec.kind}: finished before, taken from {artefact.folder}")
        return artefact, found.stage.model_copy(update={"cached": True, "spec": spec.model_dump(mode="json")})

    def sharing(self, parent_id: str) -> Context:
        """The context of a stage on this parent, with the folder that it may share with other runs' stages."""
        text = None if self.context.tokens is None else self.context.tokens.sha256
        here = [self.context.device.type, *(version for name, version in versions().items() if name in MATTERS)]
        shared = self.work / "scores" / fingerprint(parent_id, text, str(self.context.dtype), *here)
        return replace(
            self.context, base=self.base, layers=self.layers, fresh=self.fresh, shared=shared, work=self.work,
            models=self.models, tracker=self.recipe.tracker, tracked=self.recipe.name,
        )  # fmt: skip

    def work_of(self, number: int, parent: Checkpoint, parent_id: str, artefact: StageArtefact) -> Callable[[], Result]:
        """What a stage does to its parent; in process 0 alone where several can't share the work."""
        spec, context, world = self.planned.specs[number], self.sharing(parent_id), distributed.world()
        work: Callable[[], Result] = partial(KINDS[spec.kind].run().run, spec, parent, artefact.part, context)
        if world == 1 or self.planned.stages[number].splits:
            return work
        self.reporter.say(f"{spec.title}: runs in one of the {world} processes, and the others wait")
        return partial(distributed.on_first, work)

    def commit(self, artefact: StageArtefact, result: Result, parent_id: str) -> records.Stage:
        """Give what a stage has made its place; returns the record."""
        probe = probe_of(result.logits, self.context.probe[0], self.context.dtype)
        distributed.first(lambda: artefact.commit(result, parent=parent_id, base=self.base_id, probe=probe))
        return result.record

    def went_through(self, number: int, stage: records.Stage, artefact: StageArtefact, result: Checkpoint) -> None:
        """Plan what follows on what a stage has made, which chooses its shape where it compares several."""
        self.made.append(artefact)
        if stage.pruned is None:
            return
        before = self.layers or list(range(stage.pruned.before["num_hidden_layers"]))
        self.layers = [own for index, own in enumerate(before) if index not in stage.pruned.removed_layers]
        self.planned = self.planned.behind(number, result)

    def finish(self, stages: list[records.Stage]) -> records.Report:
        """Measure the result and write it to the output."""
        recipe, last = self.recipe, self.made[-1]
        with ExitStack() as held:
            if recipe.writes_gguf:  # there are no exports beside it
                gguf = make_gguf(recipe, last, self.base, self.base_id, self.work, self.fresh, self.context, held)
                report = with_gguf(self._report(stages), gguf, self.gguf_bytes)
                files, digests = gguf.files, gguf.digests
            else:
                made = make_exports(self.exporters, recipe, last, self.work, self.fresh, self.context, held)
                report, files, digests = made.added_to(self._report(stages)), made.files, made.digests
            write_output(last.folder, self.output, report, files, digests)
        track(report, recipe.tracker, self.work, self.reporter)
        return report

    def _report(self, stages: list[records.Stage]) -> records.Report:
        base, shapes, last = self.base, self.planned.stages[-1].shapes, stages[-1]
        assert shapes is not None
        measured = [self._measurement(artefact) for artefact in self.made]
        result = measured[-1].result
        with measured[-1].opening(self.recipe.evaluate) as opened:
            headline = [each.quality(text) for text in self.windows[:1] for each in measured]
            further = [measured[-1].quality(text) for text in self.windows[1:]]
            found = opened(self.made[-1].logits())
        qualities: list[records.Quality | None] = [*headline] or [None] * len(measured)
        if self.scores is not None and self.recipe.evaluate is not None and qualities[-1] is not None:
            qualities[-1] = measured[-1].with_tasks(qualities[-1], self.recipe.evaluate, self.scores)
        speed, speed_note = measured[-1].speed() if self.windows else (None, None)
        served = None if self.engine is None else measured[-1].served(self.engine)
        stages = [with_figures(*each) for each in zip(stages, measured, qualities, self.planned.stages, strict=True)]
        parameters = parameter_count(shapes)
        compressed = records.Compressed(
            path=str(self.output), bytes=result.bytes, parameters=parameters, format=last.format,
            bits_per_weight=8 * result.bytes / parameters, quantized_bits_per_weight=last.quantized_bits_per_weight,
        )  # fmt: skip
        return records.Report(
            name=self.recipe.name, recipe=self.recipe.shown(), created=records.now(),
            seconds=time.monotonic() - self.started,
            base=records.Base(
                model=self.recipe.model, bytes=base.bytes, parameters=parameter_count(base), fingerprint=self.base_id
            ),
            compressed=compressed, size_ratio=base.bytes / result.bytes, quality=qualities[-1], further=further,
            stages=stages,
            calibration=calibration_of(self.context.tokens), generations=found.generations, generations_note=found.note,
            verified=found.verified, speed=speed, speed_note=speed_note, machine=machine(self.context.device),
            served=served, versions=versions(), warnings=self.reporter.warnings,
        )  # fmt: skip

    def _measurement(self, artefact: StageArtefact) -> Measurement:
        result = Checkpoint(artefact.folder)
        return Measurement(self.base, self.base_id, result, artefact.key, self.context, self.cache, self.fresh)

    def _model(self) -> Path:
        """The model's folder; rank 0 gets it before others look for it, which may be on other machines."""
        model, revision, say = self.recipe.model, self.recipe.revision, self.reporter.say
        folder = distributed.first(lambda: resolve_model(model, revision, self.work, say))
        return folder if distributed.rank() == 0 else resolve_model(model, revision, self.work, say)

    def _other_models(self) -> dict[str, Path]:
        """Folders of the models that stages name."""
        found = {}
        for name in other_models(self.recipe):
            folder = distributed.first(lambda: resolve_model(name, None, self.work, self.reporter.say))  # noqa: B023
            found[name] = folder if distributed.rank() == 0 else resolve_model(name, None, self.work, self.reporter.say)
        return found

    def _context(self, tokenizer: "PreTrainedTokenizerBase") -> Context:
        """Device, precision and calibration tokens."""
        recipe, base = self.recipe, self.base
        device = pick_device(self.device, self.max_memory)
        tokens = self._tokens(tokenizer) if self.planned.calibrates else None
        stored = torch.float16 if model_dtype(base) == "F16" else torch.bfloat16
        dtype = pick_dtype(device, stored)
        probe = probe_tokens(base.folder, recipe.trust_remote_code)[None]
        cpu = f"{torch.get_num_threads()} CPU threads"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        self.reporter.say(f"{recipe.model}: {base.bytes / 1e6:,.0f} MB; computing in {dtype} on {where}")
        return Context(device, dtype, tokens, probe, self.reporter, recipe.trust_remote_code, self.max_memory)

    def _tokens(self, tokenizer: "PreTrainedTokenizerBase") -> TokenSet:
        tokens = distributed.first(lambda: load_calibration(self.planned.text, tokenizer))
        if tokens.sequences < distributed.world():
            raise UserError(
                f"calibration: {tokens.sequences} sequences are fewer than the {distributed.world()} processes; "
                "use more samples or fewer processes"
            )
        for warning in tokens.warnings:
            self.reporter.warn(warning)
        self.reporter.say(f"calibrating on {tokens.sequences} x {tokens.sequence_length} tokens of {tokens.name}")
        return tokens
