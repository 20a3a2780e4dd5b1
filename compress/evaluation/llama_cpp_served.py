"""A finished .gguf file in the real llama.cpp, as the record that reports show of a serving engine."""

from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compress.evaluation.llama_cpp import (
    ENGINE,
    NEW_TOKENS,
    PACKAGE,
    LlamaAnswer,
    Timing,
    apart_of,
    ask_llama_cpp,
    llama_cpp_missing,
    tokens_check,
)
from compress.evaluation.served import agreement
from compress.evaluation.verify import own_logits, probe_prompt
from compress.model.checkpoint import Checkpoint
from compress.served_records import Served, ServedSpeed

_TIMING = Timing(prompt_tokens=256, new_tokens=64)


def served_in_llama_cpp(
    folder: Path,
    file: Path,
    types: Collection[str],
    base: Path | None,
    device: torch.device,
    trust_remote_code: bool,
) -> Served:
    """What llama.cpp makes of a file.

    Args:
        folder: the checkpoint that the file was made of.
        file: GGUF.
        types: of the file's matrices, ggml's names.
        base: the base in the same format, to time beside it; None: nothing is timed.
        device: where our reader computes.
        trust_remote_code: as in transformers.
    """
    if why := llama_cpp_missing():
        return Served(engine=ENGINE, opened=False, passed=False, note=why)
    checkpoint = Checkpoint(folder)
    prompt = probe_prompt(checkpoint, trust_remote_code, NEW_TOKENS)
    timing = None if base is None else _TIMING
    words, judged = tokens_check(folder, trust_remote_code)
    first = ask_llama_cpp(file, prompt.tolist(), words, timing=timing)
    found: dict[str, Any] = {
        "engine": ENGINE,
        "version": version(PACKAGE),
        "device": "cpu",
        "dtype": " and ".join(sorted(types)),
    }
    if isinstance(first, str):
        return Served(**found, opened=False, passed=False, note=first)
    tokens = judged(first.ids)
    if not tokens.passed:
        return Served(**found, opened=True, passed=False, note=f"reads texts as {tokens.detail}")
    sequence = torch.cat([prompt, torch.tensor(first.continuation)])
    second = ask_llama_cpp(file, sequence.tolist(), new_tokens=0)
    if isinstance(second, str):
        return Served(**found, opened=False, passed=False, note=second)
    exact, rounded = (
        own_logits(checkpoint, sequence, device, dtype, trust_remote_code) for dtype in (torch.float32, torch.bfloat16)
    )
    last = len(prompt) - 1
    parts = [
        apart_of(second.logits[part], exact[part], rounded[part], sequence[part], types)
        for part in (slice(None, last + 1), slice(last, None))
    ]
    agreed, gap = agreement(exact.log_softmax(-1)[last:-1], sequence[last + 1 :])
    speed = None if base is None else _speed(first, base)
    return Served(
        **found, opened=True, passed=all(part.passed for part in parts), prompt=parts[0], continuation=parts[1],
        agreed=agreed, gap=gap, speed=speed,
    )  # fmt: skip


def _speed(result: LlamaAnswer, base: Path) -> ServedSpeed | None:
    """Of the base and the result, one round each behind one to warm up."""
    other = ask_llama_cpp(base, [], new_tokens=0, timing=_TIMING)
    if isinstance(other, str) or other.pace is None or result.pace is None:
        return None
    return ServedSpeed(
        prompt_tokens=_TIMING.prompt_tokens, new_tokens=_TIMING.new_tokens, rounds=1, threads=torch.get_num_threads(),
        cache_bytes=0, base=other.pace, compressed=result.pace,
    )  # fmt: skip
