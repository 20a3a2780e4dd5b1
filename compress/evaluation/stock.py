"""Asks a checkpoint, opened by stock transformers in a process of its own, for logits, continuations and its speed.

Another process, because the stock loader holds the whole model and dscompress never does, and because nothing of
dscompress can then have a hand in what is loaded. It may stay for a second model: to start takes longer than to answer.

    python -m compress.evaluation.stock < PATHS_OF_REQUESTS
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.data.guard import render
from compress.system.distributed import alone, rank
from compress.system.machine import waited
from compress.system.memory import resident

if TYPE_CHECKING:
    from torch import Tensor

NEW_TOKENS = 48
LOGITS, ANSWER = "logits.safetensors", "answer.json"
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


class _Loader:
    """A process that answers requests one after the other; its libraries are imported once."""

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "compress.evaluation.stock"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, env=alone(),
        )  # fmt: skip
        self._busy = False

    @property
    def ready(self) -> bool:
        """Whether it can take a request."""
        return not self._busy and self._process.poll() is None

    def send(self, request: Path) -> None:
        """Begin with a request; it is ready."""
        assert self._process.stdin is not None
        self._busy = True
        with suppress(BrokenPipeError):  # it has ended; its last words are read with the answer
            self._process.stdin.write(f"{request}\n")
            self._process.stdin.flush()

    def answer(self, folder: Path) -> Answer:
        """Wait for the answer to the request that lies in the folder."""
        from safetensors.torch import load_file

        assert self._process.stdout is not None
        done = bool(self._process.stdout.readline())
        logits = load_file(folder / LOGITS)["logits"] if (folder / LOGITS).is_file() else None
        if not done:
            code = self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()
            return replace(_failed(code, said), logits=logits)
        self._busy = False
        found = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
        return Answer(logits, found["texts"], pace=found["pace"])

    def close(self) -> None:
        """End it, whatever it is at."""
        self._process.kill()  # nothing happens to one that has ended
        self._process.communicate()
        self._said.close()


_kept: list[_Loader] | None = None  # loaders that are ready, while some are kept


@contextmanager
def kept_ready() -> Iterator[None]:
    """Inside, a loader is started at once, and one that has answered stays for the next request."""
    global _kept
    if _kept is not None:  # inside another such block, which keeps them
        yield
        return
    _kept = [_Loader()]
    try:
        yield
    finally:
        for loader in _kept:
            loader.close()
        _kept = None


def loader_ahead(device: str, max_memory: int | None) -> AbstractContextManager[None]:
    """Inside, a loader is kept ready where there is a GPU, beside which the processor has time for it.

    Args:
        device: as for `pick_device`.
        max_memory: likewise.

    Raises:
        UserError: a device that is not there.
    """
    from compress.system.compute import pick_device  # here, because it imports torch

    wanted = rank() == 0 and device != "cpu" and pick_device(device, max_memory).type == "cuda"
    return kept_ready() if wanted else nullcontext()


def start_anew() -> None:
    """Put new processes in the place of loaders that are kept: one that has used a GPU holds on to some of it."""
    for place, loader in enumerate(_kept or ()):
        if loader.ready:
            loader.close()
            assert _kept is not None
            _kept[place] = _Loader()


def ask(request: Request) -> Answer:
    """Run the request in a process of its own and wait for it."""
    with asked(request) as answer:
        return answer()


@contextmanager
def asked(request: Request) -> Iterator[Callable[[], Answer]]:
    """Inside, a process of its own works at the request; what is given waits for its answer."""
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        folder = Path(scratch)
        file = folder / "request.json"
        file.write_text(json.dumps(asdict(request)), encoding="utf-8")
        loader = next((each for each in _kept or () if each.ready), None) or _Loader()
        if _kept is not None and loader not in _kept:
            _kept.append(loader)
        loader.send(file)
        try:
            yield cache(lambda: loader.answer(folder))
        finally:
            if _kept is None or not loader.ready:
                loader.close()


def _failed(code: int, said: list[str]) -> Answer:
    """The answer of a process that ended with a code other than 0, and what it had said."""
    reason = said[-1] if said else "no reason given"
    if code == -signal.SIGKILL:
        return Answer(None, [], "the loader was stopped by signal 9, most likely for want of memory", short=True)
    short = next((line for line in reversed(said) if any(words in line for words in _SHORT)), None)
    if code < 0:
        reason = f"the loader was stopped by signal {-code}" + (f" ({said[-1]})" if said else "")
    return Answer(None, [], short or reason, short=short is not None)


def _main() -> None:
    """In the new process: a line for each request, and a line back when its answer is written."""
    import torch  # noqa: F401  while nobody waits yet
    import transformers

    done = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a model's code prints is no answer
    transformers.logging.disable_progress_bar()
    for line in sys.stdin:
        _answer(Path(line.rstrip("\n")))
        done.write("done\n")


def _answer(file: Path) -> None:
    """Load, compute, write the answer's files beside the request, and let go of the memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, fields = file.parent, json.loads(file.read_text(encoding="utf-8"))
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
            del logits
        tokenizer = AutoTokenizer.from_pretrained(request.model, **options) if request.prompts else None
        texts = [_continue(model, tokenizer, prompt) for prompt in request.prompts]
    (folder / ANSWER).write_text(json.dumps({"texts": texts, "pace": pace}), encoding="utf-8")
    del model
    gc.collect()
    if request.device.startswith("cuda"):
        torch.cuda.empty_cache()


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
    _main()
