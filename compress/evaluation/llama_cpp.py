"""Opens a GGUF file in the real llama.cpp, and compares what it says with our reader of the checkpoint it was made of.

llama.cpp comes prebuilt inside the package xllamacpp, and runs in a process of its own (`llama_cpp_client.py`): an
assertion of its ends that one. Two things are looked at: whether it reads odd texts as the same tokens as the
checkpoint's tokenizer, and whether it gives the tokens of a probe the same log-probabilities as our reader does in
float32. It rounds the inputs of matrices to the type of their weights (float16, bfloat16, or 8 bits for blocks) and its
cache to float16, which is what the differences are allowed for.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.evaluation import llama_cpp_client
from compress.evaluation.odd_tokens import odd_tokens, same_tokens
from compress.evaluation.served import agreement
from compress.evaluation.verify import Check, own_logits, probe_prompt
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.header import parts_of
from compress.served_records import Apart, ServedPace
from compress.system.compute import pick_device
from compress.system.distributed import alone
from compress.system.extras import missing_extra

PACKAGE, EXTRA = "xllamacpp", "llama-cpp"
ENGINE = "llama.cpp"
NEW_TOKENS = 16
CHECK_VERSION = 1  # raised when the same file is asked or judged otherwise
_SECONDS, _BYTES_PER_SECOND = 300, 20_000_000  # to open a file and answer, at most
# Times what rounding to bfloat16 does to our reader, on average, by the widest rounding that a file's types bring.
# Seen on tiny-wiki-llama and SmolLM2-135M: F32 0.02 to 0.03, F16 0.04, BF16 0.25 to 0.34, blocks 2.1 to 2.4.
_TOLERANCES, _OF_BLOCKS, _FLOOR = {"F32": 0.25, "F16": 0.25, "BF16": 1.0}, 5.0, 0.005


@dataclass(frozen=True)
class Timing:
    """What is timed: tokens of a prompt, and how many are made after it."""

    prompt_tokens: int = 256
    new_tokens: int = 32


@dataclass(frozen=True)
class LlamaAnswer:
    """What llama.cpp said of a file.

    Args:
        description: of the model, in its words.
        logits: float32 [S, V] of the tokens.
        ids: of each text.
        continuation: tokens by which it goes on greedily.
        pace: tokens per second and memory, where it was timed.
    """

    description: str
    logits: Tensor
    ids: list[list[int]]
    continuation: list[int]
    pace: ServedPace | None


def llama_cpp_missing() -> str | None:
    """Why llama.cpp can't be asked, and what to do, in one line; None when it can."""
    return missing_extra(PACKAGE, EXTRA)


def ask_llama_cpp(
    file: Path,
    tokens: Sequence[int],
    texts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    timing: Timing | None = None,
) -> LlamaAnswer | str:
    """Open a file in llama.cpp, or say in one line why it failed.

    Args:
        file: GGUF; of a split model, the first part.
        tokens: of a prompt, which is computed at once.
        texts: to be turned into tokens, special ones in them too.
        new_tokens: to go on with, greedily, one by one.
        timing: what is timed.
    """
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        request, answer, logits = (Path(scratch) / name for name in ("request.json", "answer.json", "logits.npy"))
        asked = {
            "library": str(_library()), "file": str(file), "threads": torch.get_num_threads(), "texts": list(texts),
            "tokens": list(tokens), "new_tokens": new_tokens, "timing": None if timing is None else asdict(timing),
        }  # fmt: skip
        request.write_text(json.dumps(asked), encoding="utf-8")
        seconds = _SECONDS + sum(part.stat().st_size for part in parts_of(file)) / _BYTES_PER_SECOND
        command = [sys.executable, llama_cpp_client.__file__, *map(str, (request, answer, logits))]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, env=alone(), check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer in {seconds:.0f} s, so it was stopped"
        if not answer.is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            how = f"stopped by signal {-done.returncode}" if done.returncode < 0 else "ended without an answer"
            return f"{how} ({_assertion(lines)})" if lines else how
        found = json.loads(answer.read_text(encoding="utf-8"))
        if "failure" in found:
            return str(found["failure"])
        pace = ServedPace.model_validate(found["pace"]) if found["pace"] else None
        values = torch.from_numpy(np.load(logits)) if tokens else torch.empty(0, found["size"])
        return LlamaAnswer(found["description"], values, found["ids"], found["continuation"], pace)


def _library() -> Path:
    """The shared library inside the package."""
    found = find_spec(PACKAGE)
    assert found is not None and found.origin is not None
    return next(Path(found.origin).parent.glob("xllamacpp*.so"))


def _assertion(lines: Sequence[str]) -> str:
    """The line that says most: of ggml's assertion, else the last."""
    return next((line for line in lines if "GGML_ASSERT" in line or "ggml_abort" in line), lines[-1]).strip()


def check_in_llama_cpp(
    folder: Path,
    file: Path,
    types: Collection[str],
    trust_remote_code: bool = False,
    timing: Timing | None = None,
    device: torch.device | None = None,
) -> tuple[list[Check], ServedPace | None]:
    """Whether llama.cpp reads a file as what the checkpoint is: its tokens and its log-probabilities; and its pace.

    Args:
        folder: the checkpoint.
        file: what was made of it.
        types: of the file's matrices, ggml's names.
        trust_remote_code: as in transformers.
        timing: what is timed, in the same breath.
        device: where our reader computes; None is the best there is.
    """
    if why := llama_cpp_missing():
        return [Check(ENGINE, None, f"not asked: {why}")], None
    checkpoint = Checkpoint(folder)
    prompt = probe_prompt(checkpoint, trust_remote_code, NEW_TOKENS)
    texts, judged = tokens_check(folder, trust_remote_code)
    answer = ask_llama_cpp(file, prompt.tolist(), texts, timing=timing)
    name = f"{PACKAGE} {version(PACKAGE)}"
    if isinstance(answer, str):
        return [Check(ENGINE, False, f"{name} does not open it: {answer}")], None
    sequence = torch.cat([prompt, torch.tensor(answer.continuation)])
    place = device or pick_device("auto")
    exact, rounded = (
        own_logits(checkpoint, sequence, place, dtype, trust_remote_code) for dtype in (torch.float32, torch.bfloat16)
    )
    apart = apart_of(answer.logits, exact[: len(prompt)], rounded[: len(prompt)], prompt, types)
    agreed, _ = agreement(exact[len(prompt) - 1 : -1], sequence[len(prompt) :])
    detail = (
        f"{name}: log-probabilities of {apart.tokens} tokens differ by {apart.mean:.2g} nats on average (allowed "
        f"{apart.tolerance:.2g}), {apart.max:.2g} at most; of {len(answer.continuation)} tokens it goes on "
        f"with, the first {agreed} are ours"
    )
    return [judged(answer.ids), Check(ENGINE, apart.passed, detail)], answer.pace


def tokens_check(folder: Path, trust_remote_code: bool) -> tuple[list[str], Callable[[Sequence[Sequence[int]]], Check]]:
    """Odd texts, and what is to be said of the tokens that a program makes of them."""
    wanted, left_out = odd_tokens(folder, trust_remote_code)
    note = f"; {left_out} more have letters that are composed first, which llama.cpp does not do" if left_out else ""
    return list(wanted), lambda ids: same_tokens(wanted, ids, note)


def apart_of(said: Tensor, exact: Tensor, rounded: Tensor, tokens: Tensor, types: Collection[str]) -> Apart:
    """How far log-probabilities of tokens are from ours, and how far they may be.

    Args:
        said: logits [S, V] of llama.cpp.
        exact: of our reader, in float32.
        rounded: likewise in bfloat16.
        tokens: [S].
        types: of the file's matrices, ggml's names.
    """
    ours, theirs, usual = (
        logits.double().log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0] for logits in (exact, said, rounded)
    )
    apart, rounding = (theirs - ours).abs(), float((usual - ours).abs().mean())
    most = max(_TOLERANCES.get(each, _OF_BLOCKS) for each in types)
    return Apart(
        tokens=len(apart),
        max=float(apart.max()),
        mean=float(apart.mean()),
        rounding=rounding,
        tolerance=max(most * rounding, _FLOOR),
    )
