"""What stands alone beside `run`: evaluate, verify, inspect a checkpoint."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError, RecipeError, UserError
from compress.evaluation.tasks.names import task_problems
from compress.model.arch import check_code, depth_of, positions_of, width_of
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.block_types import BlockType
from compress.model.identity import identity
from compress.model.shapes import check_length, check_vocabulary, model_dtype
from compress.model.source import gguf_of, resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.lengths import fitting_length
from compress.recipe.schema import EvaluateSpec
from compress.records import Quality, read_record
from compress.system.files import make_writable, writing
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.data.calibration import TokenSet
    from compress.evaluation.verify import Check
    from compress.formats.base import AnyGrid
    from compress.loop.context import Context
    from compress.quant.grid import FakeQuantize


def evaluate(
    base: str | Path,
    candidate: str | Path,
    *,
    text: str = "wikitext2",
    sequence_length: int | None = None,
    windows: int | None = 64,
    tasks: Sequence[str] | None = None,
    task_files: str | Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = False,
    device: str = "auto",
    work_dir: str | Path = ".dscompress",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Quality:
    """Compare a checkpoint with its original on a text, and in tasks: perplexity, KL divergence, agreement, scores.

    Args:
        base: a folder, hub id or GGUF file.
        candidate: a checkpoint folder, dense or quantized, whoever wrote it; or a GGUF file, or a folder with one.
        text: a text or jsonl file, or a bundled text.
        sequence_length: tokens per window; None is 2048, or as many as the base has positions.
        windows: how many; None takes the whole text.
        tasks: benchmark tasks or groups of lm-eval that both models do; None is none.
        task_files: folder of task files of yours, which go before lm-eval's own.
        limit: items of each task; None takes all.
        fewshot: examples before each item; None takes each task's own number.
        chat: word the prompts of tasks by the model's chat template.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: where what the base gives is kept, for the next comparison.
        trust_remote_code: let code that comes with the models run.
        reporter: told what happens; None says it on standard error.

    Raises:
        UserError: a model, a text or a task that can't be used, or two models with different vocabularies.
    """
    import torch

    from compress.evaluation.verify import probe_tokens
    from compress.loop.context import Context
    from compress.system.compute import pick_device, pick_dtype

    spec = _tasks(tasks, task_files, limit, fewshot, chat)
    reporter, work = reporter or Reporter(), Path(work_dir).absolute()
    original = Checkpoint(resolve_model(str(base), None, work, reporter.say))
    file = gguf_of(Path(candidate))
    found = candidate if file is None else resolve_model(str(file), None, work, reporter.say)
    result = _candidate(found, original, trust_remote_code)
    check_code(original.config, str(base), trust_remote_code)
    sequence_length = sequence_length or fitting_length(positions_of(original.config))
    check_length(original, sequence_length, "--sequence-length")
    place, tokens = pick_device(device), _windows(original, text, sequence_length, windows, trust_remote_code)
    for warning in tokens.warnings:
        reporter.warn(warning)
    dtype = pick_dtype(place, torch.float16 if model_dtype(original) == "F16" else torch.bfloat16)
    probe = probe_tokens(original.folder, trust_remote_code)[None]
    context = Context(place, dtype, None, probe, reporter, trust_remote_code)
    return _compare(original, result, tokens, spec, context, work)


def _windows(
    base: Checkpoint, text: str, sequence_length: int, windows: int | None, trust_remote_code: bool
) -> "TokenSet":
    """The text in windows of tokens that the base knows."""
    from compress.data.calibration import load_windows

    tokenizer = load_tokenizer(base.folder, trust_remote_code)
    tokens = load_windows(text, tokenizer, sequence_length=sequence_length, windows=windows)
    check_vocabulary(base, int(tokens.tokens.max()))
    return tokens


def _compare(
    original: Checkpoint,
    result: Checkpoint,
    tokens: "TokenSet",
    spec: EvaluateSpec | None,
    context: "Context",
    work: Path,
) -> Quality:
    """Both on a text, and in the tasks of `spec`, where there is one."""
    from compress.evaluation.base import check_base
    from compress.evaluation.compare import compare
    from compress.evaluation.tasks.compared import base_scores, task_records
    from compress.formats.dequantized import DequantizedCheckpoint

    make_writable(work)
    base_id, answers = identity(original, work), work / "answers"
    views = DequantizedCheckpoint(original), DequantizedCheckpoint(result)
    with writing(work):
        if not original.config.get("quantization_config"):
            check_base(original, base_id, context, work / "evaluations")
        before = None if spec is None else base_scores(original, base_id, spec, context, answers, False)
        quality = Quality.model_validate(compare(*views, tokens, context, work / "evaluations", base_id))
        if spec is None or before is None:
            return quality
        key = identity(result, work)
        found, decision = task_records(original, base_id, before, result, key, spec, context, answers, False)
        return quality.model_copy(update={"tasks": found, "task_decision": decision})


def _tasks(
    names: Sequence[str] | None, files: str | Path | None, limit: int | None, fewshot: int | None, chat: bool
) -> EvaluateSpec | None:
    """What tasks both models do, if it can be done."""
    if names is None:
        if files is not None or limit is not None or fewshot is not None or chat:
            raise UserError("--task-files, --limit, --fewshot and --chat are for tasks; name some with --tasks")
        return None
    folder = None if files is None else Path(files).absolute()
    problems = task_problems(list(names), folder, "--tasks")
    if problems:
        raise RecipeError(problems)
    return EvaluateSpec(
        tasks=list(names), task_files=None if folder is None else str(folder), limit=limit, fewshot=fewshot, chat=chat
    )


def _candidate(folder: str | Path, base: Checkpoint, trust_remote_code: bool) -> Checkpoint:
    """What is compared with the base, if it can be."""
    found = Checkpoint(Path(folder))
    check_code(found.config, str(folder), trust_remote_code)
    sizes = [each.config.get("vocab_size") for each in (base, found)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"{folder}: its vocabulary has {sizes[1]} tokens, the base's {sizes[0]}; nothing to compare")
    return found


def verify(
    checkpoint: str | Path, *, device: str = "auto", trust_remote_code: bool = False, serve: str | None = None
) -> "list[Check]":
    """Check that a checkpoint opens and says what it should, in the precision of its record.

    Args:
        checkpoint: its folder; or a GGUF file, or a folder with one, which llama.cpp is asked about.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        trust_remote_code: let code that comes with the model run.
        serve: the Python of an environment whose vLLM opens it too, or "auto"; None asks no vLLM.

    Returns:
        What was looked at: its files, the record of what was computed, the stock loader, vLLM.

    Raises:
        ModelError: a damaged folder.
        UserError: no vLLM there.
    """
    import torch

    from compress.evaluation.served import check_served, find_engine
    from compress.evaluation.verify import verify_checkpoint
    from compress.runs.gguf_file import verify_gguf
    from compress.system.compute import pick_device, pick_dtype

    folder = Path(checkpoint)
    if (file := gguf_of(folder)) is not None:
        if serve is not None:
            raise UserError(f"--serve {serve}: vLLM is not asked about .gguf files; llama.cpp is, without it")
        return verify_gguf(file)
    check_code(Checkpoint(folder).config, str(checkpoint), trust_remote_code)
    place = pick_device(device)
    record = read_record(folder)
    dtype = getattr(torch, record.probe.dtype) if record else pick_dtype(place, torch.bfloat16)
    engine = None if serve is None else find_engine(None if serve == "auto" else serve)
    if isinstance(engine, str):
        raise UserError(f"--serve {serve}: {engine}")
    checks = verify_checkpoint(folder, place, dtype, trust_remote_code)
    return checks if engine is None else [*checks, check_served(folder, engine, place, dtype, trust_remote_code)]


def inspect(checkpoint: str | Path) -> list[str]:
    """Lines that describe a checkpoint: sizes, how each kind of matrix is stored, how it was made.

    Raises:
        ModelError: a damaged folder.
    """
    from compress.formats.dequantized import DequantizedCheckpoint

    folder = Path(checkpoint)
    opened = Checkpoint(folder)
    config, view = opened.config, DequantizedCheckpoint(opened)
    lines = [
        f"{folder}",
        f"model      {config.get('model_type')}, {depth_of(config)} layers, "
        f"hidden {width_of(config)}, vocabulary {config.get('vocab_size')}",
        f"files      {len(opened.files)} safetensors, {opened.bytes:,} bytes, {len(opened.tensors)} tensors",
    ]
    kinds: Counter[tuple[str, str]] = Counter()
    for name in view.tensors:
        module = name.removesuffix(".weight")
        grid = view.grids.get(module)
        stored = _stored(grid, view.inputs.get(module)) if grid else view.tensors[name].dtype
        kinds[(module.rpartition(".")[2], stored)] += 1
    width = max(len(kind) for kind, _ in kinds)
    lines += [f"  {kind:<{width}}  {count:>4} x {stored}" for (kind, stored), count in sorted(kinds.items())]
    record = read_record(folder)
    if record is not None:
        stage = record.stage
        how = " ".join(str(each) for each in (stage.kind, stage.spec.get("method")) if each)
        lines.append(f"made       {record.created} by {how} in {stage.seconds:.0f} s")
    return lines


def _stored(grid: "AnyGrid", inputs: "FakeQuantize | None") -> str:
    if isinstance(grid, BlockType):
        return f"{grid.name} blocks"
    if grid.rows == -1 or (inputs and grid.group_size == -1):
        scope = "one scale" if grid.rows == -1 else "a scale per row"
    else:
        scope = f"blocks of {grid.rows} x {grid.group_size}" if grid.rows > 1 else f"group {grid.group_size}"
    how = "" if inputs is None else f", {'dynamic' if inputs.scale is None else 'static'} inputs"
    return f"{'fp8' if grid.float8 else f'{grid.bits} bits'}, {scope}{how}"
