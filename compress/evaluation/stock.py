"""Asks a checkpoint, opened by stock transformers in a process of its own, for logits, continuations and its speed.

Another process, because the stock loader holds the whole model and dscompress never does, and because nothing of
dscompress can then have a hand in what is loaded.

    python -m compress.evaluation.stock < PATH_OF_REQUEST
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.guard import render
from compress.system.distributed import alone
from compress.system.machine import waited
from compress.system.memory import resident

if TYPE_CHECKING:
    from torch import Tensor

NEW_TOKENS = 48
LOGITS = "logits.safetensors"
# By which Python, torch, C++ and the system say that memory or disk ran out; lines of the loader's last words.
_SHORT = (
    "MemoryError", "OutOfMemoryError", "out of memory", "can't allocate memory", "Cannot allocate memory", "bad_alloc",
    "No space left on device", "Disk quota exceeded",
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """How to measure speed: tokens of the prompt, tokens generated, threads."""

    prompt_tokens: int
    new_tokens: int
    threads: int


@dataclass(frozen=True)
class Request:
    """What to ask.

    Args:
        model: checkpoint folder.
        device: "cpu" or "cuda:0".
        dtype: "bfloat16", "float16" or "float32".
        tokens: one sequence whose logits are wanted; empty for none.
        prompts: texts to continue greedily by up to `NEW_TOKENS` tokens.
        trust_remote_code: as in transformers.
        timing: how to measure speed, on a CPU; None: not at all.
    """

    model: str
    device: str
    dtype: str
    tokens: list[int] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    timing: Timing | None = None


@dataclass(frozen=True)
class Answer:
    """What came back: logits [S, V] if tokens were given, a continuation for each prompt, or why something did not.

    With a `failure`, there are logits where it was the continuations that failed.

    `short`: it failed for want of memory or disk, which says nothing of the checkpoint. `pace` has the figures of
    `compress.records.Pace`, if there was a timing.
    """

    logits: "Tensor | None"
    continuations: list[str]
    failure: str | None = None
    short: bool = False
    pace: dict[str, float] | None = None


_ahead: list[subprocess.Popen[str]] = []


@contextmanager
def started_ahead() -> Iterator[None]:
    """Inside, a process for the next `ask` is there already, its libraries imported."""
    _ahead.append(_start())
    try:
        yield
    finally:
        for unused in _ahead:
            unused.kill()
            unused.communicate()
        _ahead.clear()


def _start() -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "compress.evaluation.stock"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=alone()
    )


def ask(request: Request) -> Answer:
    """Run the request in a process of its own and wait for it."""
    with asked(request) as answer:
        return answer()


@contextmanager
def asked(request: Request) -> Iterator[Callable[[], Answer]]:
    """Inside, a process of its own works at the request; what is given waits for its answer."""
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = Path(scratch)
        (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        process = _ahead.pop() if _ahead else _start()
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; its last words are read below
            process.stdin.write(str(folder / "request.json"))
            process.stdin.close()
        process.stdin = None
        try:
            yield lambda: _answer_of(process, folder)
        finally:
            process.kill()  # nothing happens to one that has ended
            process.wait()
            if process.stderr is not None:
                process.stderr.close()


def _answer_of(process: "subprocess.Popen[str]", folder: Path) -> Answer:
    from safetensors.torch import load_file

    _, said = process.communicate()
    logits = load_file(folder / LOGITS)["logits"] if (folder / LOGITS).is_file() else None
    if process.returncode:
        return replace(_failed(process.returncode, said.strip().splitlines()), logits=logits)
    found = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    return Answer(logits, found["texts"], pace=found["pace"])


def _failed(code: int, said: list[str]) -> Answer:
    """The answer of a process that ended with a code other than 0, and what it had said."""
    reason = said[-1] if said else "no reason given"
    if code == -signal.SIGKILL:
        return Answer(None, [], "the loader was stopped by signal 9, most likely for want of memory", short=True)
    short = next((line for line in reversed(said) if any(words in line for words in _SHORT)), None)
    if code < 0:
        reason = f"the loader was stopped by signal {-code}" + (f" ({said[-1]})" if said else "")
    return Answer(None, [], short or reason, short=short is not None)


def _answer() -> None:
    """In the new process: load, compute, write the answer's files."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = sys.stdin.read()
    if not path:
        return  # started ahead, and not needed
    folder, fields = Path(path).parent, json.loads(Path(path).read_text(encoding="utf-8"))
    timing = Timing(**fields["timing"]) if fields["timing"] else None
    request = Request(**fields | {"timing": timing})
    options: dict[str, Any] = {"trust_remote_code": request.trust_remote_code}
    if timing is not None:
        torch.set_num_threads(timing.threads)
    model: Any = AutoModelForCausalLM.from_pretrained(request.model, dtype=getattr(torch, request.dtype), **options)
    model.to(request.device).eval()
    model.config.return_dict = True  # what is read of its outputs is read by name
    with torch.no_grad():
        pace = _pace(model, timing) if timing is not None else None
        if request.tokens:
            logits = model(torch.tensor([request.tokens], device=request.device), use_cache=False).logits[0]
            whole = folder / "logits.tmp"
            save_file({"logits": logits.float().cpu().contiguous()}, whole)
            whole.replace(folder / LOGITS)
        tokenizer = AutoTokenizer.from_pretrained(request.model, **options) if request.prompts else None
        texts = [_continue(model, tokenizer, prompt) for prompt in request.prompts]
    (folder / "answer.json").write_text(json.dumps({"texts": texts, "pace": pace}), encoding="utf-8")


def _pace(model: Any, timing: Timing) -> dict[str, float]:
    """Speed on tokens drawn at random: which they are makes no difference. Once to warm up, then measured."""
    import torch

    loaded, _ = resident()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, timing.prompt_tokens), generator=generator)
    # as `generate` does where a model knows how: logits of the last token alone
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    for new in (1, timing.new_tokens):
        before, started = waited(), time.perf_counter()
        out = model(tokens, use_cache=True, **last)
        between = time.perf_counter()
        for _ in range(new):
            best = out.logits[:, -1:].argmax(-1)
            out = model(best, past_key_values=out.past_key_values, use_cache=True)
        ended, after = time.perf_counter(), waited()
    return {
        "prefill_tokens_per_second": timing.prompt_tokens / (between - started),
        "decode_tokens_per_second": timing.new_tokens / (ended - between),
        "loaded_bytes": loaded,
        "peak_bytes": resident()[1],
        "waited": (after - before) / (ended - started) / timing.threads,
    }


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation; a chat model answers the prompt as a user's message."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        text = render(tokenizer, message, add_generation_prompt=True)
        encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    mask = encoded["attention_mask"].to(model.device)
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, temperature=None, top_p=None, top_k=None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )  # fmt: skip
    text = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return str(text)


if __name__ == "__main__":
    _answer()
