"""Runs a recipe: stages in order, each skipped when its artefact is there; then verification, evaluation, the report.

What is finished is named by fingerprints, so the same command continues a run that was stopped anywhere, and never
does anything twice. The output folder appears by one rename, with the checkpoint and its report in it.
"""

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress import records
from compress.errors import DscompressError, OutputError, UserError
from compress.evaluate.stock import started_ahead
from compress.model.checkpoint import Checkpoint, read_part
from compress.model.shapes import check_vocabulary, parameter_count
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.quantize import WeightOnlyStage
from compress.recipe.schema import EvaluateSpec, Recipe
from compress.records import RECORD, Record, now, read_record
from compress.run.artefact import check_output, keep_foreign, publish, work_folder
from compress.run.plan import calibration_of, evaluation_length, open_model
from compress.run.warnings import cautions
from compress.stages.quantize.few_tokens import few_tokens
from compress.stages.quantize.plan import plan_matrices, quantized_bytes
from compress.system import distributed
from compress.system.files import commit, make_writable, write_text, writing
from compress.system.fingerprint import digests, fingerprint
from compress.system.locks import RunLock
from compress.system.machine import machine, versions
from compress.system.memory import available
from compress.system.progress import Reporter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from compress.data.calibration import TokenSet
    from compress.stages.context import Context

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that returns the largest number in a list.",
    "A train leaves at 9:40 and arrives at 11:15. How long is the journey?",
)


@dataclass(frozen=True)
class Options:
    """What the command line adds to a recipe.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: for intermediate artefacts; None is `.dscompress` beside the output.
        fresh: forget what earlier runs of this recipe finished.
        max_memory: bytes of memory to keep to on the device; None is what is free.
    """

    device: str = "auto"
    work_dir: Path | None = None
    fresh: bool = False
    max_memory: int | None = None


def run(recipe: Recipe, options: Options, reporter: Reporter) -> records.Report | None:
    """Run a recipe to its report; None in a process that only helped another one with the stages.

    Raises:
        UserError: something in the recipe, the model, the text or the folders that the user can mend.
        DscompressError: a run that failed otherwise.
    """
    output = Path(recipe.output).resolve()  # behind a link: what is replaced is the folder, not the link
    work = work_folder(output, options.work_dir)
    leads = distributed.rank() == 0
    if leads:
        check_output(output)
        if work == output or output in work.parents:
            raise OutputError(f"--work-dir {work}: lies in the output folder; name another folder")
        make_writable(output.parent)
    with RunLock(work) if leads else nullcontext(), writing(work), _fitting():
        distributed.barrier()
        return _Run(recipe, options, reporter, output, work).run()


@contextmanager
def _fitting() -> Iterator[None]:
    """Turn running out of memory into one line; torch says it as a RuntimeError, by its words on a CPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if isinstance(error, RuntimeError) and "out of memory" not in words and "can't allocate memory" not in words:
            raise
        raise DscompressError(
            f"out of memory ({words.splitlines()[0] if words else 'MemoryError'}); use fewer or shorter calibration "
            "sequences (--set calibration.samples=32) or a device with more, then run again to continue"
        ) from error


class _Run:
    """One run under way."""

    def __init__(self, recipe: Recipe, options: Options, reporter: Reporter, output: Path, work: Path) -> None:
        self.recipe, self.options, self.reporter = recipe, options, reporter
        self.output, self.work = output, work
        self.started = time.monotonic()

    def run(self) -> records.Report | None:
        recipe = self.recipe
        self._check_divisible()
        base = open_model(self._model(), recipe)
        for line in cautions(recipe, base):
            self.reporter.warn(line)
        tokenizer = load_tokenizer(base.folder, recipe.trust_remote_code)
        context = self._context(base, tokenizer)
        if (tokens := context.tokens) is not None:
            for number, spec in enumerate(recipe.stages):
                matrices = plan_matrices(spec, base, f"stages.{number}")
                for line in few_tokens(spec, matrices, tokens.count, tokens.sequence_length):
                    self.reporter.warn(line)
        windows = None
        if recipe.evaluate is not None and distributed.rank() == 0:
            windows = self._windows(recipe.evaluate, base, tokenizer)
        read = [context.probe, *(each.tokens for each in (tokens, windows) if each is not None)]
        check_vocabulary(base, max(int(each.max()) for each in read))
        base_id = fingerprint("base", base.fingerprint())
        parent, parent_id = base, base_id
        stages = []
        # beside a GPU the processor has time to get the stock loader ready
        with started_ahead() if context.device.type == "cuda" and distributed.rank() == 0 else nullcontext():
            for spec in recipe.stages:
                parent, parent_id, stage = self._stage(spec, parent, parent_id, base_id, context)
                stages.append(stage)
            if not distributed.leave():
                return None
            verified = self._verify(parent, parent_id, context)
        quality = self._evaluate(base, base_id, parent, parent_id, windows, context)
        generations, note = self._generate(base, base_id, parent, parent_id, context)
        speed, speed_note = None, None
        if recipe.evaluate is not None and recipe.stages[-1].format == "torchao" and context.device.type == "cpu":
            from compress.evaluate.speed import compare_speed

            cache = self.work / "evaluations"
            speed, speed_note = compare_speed(base, parent, parent_id, context, cache, self.options.fresh)
        report = records.Report(
            name=recipe.name, recipe=_shown(recipe), created=now(), seconds=time.monotonic() - self.started,
            base=records.Base(
                model=recipe.model, bytes=base.bytes, parameters=parameter_count(base), fingerprint=base_id
            ),
            compressed=self._compressed(base, parent, stages), size_ratio=base.bytes / parent.bytes, quality=quality,
            stages=stages, calibration=_calibration(context.tokens), generations=generations, generations_note=note,
            verified=verified, speed=speed, speed_note=speed_note, machine=machine(context.device), versions=versions(),
            warnings=self.reporter.warnings,
        )  # fmt: skip
        self._publish(parent.folder, report)
        return report

    def _check_divisible(self) -> None:
        """Whether the stages can be split over several processes."""
        world = distributed.world()
        for number, spec in enumerate(self.recipe.stages):
            if world > 1 and not isinstance(spec, WeightOnlyStage):
                raise UserError(
                    f"stages.{number}: method: {spec.method} runs in one process and there are {world}; remove --nproc"
                )

    def _model(self) -> Path:
        """The model's folder; rank 0 gets it before others look for it, which may be on other machines."""
        model, revision, say = self.recipe.model, self.recipe.revision, self.reporter.say
        folder = distributed.first(lambda: resolve_model(model, revision, self.work, say))
        return folder if distributed.rank() == 0 else resolve_model(model, revision, self.work, say)

    def _context(self, base: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> "Context":
        """Device, precision and calibration tokens."""
        import torch

        from compress.evaluate.verify import probe_tokens
        from compress.stages.context import Context
        from compress.system.compute import pick_device, pick_dtype

        recipe = self.recipe
        device = pick_device(self.options.device, self.options.max_memory)
        tokens = self._tokens(base, tokenizer) if any(s.calibrates for s in recipe.stages) else None
        stored = {"F16": torch.float16}.get(next(iter(base.tensors.values())).dtype, torch.bfloat16)
        dtype = pick_dtype(device, stored)
        probe = probe_tokens(base.folder, recipe.trust_remote_code)[None]
        cpu = f"{torch.get_num_threads()} CPU threads"
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
        self.reporter.say(f"{recipe.model}: {base.bytes / 1e6:,.0f} MB; computing in {dtype} on {where}")
        return Context(device, dtype, tokens, probe, self.reporter, recipe.trust_remote_code, self.options.max_memory)

    def _tokens(self, base: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> "TokenSet":
        from compress.data.calibration import load_calibration

        tokens = distributed.first(lambda: load_calibration(calibration_of(self.recipe, base), tokenizer))
        if tokens.sequences < distributed.world():
            raise UserError(
                f"calibration: {tokens.sequences} sequences are fewer than the {distributed.world()} processes; "
                "use more samples or fewer processes"
            )
        for warning in tokens.warnings:
            self.reporter.warn(warning)
        self.reporter.say(f"calibrating on {tokens.sequences} x {tokens.sequence_length} tokens of {tokens.name}")
        return tokens

    def _windows(self, spec: EvaluateSpec, base: Checkpoint, tokenizer: "PreTrainedTokenizerBase") -> "TokenSet":
        """The evaluation's windows, read before the first stage: a text that can't be used stops the run at once."""
        from compress.data.calibration import load_windows

        length = evaluation_length(spec, base)
        windows = load_windows(spec.text, tokenizer, sequence_length=length, windows=spec.windows)
        for warning in windows.warnings:
            self.reporter.warn(warning)
        return windows

    def _stage(
        self, spec: Any, parent: Checkpoint, parent_id: str, base_id: str, context: "Context"
    ) -> tuple[Checkpoint, str, records.Stage]:
        """A stage's artefact, made or found: the checkpoint, its fingerprint, its record."""
        from compress.evaluate.verify import probe_of
        from compress.stages.quantize.run import CODE_VERSION, PROBE, quantize

        needed = context.tokens.sha256 if context.tokens is not None and spec.calibrates else None
        processes = [distributed.world()] if distributed.world() > 1 else []  # they round sums in another order
        key = fingerprint(spec.model_dump(mode="json"), parent_id, needed, str(context.dtype), CODE_VERSION, *processes)
        if distributed.first(lambda: key) != key:
            raise UserError(
                f"process {distributed.rank()} has another model, precision or version of dscompress than process 0; "
                "start all with the same"
            )
        final, part = self.work / "stages" / key, self.work / "stages" / f"{key}.part"
        probe = self.work / "stages" / f"{key}.{PROBE}"

        def find() -> Record | None:
            if self.options.fresh:
                shutil.rmtree(final, ignore_errors=True)
                shutil.rmtree(part, ignore_errors=True)
            record = read_record(final)
            if record is not None and probe.is_file():
                shutil.rmtree(part, ignore_errors=True)
                return record
            return None

        def finish() -> None:
            logits = _logits(part / PROBE)
            files = digests(sorted((part / "checkpoint").iterdir()))
            record = Record(
                fingerprint=key, parent=parent_id, base=base_id, stage=stage, created=now(), versions=versions(),
                probe=probe_of(logits, context.probe[0], context.dtype), files=files,
            )  # fmt: skip
            write_text(part / "checkpoint" / RECORD, record.model_dump_json(indent=2) + "\n")
            (part / PROBE).replace(probe)
            commit(part / "checkpoint", final)
            shutil.rmtree(part, ignore_errors=True)

        record = distributed.first(find)
        if record is not None:
            self.reporter.say(f"{spec.kind}: finished before, taken from {final}")
            return Checkpoint(final), key, record.stage.model_copy(update={"cached": True})
        stage = quantize(spec, parent, part, context)
        distributed.first(finish)
        return Checkpoint(final), key, stage

    def _verify(self, result: Checkpoint, key: str, context: "Context") -> records.Verified:
        from compress.evaluate.verify import verify_logits
        from compress.stages.quantize.run import PROBE

        self.reporter.say("verifying: opening the checkpoint again")
        expected = _logits(self.work / "stages" / f"{key}.{PROBE}")
        verified = verify_logits(
            result.folder, context.probe[0], expected, context.device, context.dtype, context.trust_remote_code,
            context.max_memory,
        )  # fmt: skip
        if not verified.passed:
            reason = verified.note or "it differs"
            self.reporter.warn(f"the written checkpoint was not verified by {verified.loader}: {reason}")
        return verified

    def _evaluate(
        self,
        base: Checkpoint,
        base_id: str,
        result: Checkpoint,
        key: str,
        windows: "TokenSet | None",
        context: "Context",
    ) -> records.Quality | None:
        if windows is None:
            return None
        from compress.evaluate.compare import CODE_VERSION, compare
        from compress.formats.dequantized import DequantizedCheckpoint

        cache = self.work / "evaluations"
        found = cache / f"{fingerprint(base_id, key, windows.sha256, str(context.dtype), CODE_VERSION)}.json"
        if found.is_file() and not self.options.fresh:
            return records.Quality.model_validate_json(found.read_text(encoding="utf-8"))
        quality = records.Quality.model_validate(
            compare(DequantizedCheckpoint(base), DequantizedCheckpoint(result), windows, context, cache, base_id)
        )
        write_text(found, quality.model_dump_json())
        return quality

    def _generate(
        self, base: Checkpoint, base_id: str, result: Checkpoint, key: str, context: "Context"
    ) -> tuple[list[records.Generation], str | None]:
        """Continuations of the prompts by both models, or why there are none."""
        spec = self.recipe.evaluate
        if spec is None:
            return [], "evaluation is turned off"
        if result.config["quantization_config"]["quant_method"] == "gptq":
            return [], "transformers opens the gptq format with optimum and gptqmodel installed; not asked here"
        needed = int(parameter_count(base) * context.dtype.itemsize * 1.3)
        free = available(context.device, context.max_memory)
        if needed > free:
            return [], f"not enough memory to hold a whole model: {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free"
        prompts = list(PROMPTS if spec.prompts is None else spec.prompts)
        if not prompts:
            return [], "the recipe has no prompts"
        self.reporter.say(f"generating: {len(prompts)} prompts with each model")
        texts = []
        for checkpoint, identity in ((base, base_id), (result, key)):
            answer = self._continuations(checkpoint, identity, prompts, context)
            if isinstance(answer, str):
                return [], answer
            texts.append(answer)
        rows = zip(prompts, *texts, strict=True)
        return [records.Generation(prompt=p, base=b, compressed=c) for p, b, c in rows], None

    def _continuations(
        self, checkpoint: Checkpoint, identity: str, prompts: Sequence[str], context: "Context"
    ) -> list[str] | str:
        from compress.evaluate.stock import NEW_TOKENS, Request, ask

        name = fingerprint("texts", identity, prompts, str(context.dtype), NEW_TOKENS)
        cached = self.work / "evaluations" / f"{name}.json"
        if cached.is_file() and not self.options.fresh:
            texts: list[str] = json.loads(cached.read_text(encoding="utf-8"))
            return texts
        request = Request(
            str(checkpoint.folder), str(context.device), str(context.dtype).removeprefix("torch."),
            prompts=list(prompts), trust_remote_code=context.trust_remote_code,
        )  # fmt: skip
        answer = ask(request)
        if answer.failure is not None:
            return f"the stock loader failed: {answer.failure}"
        cached.parent.mkdir(exist_ok=True)
        write_text(cached, json.dumps(answer.continuations))
        return answer.continuations

    def _compressed(self, base: Checkpoint, result: Checkpoint, stages: Sequence[records.Stage]) -> records.Compressed:
        spec = self.recipe.stages[-1]
        matrices = plan_matrices(spec, base, "stages")
        weights = sum(m.shape[0] * m.shape[1] for m in matrices)
        parameters = parameter_count(base)
        return records.Compressed(
            path=str(self.output), bytes=result.bytes, parameters=parameters, format=spec.format,
            bits_per_weight=8 * result.bytes / parameters,
            quantized_bits_per_weight=8 * sum(quantized_bytes(m, spec.format) for m in matrices) / weights,
        )  # fmt: skip

    def _publish(self, artefact: Path, report: records.Report) -> None:
        from compress.report.write import write_model_card, write_report

        partial = self.output.with_name(f".{self.output.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            publish(artefact, partial)
            write_report(report, partial)
            write_model_card(report, partial)
            check_output(self.output)
            keep_foreign(self.output, partial)
            commit(partial, self.output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # nothing is left of it where all went well


def _logits(file: Path) -> "torch.Tensor":
    return read_part(file)[0]["logits"]


def _calibration(tokens: "TokenSet | None") -> records.Calibration | None:
    if tokens is None:
        return None
    return records.Calibration(
        name=tokens.name, source=Path(tokens.source).name, licence=tokens.licence, sequences=tokens.sequences,
        sequence_length=tokens.sequence_length, tokens=tokens.count, sha256=tokens.sha256,
    )  # fmt: skip


def _shown(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the report repeats it: what was given, without defaults."""
    return recipe.model_dump(mode="json", exclude_defaults=True)
