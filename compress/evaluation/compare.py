"""Compares two checkpoints on a text, each streamed layer by layer: neither is ever held.

The base model's last hidden states are kept in the work folder, by fingerprint: a sweep pays for them once. Logits are
computed a few tokens at a time, since those of a window of 2048 tokens take gigabytes; so the head's sums may be
rounded otherwise than in a whole window, in their last bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.data.calibration import TokenSet
from compress.evaluation.divergence import TokenDivergence, rows_at_once, summarise, token_divergence
from compress.evaluation.worst import Head, worst_places
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import read_part, write_part
from compress.model.tokenizer import load_tokenizer
from compress.system.fingerprint import fingerprint
from compress.system.locks import made_once

CODE_VERSION = 3


@torch.no_grad()
def compare(
    base: DequantizedCheckpoint,
    candidate: DequantizedCheckpoint,
    windows: TokenSet,
    context: Context,
    cache: Path,
    base_id: str,
) -> dict[str, Any]:
    """Perplexity of both, KL(base || candidate) and agreement: a `compress.records.Quality` as a dict.

    Args:
        base: the original.
        candidate: what became of it, read as a dense model; inputs are rounded where it says so.
        windows: tokens [W, S].
        context: where to compute.
        cache: folder in which the base's hidden states are kept.
        base_id: fingerprint of the base.
    """
    streams = [open_view(v, context.device, context.dtype, context.trust_remote_code) for v in (base, candidate)]
    key = fingerprint("hidden", CODE_VERSION, base_id, windows.sha256, str(context.dtype))
    kept = cache / f"{key}.safetensors"
    wait = "which evaluates the base on the same text"
    with made_once(kept, lambda holder: context.reporter.say(f"waiting for {holder}, {wait}")) as missing:
        if missing:
            hidden_base = _last_hidden(streams[0], windows.tokens, context, "evaluating the base")
            write_part(kept, {"hidden": torch.cat(hidden_base)}, {})
        else:
            hidden_base = list(read_part(kept)[0]["hidden"].split(1))
    hidden_candidate = _last_hidden(streams[1], windows.tokens, context, "evaluating the result")
    found: list[TokenDivergence] = []
    with (
        streams[0].outer(),
        streams[1].outer(),
        context.reporter.task("comparing", len(windows.tokens), "window") as advance,
    ):
        for tokens, one, other in zip(windows.tokens, hidden_base, hidden_candidate, strict=True):
            found.append(_window(streams, [one, other], tokens, max(1, len(windows.prefix)), context.device))
            advance()
    per_window = _joined(found, torch.stack)
    heads = [_head(stream, hidden) for stream, hidden in zip(streams, (hidden_base, hidden_candidate), strict=True)]
    tokenizer = load_tokenizer(base.folder, context.trust_remote_code)
    with streams[0].outer(), streams[1].outer():
        worst = worst_places(per_window.kl, windows.tokens, heads, tokenizer)
    summary = summarise(
        per_window,
        dataset=windows.name,
        sequence_length=windows.sequence_length,
        prefix=windows.prefix,
        dtype=str(context.dtype).removeprefix("torch."),
    )
    return summary | {"worst": worst}


def _head(stream: LayerStream, hidden: Sequence[Tensor]) -> Head:
    """Logits [V] that predict the token at a place, from what the last layer puts out for every window."""
    return lambda window, place: stream.logits(hidden[window][:, place - 1 : place].to(stream.device))[0, 0]


def _window(
    streams: Sequence[LayerStream], hidden: Sequence[Tensor], tokens: Tensor, first: int, device: torch.device
) -> TokenDivergence:
    """Both models on a window of tokens [S] from `first` on, from what their last layers put out, [1, S, D] each."""
    rows, scored = rows_at_once(max(s.model.config.vocab_size for s in streams)), len(tokens) - first
    states, targets = [h[:, first - 1 : -1].to(device) for h in hidden], tokens[first:].to(device)
    parts = []
    for start in range(0, scored, rows):
        part = slice(start, start + rows)
        base, candidate = (s.logits(h[:, part])[0] for s, h in zip(streams, states, strict=True))
        parts.append(token_divergence(base, candidate, targets[part], first=start))
    return _joined(parts, torch.cat)


def _joined(parts: Sequence[TokenDivergence], join: Callable[[list[Tensor]], Tensor]) -> TokenDivergence:
    return TokenDivergence(*(join([getattr(p, f.name).cpu() for p in parts]) for f in fields(TokenDivergence)))


def open_view(
    view: DequantizedCheckpoint, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> LayerStream:
    """The layer loop over a checkpoint, whose inputs it rounds where the checkpoint's runtime does."""
    stream = LayerStream(view.running_in(dtype), device, dtype, trust_remote_code)
    if not view.rounds_inputs:
        stream.inputs |= view.inputs
    stream.caches |= view.caches
    return stream


def _last_hidden(stream: LayerStream, tokens: Tensor, context: Context, title: str) -> list[Tensor]:
    """What the last layer puts out for every window: [1, S, D] each, in host memory."""
    activations = stream.start(tokens)
    with context.reporter.task(title, stream.depth, "layer") as advance:
        for index in range(stream.depth):
            stream.fill_layer(index, stream.load_layer(index))
            stream.run_layer(index, activations)
            stream.empty_layer(index)
            advance()
    stream.close()
    return [window for batch in activations.hidden for window in batch.cpu().split(1)]
