"""Which contiguous block of layers is missed least: by what the model then says, or by how little it turns the states.

One pass over the layers: behind each possible block a copy of the hidden states that skipped it goes on beside the
original's.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from compress.loop.activations import Activations
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.recipe.prune import PruneStage
from compress.stages.prune.scores import alone
from compress.system.files import write_text

CODE_VERSION = 1
_TOKENS = 8192  # that the blocks are compared on


@torch.no_grad()
def choose_block(spec: PruneStage, parent: Checkpoint, size: int, context: Context, shared: Path, room: float) -> int:
    """The first layer of the block to remove.

    Args:
        spec: the stage.
        parent: the model.
        size: layers to remove.
        context: device, calibration tokens, progress.
        shared: folder where the figures are kept.
        room: bytes that activations may take.
    """
    first = 1 if spec.compensate else 0  # what stays in front of the block makes up for it
    file = shared / f"block-{spec.block}-{size}-from-{first}-v{CODE_VERSION}.json"
    with alone(shared, context):
        if context.fresh or not file.is_file():
            shared.mkdir(parents=True, exist_ok=True)
            stream = LayerStream(parent, context.device, context.dtype, context.trust_remote_code, room)
            compare = _divergences if spec.block == "kl" else _turns
            found = compare(stream, size, first, context)
            stream.close()
            write_text(file, json.dumps({str(start): value for start, value in found.items()}))
    figures = {int(start): value for start, value in json.loads(file.read_text(encoding="utf-8")).items()}
    return min(figures, key=lambda start: (figures[start], start))


def _sample(context: Context, stream: LayerStream) -> Tensor:
    """As many tokens as there is room for a copy of their states behind each layer."""
    tokens = context.calibration()
    copies = stream.depth * stream.model.config.hidden_size * context.dtype.itemsize
    return tokens[: max(1, int(min(_TOKENS, stream.room / copies)) // tokens.shape[1])]


def _divergences(stream: LayerStream, size: int, first: int, context: Context) -> dict[int, float]:
    """KL(whole model || model without the block), by the block's first layer."""
    with stream.outer():
        whole = stream.start(_sample(context, stream), batch=1)
    behind: list[Activations] = []  # what came into each layer
    skipped: dict[int, Activations] = {}
    with context.reporter.task("try blocks of layers", stream.depth, "layer") as advance:
        for index in range(stream.depth):
            behind.append(whole.copy())
            if index >= size + first:
                skipped[index - size] = behind[index - size]
                behind[index - size] = Activations([], {}, context.device)
            stream.fill_layer(index, stream.load_layer(index))
            for each in (whole, *skipped.values()):
                stream.run_layer(index, each)
            stream.empty_layer(index)
            advance()
        if stream.depth - size >= first:
            skipped[stream.depth - size] = behind[stream.depth - size]
    with stream.outer():
        return {start: divergence((stream, whole), (stream, each)) for start, each in skipped.items()}


def divergence(original: tuple[LayerStream, Activations], other: tuple[LayerStream, Activations]) -> float:
    """KL(original || other), nats per token, on the first few thousand tokens.

    Args:
        original: a model inside `outer()`, and its states behind the last layer.
        other: another one, on the same tokens.
    """
    total, tokens = 0.0, 0
    for number in range(len(original[1].hidden)):
        pair = zip(original[1].get(number).split(1), other[1].get(number).split(1), strict=True)
        for first, second in pair:
            if tokens >= _TOKENS:
                break
            wanted = original[0].logits(first)[0].float().log_softmax(-1)
            found = other[0].logits(second)[0].float().log_softmax(-1)
            total += float((wanted.exp() * (wanted - found)).sum())
            tokens += first.shape[1]
    return total / tokens


def _turns(stream: LayerStream, size: int, first: int, context: Context) -> dict[int, float]:
    """1 - cosine of the states in front of and behind the block: block influence (Men et al., arXiv 2403.03853)."""
    with stream.outer():
        states = stream.start(_sample(context, stream), batch=1)
    seen: list[Sequence[Tensor]] = [list(states.hidden)]
    with context.reporter.task("try blocks of layers", stream.depth, "layer") as advance:
        for index in range(stream.depth):
            stream.fill_layer(index, stream.load_layer(index))
            stream.run_layer(index, states)
            stream.empty_layer(index)
            seen.append(list(states.hidden))
            advance()
    figures = {}
    for start in range(first, stream.depth - size + 1):
        pairs = zip(seen[start], seen[start + size], strict=True)
        turns = [1 - torch.cosine_similarity(a.float(), b.float(), dim=-1).mean() for a, b in pairs]
        figures[start] = float(torch.stack(turns).mean())
    return figures
