"""Opens a written checkpoint again and compares what it says with what was computed.

Three witnesses, where they apply: the logits that the finished model gave in memory (or the record of them inside the
checkpoint), the stock transformers loader, and our reader of the packed tensors, streamed layer by layer.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress.evaluation.compare import open_view
from compress.evaluation.stock import Answer, Request, asked
from compress.formats.base import AnyGrid
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.stream import LayerStream
from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.tokenizer import load_tokenizer
from compress.quant.grid import Grid
from compress.records import Probe, Record, Verified, read_record
from compress.system.fingerprint import sha256
from compress.system.memory import available

STOCK = "transformers AutoModelForCausalLM.from_pretrained"
OWN = "streamed reader of the packed tensors"
PROBE_TOKENS = 64
PROBE_TEXT = """The library stood at the corner of two quiet streets. In 1923 its founder gave 4,200 books to the town,
and asked for one thing only: that nobody should ever be turned away. What would you have written above the door?
def area(radius): return 3.14159 * radius ** 2
Les livres ne manquent jamais de lecteurs; die Leser brauchen nur Zeit."""
# Of the largest logit. On one machine all witnesses run the same operations, and have never differed so far; another
# machine adds in another order.
_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}
_ELSEWHERE = 5
_BESIDE = 3  # free memory, in loaders, from which one works while something else computes


def probe_of(logits: Tensor, tokens: Tensor, dtype: torch.dtype) -> Probe:
    """The record of logits [S, V] on tokens [S]."""
    top = logits.max(-1)
    return Probe(
        tokens=tokens.tolist(), best=top.indices.tolist(), logit=top.values.tolist(), dtype=str(dtype).split(".")[-1]
    )


@dataclass(frozen=True)
class Opened:
    """A checkpoint that was opened again.

    Args:
        verified: whether it says what was computed.
        answer: of the stock loader, with its continuations; None where it was not asked.
    """

    verified: Verified
    answer: Answer | None


@contextmanager
def opening(
    folder: Path,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    max_memory: int | None = None,
    prompts: Sequence[str] = (),
) -> Iterator[Callable[[Tensor], Opened]]:
    """Opens a checkpoint; what is given compares it with logits [S, V] that the model in memory gave for tokens [S].

    The stock loader is asked where it can open the format and memory and disk suffice, else our reader. Inside, the
    loader works already, where a GPU has room for it and for as much again beside it.

    Args:
        folder: the checkpoint.
        tokens: int64 [S].
        device: where to compute.
        dtype: in what precision.
        trust_remote_code: as in transformers.
        max_memory: bytes of the device to keep to.
        prompts: to continue in the same breath.
    """
    checkpoint = Checkpoint(folder)

    def by_own(expected: Tensor, note: str) -> Verified:
        logits = own_logits(checkpoint, tokens, device, dtype, trust_remote_code)
        return _verdict(OWN, logits, expected, dtype, note)

    refusal = stock_refusal(checkpoint, device, dtype, max_memory)
    if refusal is not None:
        yield lambda expected: Opened(by_own(expected, refusal), None)
        return
    name = str(dtype).removeprefix("torch.")
    request = Request(str(folder), str(device), name, tokens.tolist(), list(prompts), trust_remote_code)

    def judged(expected: Tensor) -> Opened:
        answer = wait()
        if answer.logits is not None:
            return Opened(_verdict(STOCK, answer.logits, expected, dtype, None), answer)
        if answer.short:
            return Opened(by_own(expected, f"no room for the stock loader: {answer.failure}"), answer)
        failed = Verified(
            loader=STOCK, max_logit_difference=None, tolerance=tolerance_of(expected, dtype), passed=False,
            note=answer.failure,
        )  # fmt: skip
        return Opened(failed, answer)

    beside = device.type == "cuda" and _BESIDE * stock_bytes(checkpoint, dtype) < available(device, max_memory)
    with asked(request) as wait:
        if not beside:
            wait()
        yield judged


def _verdict(loader: str, logits: Tensor, expected: Tensor, dtype: torch.dtype, note: str | None) -> Verified:
    tolerance = tolerance_of(expected, dtype)
    difference = float((logits - expected).abs().max())
    passed = difference <= tolerance  # False for NaN too
    return Verified(loader=loader, max_logit_difference=difference, tolerance=tolerance, passed=passed, note=note)


def tolerance_of(expected: Tensor, dtype: torch.dtype) -> float:
    """How far logits may be from the expected ones, as computed in this dtype on one machine."""
    return _TOLERANCE[dtype] * float(expected.abs().max())


def stock_refusal(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, max_memory: int | None = None
) -> str | None:
    """Why the stock loader is not asked; None when it is."""
    view = DequantizedCheckpoint(checkpoint)
    if view.stock is not None:
        return view.stock
    own = view.runs_in(dtype)
    if own != dtype:
        return f"torchao's 4-bit weights run in {own} only, and this was computed in {dtype}; not asked"
    needed = stock_bytes(checkpoint, dtype)
    free = available(device, max_memory)
    if needed > free:
        return f"the stock loader needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; not asked"
    return None


def stock_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """About how much memory the stock loader needs."""
    view = DequantizedCheckpoint(checkpoint)
    packed = {name for name in view.tensors if view.tensors[name].dtype == "I32"}
    elements = sum(
        _elements(info.shape, view.grids.get(n.removesuffix(".weight")) if n in packed else None)
        for n, info in view.tensors.items()
    )
    return int(elements * dtype.itemsize * 1.3) + checkpoint.bytes


def _elements(shape: tuple[int, ...], grid: AnyGrid | None) -> int:
    return math.prod(shape) * 32 // grid.bits if isinstance(grid, Grid) else math.prod(shape)


def own_logits(
    checkpoint: Checkpoint, tokens: Tensor, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> Tensor:
    """Logits [S, V], float32, of a checkpoint for tokens [S], streamed through our reader of its packed tensors."""
    return stream_logits(open_view(DequantizedCheckpoint(checkpoint), device, dtype, trust_remote_code), tokens)


@torch.no_grad()
def stream_logits(stream: LayerStream, tokens: Tensor) -> Tensor:
    """Logits [S, V], float32, of a stream for tokens [S]; closes it."""
    activations = stream.start(tokens[None])
    for index in range(stream.depth):
        stream.fill_layer(index, stream.load_layer(index))
        stream.run_layer(index, activations)
        stream.empty_layer(index)
    stream.close()
    with stream.outer():
        return stream.logits(activations.hidden[0])[0].float().cpu()


@dataclass(frozen=True)
class Check:
    """One thing that `dscompress verify` looked at; `passed` is None where it could not."""

    name: str
    passed: bool | None
    detail: str


def verify_checkpoint(folder: Path, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> list[Check]:
    """Everything that can be said of a checkpoint on its own: it opens, and its witnesses agree.

    Raises:
        ModelError: the folder is damaged.
    """
    checkpoint = Checkpoint(folder)
    record = read_record(folder)
    checks = [_files(checkpoint, record)]
    tokens = torch.tensor(record.probe.tokens) if record else probe_tokens(folder, trust_remote_code)
    own = own_logits(checkpoint, tokens, device, dtype, trust_remote_code)
    if record is None:
        checks.append(Check("record", None, "no dscompress.json: what was computed is not known"))
    else:
        at_best = own.gather(1, torch.tensor(record.probe.best)[:, None])[:, 0]
        checks.append(_compared("record", at_best, torch.tensor(record.probe.logit), dtype, OWN, _ELSEWHERE))
    refusal = stock_refusal(checkpoint, device, dtype)
    if refusal is not None:
        return [*checks, Check("stock loader", None, refusal)]
    name = str(dtype).removeprefix("torch.")
    with asked(Request(str(folder), str(device), name, tokens.tolist(), trust_remote_code=trust_remote_code)) as wait:
        answer = wait()
    if answer.logits is None:
        return [*checks, Check("stock loader", None if answer.short else False, answer.failure or "gave no logits")]
    return [*checks, _compared("stock loader", answer.logits, own, dtype, STOCK)]


def _files(checkpoint: Checkpoint, record: Record | None) -> Check:
    """Whether the files are whole, and the bytes that were written."""
    size = f"{len(checkpoint.tensors)} tensors in {len(checkpoint.files)} files, {checkpoint.bytes:,} bytes"
    if record is None:
        return Check("files", True, size)
    there = {name: checkpoint.folder / name for name in record.files}
    changed = [name for name, file in there.items() if not file.is_file() or sha256(file) != record.files[name]]
    if changed:
        return Check("files", False, f"changed since they were written: {', '.join(changed)}")
    return Check("files", True, f"{size}, all as they were written (SHA-256)")


def _compared(name: str, one: Tensor, other: Tensor, dtype: torch.dtype, loader: str, slack: int = 1) -> Check:
    difference, tolerance = float((one - other).abs().max()), slack * tolerance_of(other, dtype)
    detail = f"{loader}: largest difference of a logit {difference:.2g}, allowed {tolerance:.2g}"
    return Check(name, difference <= tolerance, detail)


def probe_prompt(checkpoint: Checkpoint, trust_remote_code: bool, new_tokens: int) -> Tensor:
    """The same, cut so that the model has positions for so many tokens behind them."""
    tokens = probe_tokens(checkpoint.folder, trust_remote_code)
    return tokens[: max(2, (positions_of(checkpoint.config) or len(tokens)) - new_tokens)]


def probe_tokens(folder: Path, trust_remote_code: bool) -> Tensor:
    """Tokens [S], S <= PROBE_TOKENS, of a fixed text: prose, numbers, code and other languages."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    return torch.tensor(tokenizer(PROBE_TEXT)["input_ids"][:PROBE_TOKENS])
