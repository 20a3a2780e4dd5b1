"""Opens the finished checkpoint in a real vLLM, and compares what it says with our reader of the same files.

vLLM lives in an environment of its own, whose interpreter runs `vllm_client.py` by its path; the client is ended with
all that it started when it answers, fails or takes too long. Whatever vLLM does, the run ends well and says what.

What is compared: log-probabilities of a prompt's tokens, which vLLM computes all at once, and of the tokens by which it
goes on greedily, which it computes one by one with its cache. The reference is our reader in float32, since what a file
means has no precision. How far rounding alone moves log-probabilities is measured too: our reader in vLLM's precision
against the reference, on the same tokens. vLLM may be `TOLERANCE` times as far on average, for it rounds elsewhere.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.evaluation import vllm_client
from compress.evaluation.verify import Check, own_logits, probe_tokens
from compress.loop.context import Context
from compress.model.arch import positions_of
from compress.model.checkpoint import Checkpoint
from compress.records import read_record
from compress.served_records import Apart, Served, ServedPace, ServedSpeed
from compress.system.files import write_text
from compress.system.fingerprint import fingerprint
from compress.system.memory import available
from compress.system.programs import Engine, Program, find_program, run_client
from compress.system.progress import Reporter

CODE_VERSION = 1
ENGINE = "vLLM"
VLLM = Program(ENGINE, "vllm", ".venv-vllm", Path(vllm_client.__file__), "run make clients in a clone")
# Times what rounding does, on average over the tokens. vLLM 0.32 on a CPU came to 0.7 to 1.6 times in every format
# without an 8-bit cache; one matrix of one layer read as a quarter larger made 4 to 7 times where inputs are 16 bits
# wide (tests/clients). The floor is for models that rounding hardly moves.
TOLERANCE, FLOOR = 2.0, 0.005
NEW_TOKENS = 48
_PROMPT, _DECODED, _ROUNDS = 512, 32, 3  # tokens that are timed
_SECONDS, _BYTES_PER_SECOND = 600, 20_000_000  # to open a checkpoint and answer, at most
_PROCESS_BYTES = 2 * 2**30  # of vLLM on a CPU with its cache, before a model
_LONGEST = 400


def find_engine(named: str | None) -> Engine | str:
    """The environment to ask, or in one line why there is none, with the remedy.

    Args:
        named: its interpreter; None takes this environment's vLLM, or `.venv-vllm` in the current folder or the clone.
    """
    return find_program(VLLM, named)


def serve(
    base: Checkpoint,
    result: Checkpoint,
    identities: tuple[str, str],
    tokens: Sequence[int],
    engine: Engine | str,
    context: Context,
    cache: Path,
    fresh: bool,
) -> Served:
    """Ask vLLM about a result and time it beside its base, or find what it said before.

    Args:
        base: the original, of which only speed and memory are asked.
        result: what became of it.
        identities: fingerprints of both.
        tokens: the prompt.
        engine: whom to ask, or why nobody.
        context: where our reader computes, and whom to tell.
        cache: folder in which answers are kept, unless the machine was busy.
        fresh: ask again.
    """
    if isinstance(engine, str):
        return Served(engine=ENGINE, opened=False, passed=False, note=engine)
    timing = _timing(base)
    where = [str(engine.python), engine.version, torch.get_num_threads(), str(context.dtype)]
    kept = cache / f"{fingerprint('served', CODE_VERSION, identities, list(tokens), timing, TOLERANCE, where)}.json"
    if kept.is_file() and not fresh:
        return Served.model_validate_json(kept.read_text(encoding="utf-8"))
    context.reporter.say(f"serving: opening the checkpoint in vLLM {engine.version}, then its base")
    served, pace = examine(result, engine, tokens, context, timing)
    if pace is not None:
        before = _ask(base, engine, tokens[:2], 1, context, timing)
        served = served.model_copy(update=_speed(before, pace, timing))
    if served.opened and not (served.speed and served.speed.busy):
        cache.mkdir(parents=True, exist_ok=True)
        write_text(kept, served.model_dump_json())
    return served


def check_served(
    folder: Path, engine: Engine, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> Check:
    """Whether vLLM opens a finished checkpoint and computes what our reader does; False where it refuses."""
    record = read_record(folder)
    tokens = record.probe.tokens if record else probe_tokens(folder, trust_remote_code).tolist()
    context = Context(device, dtype, None, torch.tensor([tokens]), Reporter(), trust_remote_code)
    served, _ = examine(Checkpoint(folder), engine, tokens, context)
    detail = difference(served) if served.opened else f"does not open it: {served.note}"
    return Check("served", served.passed, f"{ENGINE} {engine.version}: {detail}")


def examine(
    checkpoint: Checkpoint,
    engine: Engine,
    tokens: Sequence[int],
    context: Context,
    timing: dict[str, int] | None = None,
) -> tuple[Served, dict[str, float] | None]:
    """Whether vLLM opens a checkpoint and computes what our reader does, and its pace where a timing is given."""
    positions = positions_of(checkpoint.config) or len(tokens) + NEW_TOKENS
    prompt = list(tokens[: max(2, positions - NEW_TOKENS)])
    answer = _ask(checkpoint, engine, prompt, max(1, min(NEW_TOKENS, positions - len(prompt))), context, timing)
    dtype = str(context.dtype).removeprefix("torch.")
    found: dict[str, Any] = {"engine": ENGINE, "version": engine.version, "dtype": dtype}
    if "failure" in answer:
        return Served(**found, opened=False, passed=False, note=answer["failure"]), None
    said = torch.tensor(answer["logprobs"] + answer["continuation_logprobs"], dtype=torch.float32)
    found |= {"opened": True, "device": answer["device"]}
    if not said.isfinite().all():
        return Served(**found, passed=False, note="it gives log-probabilities that are no numbers"), answer["pace"]
    sequence = torch.tensor(prompt + answer["continuation"])
    exact, rounded = (_log_probabilities(checkpoint, sequence, context, d) for d in (torch.float32, context.dtype))
    wanted, first = _of(exact, sequence), len(prompt) - 1
    rounding, apart = (_of(rounded, sequence) - wanted).abs(), (said - wanted).abs()
    parts = [_apart(apart[part], rounding[part]) for part in (slice(None, first), slice(first, None))]
    agreed, gap = agreement(exact[first:-1], sequence[first + 1 :])
    passed = all(part.passed for part in parts)
    served = Served(**found, passed=passed, prompt=parts[0], continuation=parts[1], agreed=agreed, gap=gap)
    return served, answer["pace"]


def _log_probabilities(checkpoint: Checkpoint, sequence: Tensor, context: Context, dtype: torch.dtype) -> Tensor:
    """[S, V], of our reader in a precision."""
    return own_logits(checkpoint, sequence, context.device, dtype, context.trust_remote_code).log_softmax(-1)


def _of(log_probabilities: Tensor, sequence: Tensor) -> Tensor:
    """[S - 1], those of the tokens that came."""
    return log_probabilities[:-1].gather(1, sequence[1:, None])[:, 0]


def _apart(apart: Tensor, rounding: Tensor) -> Apart:
    usual = float(rounding.mean())
    tolerance = max(TOLERANCE * usual, FLOOR)
    return Apart(
        tokens=len(apart), max=float(apart.max()), mean=float(apart.mean()), rounding=usual, tolerance=tolerance
    )


def agreement(log_probabilities: Tensor, made: Tensor) -> tuple[int, float | None]:
    """How many tokens [T] in front are those that [T, V] ranks first, and how far behind the next one is, nats."""
    best = log_probabilities.max(-1)
    other = (best.indices != made).nonzero()
    if not len(other):
        return len(made), None
    place = int(other[0])
    return place, float(best.values[place] - log_probabilities[place, made[place]])


def _timing(base: Checkpoint) -> dict[str, int]:
    """What is timed; less where the model has fewer positions."""
    positions = positions_of(base.config) or _PROMPT + _DECODED + 1
    new = min(_DECODED, max(1, positions // 8))
    return {"prompt_tokens": max(1, min(_PROMPT, positions - new - 1)), "new_tokens": new, "rounds": _ROUNDS}


def _speed(before: dict[str, Any], pace: dict[str, float], timing: dict[str, int]) -> dict[str, Any]:
    """What is recorded of the speed of both, or why it is not."""
    if "failure" in before:
        return {"note": f"speed was not compared, for it does not open the base: {before['failure']}"}
    speed = ServedSpeed(
        **timing, threads=torch.get_num_threads(), cache_bytes=vllm_client.CACHE_GIB * 2**30,
        base=ServedPace.model_validate(before["pace"]), compressed=ServedPace.model_validate(pace),
    )  # fmt: skip
    return {"speed": speed}


def _ask(
    checkpoint: Checkpoint,
    engine: Engine,
    tokens: Sequence[int],
    new_tokens: int,
    context: Context,
    timing: dict[str, int] | None,
) -> dict[str, Any]:
    """The client's answer (`vllm_client.py` says what is in it); with a `failure` where there is none."""
    needed, free = _PROCESS_BYTES + int(1.3 * checkpoint.bytes), available(context.device, context.max_memory)
    if context.device.type == "cpu" and needed > free:
        return {"failure": f"it needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; not asked"}
    if context.device.type == "cuda":
        torch.cuda.empty_cache()
    longest = len(tokens) + new_tokens
    if timing is not None:
        longest = max(longest, timing["prompt_tokens"] + timing["new_tokens"] + 1)
    request = {
        "model": str(checkpoint.folder), "dtype": str(context.dtype).removeprefix("torch."),
        "trust_remote_code": context.trust_remote_code, "tokens": list(tokens), "new_tokens": new_tokens,
        "timing": timing, "positions": longest,
    }  # fmt: skip
    seconds = _SECONDS + checkpoint.bytes / _BYTES_PER_SECOND
    answer = run_client(engine.python, VLLM.client, request, seconds, {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    if "failure" in answer:
        answer["failure"] = _short(answer["failure"])
    return answer


def _short(text: str) -> str:
    """One line that fits a report: the beginning of vLLM's own, which names the reason."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4]} ..."


def difference(served: Served) -> str:
    """How far the worse of prompt and continuation is off, in words."""
    parts = [part for part in (served.prompt, served.continuation) if part is not None]
    if not parts:
        return served.note or "it gave no figures"
    worst = max(parts, key=lambda part: part.mean / part.tolerance if math.isfinite(part.mean) else math.inf)
    return (
        f"log-probabilities of {worst.tokens} tokens differ by {worst.mean:.3g} nats on average "
        f"(allowed {worst.tolerance:.3g})"
    )
