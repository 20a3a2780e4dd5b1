"""Opens a checkpoint in vLLM and writes down what it says and how fast: a script for an environment that has vLLM.

    python vllm_client.py REQUEST.json ANSWER.json
    python vllm_client.py --version

It is run by its path and imports nothing of dscompress, which that environment need not have: nothing but vLLM then has
a hand in what is loaded. `compress/evaluation/served.py` writes the request and reads the answer.

The request: `model` (a folder), `dtype`, `trust_remote_code`, `tokens` (the prompt's ids), `new_tokens` (how many to
continue it by, greedily), `timing` (null, or `prompt_tokens`, `new_tokens` and `rounds`), `positions` (most tokens).
The answer: `version`, `device`, then `logprobs` of the prompt's tokens but the first, nats, `continuation` and
`continuation_logprobs`, `pace` (as `compress.records.Pace`, or null); or `failure`, vLLM's own line.

vLLM runs inside this process, so that an error is the one that was raised and memory is this process's. Its cache gets
1 GiB whatever the model: of two checkpoints the memory then differs by their weights. On a CPU it runs eagerly: what
torch.compile makes for so few tokens costs more than it saves.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

CACHE_GIB = 1
_SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the cores that this process has, whichever they are
    "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB),
    "VLLM_NO_USAGE_STATS": "1",
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What vLLM says to a request."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    tokens, timing = request["tokens"], request["timing"]
    device = current_platform.device_type
    where: dict[str, Any] = {} if device == "cpu" else {"kv_cache_memory_bytes": CACHE_GIB * 2**30}
    llm = LLM(
        model=request["model"], dtype=request["dtype"], trust_remote_code=request["trust_remote_code"],
        max_model_len=request["positions"], max_num_seqs=1, enable_prefix_caching=False, disable_log_stats=True,
        enforce_eager=device == "cpu", **where,
    )  # fmt: skip
    loaded = memory(device)[0]

    def generate(prompt: Sequence[int], count: int, **more: Any) -> Any:
        how = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, **more)
        return llm.generate([{"prompt_token_ids": list(prompt)}], how, use_tqdm=False)[0]

    said = generate(tokens, request["new_tokens"], logprobs=0, prompt_logprobs=0)
    made = said.outputs[0]
    pairs = zip(tokens[1:], said.prompt_logprobs[1:], strict=True)
    continued = zip(made.token_ids, made.logprobs, strict=True)
    return {
        "device": device,
        "logprobs": [row[token].logprob for token, row in pairs],
        "continuation": list(made.token_ids),
        "continuation_logprobs": [row[token].logprob for token, row in continued],
        "pace": None if timing is None else {**pace(generate, tokens, timing, device), "loaded_bytes": loaded},
    }


def pace(generate: Any, tokens: Sequence[int], timing: dict[str, int], device: str) -> dict[str, float]:
    """Tokens per second, medians of rounds behind one that warms up; memory at most; how long others had the cores."""
    length, new = timing["prompt_tokens"], timing["new_tokens"]
    prompt = (list(tokens) * (length // len(tokens) + 1))[:length]
    prefill, decode = [], []
    generate(prompt, 1 + new)
    before, start = waited(), time.perf_counter()
    for _ in range(timing["rounds"]):
        times = [time.perf_counter()]
        for count in (1, 1 + new):
            generate(prompt, count)
            times.append(time.perf_counter())
        alone, both = times[1] - times[0], times[2] - times[1]
        prefill.append(length / alone)
        decode.append(new / max(both - alone, 1e-9))
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    return {
        "prefill_tokens_per_second": median(prefill),
        "decode_tokens_per_second": median(decode),
        "peak_bytes": memory(device)[1],
        "waited": (waited() - before) / (time.perf_counter() - start) / threads,
    }


def memory(device: str) -> tuple[int, int]:
    """Bytes held now and at most: of the GPU, or resident in this process where there is none."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024, int(rows["VmHWM"].split()[0]) * 1024


def waited() -> float:
    """Seconds so far that this process's threads were ready to run while others had the cores (Linux)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that just ended
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e9


def words_of(error: BaseException) -> str:
    """An error in one line; one without words is told by the line that raised it."""
    text = " ".join(str(error).split())
    if not text:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {text}"


def found_version() -> str | None:
    """The version of what is installed here: vllm, or the package of its CPU build."""
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def main() -> None:
    """Read the request, write the answer, whatever vLLM does; `--version` prints which one is here."""
    if sys.argv[1:] == ["--version"]:
        print(found_version() or "")
        return
    sys.path.remove(str(Path(__file__).parent))  # what lies beside this script is no library
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    asked, to = map(Path, sys.argv[1:])
    found: dict[str, Any] = {"version": found_version()}
    try:
        found |= answer(json.loads(asked.read_text(encoding="utf-8")))
    except Exception as error:  # of vLLM, which raises many kinds
        traceback.print_exc()
        found["failure"] = words_of(error)
    whole = to.with_suffix(".tmp")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(to)
    sys.stdout.flush()
    os._exit(0)  # its threads and processes need not say goodbye


if __name__ == "__main__":
    main()
