"""How fast a result runs on this CPU beside its base in bf16, as users run them: stock transformers, a process each.

By turns, so that a slow minute of the machine hits both alike. Left out: batches, long contexts, torch.compile and
other runtimes, whose figures differ.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from compress.evaluation.stock import Request, Timing, ask
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import parameter_count
from compress.records import Pace, Speed
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint
from compress.system.machine import processor, versions
from compress.system.memory import available

CODE_VERSION = 1
_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 512, 16, 2
_PROCESS_BYTES = 700_000_000  # torch and transformers, before a model


def compare_speed(
    base: Checkpoint, result: Checkpoint, key: str, context: Context, cache: Path, fresh: bool
) -> tuple[Speed | None, str | None]:
    """Measure both on this CPU, or find what was measured here before; else why nothing was.

    Args:
        base: the original, which runs in bfloat16.
        result: what became of it.
        key: fingerprint of the result.
        context: whom to tell, and the memory to keep to.
        cache: folder in which figures are kept, unless the machine was busy.
        fresh: measure again.
    """
    cpu, flags = processor()
    timing = _timing(base)
    name = fingerprint("speed", CODE_VERSION, key, cpu, flags, timing, _ROUNDS, versions())
    kept = cache / f"{name}.json"
    if kept.is_file() and not fresh:
        return Speed.model_validate_json(kept.read_text(encoding="utf-8")), None
    needed = int(2.6 * parameter_count(base)) + _PROCESS_BYTES
    free = available(context.device, context.max_memory)
    if needed > free:
        return None, f"the base in bfloat16 needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    dtypes = [torch.bfloat16, DequantizedCheckpoint(result).runs_in(torch.bfloat16)]
    requests = [
        Request(str(folder), "cpu", str(dtype).removeprefix("torch."), [], [], context.trust_remote_code, timing)
        for folder, dtype in zip((base.folder, result.folder), dtypes, strict=True)
    ]
    context.reporter.say(
        f"measuring speed: {timing.prompt_tokens} + {timing.new_tokens} tokens on {timing.threads} CPU threads, "
        "by base and result in turn"
    )
    with context.reporter.task("measuring speed", _ROUNDS * len(requests), "run") as advance:
        found = measure(requests, _ROUNDS, advance)
    if isinstance(found, str):
        return None, found
    paces = [_pace(request, rows) for request, rows in zip(requests, found, strict=True)]
    speed = Speed(
        cpu=cpu, cpu_flags=flags, threads=timing.threads, prompt_tokens=timing.prompt_tokens,
        new_tokens=timing.new_tokens, rounds=_ROUNDS, base=paces[0], compressed=paces[1],
    )  # fmt: skip
    if not speed.busy:
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, speed.model_dump_json())
    return speed, None


def measure(
    requests: Sequence[Request], rounds: int, advance: Callable[[], None]
) -> list[list[dict[str, float]]] | str:
    """The figures of each request in every round, which goes through all of them; or why the stock loader failed."""
    found: list[list[dict[str, float]]] = [[] for _ in requests]
    for _ in range(rounds):
        for request, rows in zip(requests, found, strict=True):
            answer = ask(request)
            if answer.pace is None:
                return f"the stock loader failed: {answer.failure}"
            rows.append(answer.pace)
            advance()
    return found


def _timing(base: Checkpoint) -> Timing:
    """Fewer tokens where the model has fewer positions."""
    positions = positions_of(base.config) or _PROMPT_TOKENS + _NEW_TOKENS
    new = min(_NEW_TOKENS, max(1, positions // 8))
    return Timing(max(1, min(_PROMPT_TOKENS, positions - new)), new, torch.get_num_threads())


def _pace(request: Request, rows: Sequence[dict[str, float]]) -> Pace:
    medians = {name: median(row[name] for row in rows) for name in rows[0]}
    return Pace.model_validate({"dtype": request.dtype, **medians})
