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
    from compress.evaluate.verify import Check
    from compress.quant.grid import FakeQuantize, Grid


def evaluate(
    base: str, candidate: Path, text: str, sequence_length: int | None, windows: int, device: str, work: Path,
    trust_remote_code: bool, reporter: Reporter,
) -> Quality:  # fmt: skip
    """Compare a checkpoint with its original on a text; without a length, in windows that fit the original.

    Raises:
        UserError: a model or text that can't be used, or two models with different vocabularies.
    """
    import torch

    from compress.data.calibration import load_windows
    from compress.evaluate.base import check_base
    from compress.evaluate.compare import compare
    from compress.evaluate.verify import probe_tokens
    from compress.formats.dequantized import DequantizedCheckpoint
    from compress.loop.context import Context
    from compress.system.compute import pick_device, pick_dtype

    original = Checkpoint(resolve_model(base, None, work, reporter.say))
    result = Checkpoint(candidate)
    check_code(original.config, base, trust_remote_code)
    check_code(result.config, str(candidate), trust_remote_code)
    views = DequantizedCheckpoint(original), DequantizedCheckpoint(result)
    sizes = [c.config.get("vocab_size") for c in (original, result)]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"{candidate}: its vocabulary has {sizes[1]} tokens, the base's {sizes[0]}; nothing to compare"
        )
    sequence_length = sequence_length or fitting_length(positions_of(original.config))
    check_length(original, sequence_length, "--sequence-length")
    place = pick_device(device)
    tokens = load_windows(
        text, load_tokenizer(original.folder, trust_remote_code), sequence_length=sequence_length, windows=windows
    )
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


def verify(checkpoint: Path, device: str, trust_remote_code: bool) -> "list[Check]":
    """Check that a checkpoint opens and says what it should, in the precision of its record.

    Raises:
        ModelError: a damaged folder.
    """
    import torch

    from compress.evaluate.verify import verify_checkpoint
    from compress.system.compute import pick_device, pick_dtype

    check_code(Checkpoint(checkpoint).config, str(checkpoint), trust_remote_code)
    place = pick_device(device)
    record = read_record(checkpoint)
    dtype = getattr(torch, record.probe.dtype) if record else pick_dtype(place, torch.bfloat16)
    return verify_checkpoint(checkpoint, place, dtype, trust_remote_code)


def inspect(folder: Path) -> list[str]:
    """Lines that describe a checkpoint.

    Raises:
        ModelError: a damaged folder.
    """
    from compress.formats.dequantized import DequantizedCheckpoint

    checkpoint = Checkpoint(folder)
    config, view = checkpoint.config, DequantizedCheckpoint(checkpoint)
    lines = [
        f"{folder}",
        f"model      {config.get('model_type')}, {depth_of(config)} layers, "
        f"hidden {width_of(config)}, vocabulary {config.get('vocab_size')}",
        f"files      {len(checkpoint.files)} safetensors, {checkpoint.bytes:,} bytes, "
        f"{len(checkpoint.tensors)} tensors",
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
        lines.append(
            f"made       {record.created} by {stage.kind} {stage.spec.get('method', '')} in {stage.seconds:.0f} s"
        )
    return lines


def _stored(grid: "Grid", inputs: "FakeQuantize | None") -> str:
    if grid.rows == -1 or (inputs and grid.group_size == -1):
        scope = "one scale" if grid.rows == -1 else "a scale per row"
    else:
        scope = f"blocks of {grid.rows} x {grid.group_size}" if grid.rows > 1 else f"group {grid.group_size}"
    how = "" if inputs is None else f", {'dynamic' if inputs.scale is None else 'static'} inputs"
    return f"{'fp8' if grid.float8 else f'{grid.bits} bits'}, {scope}{how}"
