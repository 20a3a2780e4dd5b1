"""What stands alone beside `run`: evaluate, verify, inspect a checkpoint."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError
from compress.model.arch import check_code, depth_of, positions_of, width_of
from compress.model.checkpoint import Checkpoint
from compress.model.identity import identity
from compress.model.shapes import check_length, check_vocabulary, model_dtype
from compress.model.source import resolve_model
from compress.model.tokenizer import load_tokenizer
from compress.recipe.lengths import fitting_length
from compress.records import Quality, read_record
from compress.system.files import make_writable, writing
from compress.system.progress import Reporter

if TYPE_CHECKING:
    from compress.evaluation.verify import Check
    from compress.quant.grid import FakeQuantize, Grid


def evaluate(
    base: str | Path,
    candidate: str | Path,
    *,
    text: str = "wikitext2",
    sequence_length: int | None = None,
    windows: int | None = 64,
    device: str = "auto",
    work_dir: str | Path = ".dscompress",
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> Quality:
    """Compare a checkpoint with its original on a text: perplexity, KL divergence, agreement.

    Args:
        base: a folder, hub id or GGUF file.
        candidate: a checkpoint folder, dense or quantized, whoever wrote it.
        text: a text or jsonl file, or a bundled text.
        sequence_length: tokens per window; None is 2048, or as many as the base has positions.
        windows: how many; None takes the whole text.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        work_dir: where what the base gives is kept, for the next comparison.
        trust_remote_code: let code that comes with the models run.
        reporter: told what happens; None says it on standard error.

    Raises:
        UserError: a model or text that can't be used, or two models with different vocabularies.
    """
    import torch

    from compress.data.calibration import load_windows
    from compress.evaluation.base import check_base
    from compress.evaluation.compare import compare
    from compress.evaluation.verify import probe_tokens
    from compress.formats.dequantized import DequantizedCheckpoint
    from compress.loop.context import Context
    from compress.system.compute import pick_device, pick_dtype

    reporter, work = reporter or Reporter(), Path(work_dir).absolute()
    original = Checkpoint(resolve_model(str(base), None, work, reporter.say))
    views = DequantizedCheckpoint(original), DequantizedCheckpoint(_candidate(candidate, original, trust_remote_code))
    check_code(original.config, str(base), trust_remote_code)
    sequence_length = sequence_length or fitting_length(positions_of(original.config))
    check_length(original, sequence_length, "--sequence-length")
    place, tokenizer = pick_device(device), load_tokenizer(original.folder, trust_remote_code)
    tokens = load_windows(text, tokenizer, sequence_length=sequence_length, windows=windows)
    for warning in tokens.warnings:
        reporter.warn(warning)
    check_vocabulary(original, int(tokens.tokens.max()))
    dtype = pick_dtype(place, torch.float16 if model_dtype(original) == "F16" else torch.bfloat16)
    probe = probe_tokens(original.folder, trust_remote_code)[None]
    context = Context(place, dtype, None, probe, reporter, trust_remote_code)
    make_writable(work)
    base_id = identity(original, work)
    with writing(work):
        if not original.config.get("quantization_config"):
            check_base(original, base_id, context, work / "evaluations")
        quality = compare(*views, tokens, context, work / "evaluations", base_id)
    return Quality.model_validate(quality)


def _candidate(folder: str | Path, base: Checkpoint, trust_remote_code: bool) -> Checkpoint:
    """What is compared with the base, if it can be."""
    found = Checkpoint(Path(folder))
    check_code(found.config, str(folder), trust_remote_code)
    sizes = [each.config.get("vocab_size") for each in (base, found)]
    if sizes[0] != sizes[1]:
        raise ModelError(f"{folder}: its vocabulary has {sizes[1]} tokens, the base's {sizes[0]}; nothing to compare")
    return found


def verify(checkpoint: str | Path, *, device: str = "auto", trust_remote_code: bool = False) -> "list[Check]":
    """Check that a checkpoint opens and says what it should, in the precision of its record.

    Args:
        checkpoint: its folder.
        device: "auto", "cpu", "cuda" or "cuda:<n>".
        trust_remote_code: let code that comes with the model run.

    Returns:
        What was looked at: its files, the record of what was computed, the stock loader.

    Raises:
        ModelError: a damaged folder.
    """
    import torch

    from compress.evaluation.verify import verify_checkpoint
    from compress.system.compute import pick_device, pick_dtype

    folder = Path(checkpoint)
    check_code(Checkpoint(folder).config, str(checkpoint), trust_remote_code)
    place = pick_device(device)
    record = read_record(folder)
    dtype = getattr(torch, record.probe.dtype) if record else pick_dtype(place, torch.bfloat16)
    return verify_checkpoint(folder, place, dtype, trust_remote_code)


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


def _stored(grid: "Grid", inputs: "FakeQuantize | None") -> str:
    if grid.rows == -1 or (inputs and grid.group_size == -1):
        scope = "one scale" if grid.rows == -1 else "a scale per row"
    else:
        scope = f"blocks of {grid.rows} x {grid.group_size}" if grid.rows > 1 else f"group {grid.group_size}"
    how = "" if inputs is None else f", {'dynamic' if inputs.scale is None else 'static'} inputs"
    return f"{'fp8' if grid.float8 else f'{grid.bits} bits'}, {scope}{how}"
