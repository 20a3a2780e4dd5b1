"""Opens a folder in ONNX Runtime GenAI and writes down what it says and how fast: a script for an environment with it.

    python onnx_client.py REQUEST.json ANSWER.json
    python onnx_client.py --version

It is run by its path and imports nothing of dscompress, which that environment need not have: nothing but ONNX Runtime
then has a hand in what is loaded. `compress/evaluation/onnx_runtime.py` writes the request and reads the answer.

The request: `folder`, `threads`, `tokens` (the prompt's ids), `logits` (a file for those of the prompt, float32
[S, V]), `texts` (to be tokenized), `new_tokens` (how many to continue the prompt by, greedily), `timing` (null, or
`prompt_tokens`, `new_tokens` and `rounds`). The answer: `version`, then `codes`, `ids` (of each text), `continuation`,
`pace` (as `compress.served_records.ServedPace`, or null); or `failure`, the program's own line. `codes` has a row for
each node MatMulNBits: its name, and the SHA-256 of its packed codes, of its scales and of its packed zero points (null
without any).
"""

import hashlib
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

PACKAGE = "onnxruntime-genai"
_NEEDED = ("torch", "transformers", "onnx", "onnx_ir")  # by its builder
_BLOCK = 1 << 22


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime GenAI says to a request."""
    import numpy
    import onnxruntime_genai

    folder, tokens, timing = Path(request["folder"]), request["tokens"], request["timing"]
    codes = stored_codes(folder)
    config = onnxruntime_genai.Config(str(folder))
    config.overlay(
        json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": request["threads"]}}}})
    )
    model = onnxruntime_genai.Model(config)
    loaded = memory()[0]
    tokenizer = onnxruntime_genai.Tokenizer(model)

    def generator(length: int) -> Any:
        how = onnxruntime_genai.GeneratorParams(model)
        how.set_search_options(max_length=length, min_length=length, do_sample=False)
        return onnxruntime_genai.Generator(model, how)

    whole = generator(len(tokens) + request["new_tokens"])
    whole.append_tokens(numpy.array(tokens, numpy.int32))
    rows = numpy.array(whole.get_output("logits"), numpy.float32)[0]
    numpy.save(request["logits"], rows[: len(tokens)])
    for _ in range(request["new_tokens"]):
        whole.generate_next_token()
    return {
        "codes": codes,
        "ids": [[int(token) for token in tokenizer.encode(text)] for text in request["texts"]],
        "continuation": [int(token) for token in whole.get_sequence(0)[len(tokens) :]],
        "pace": None
        if timing is None
        else {**pace(generator, tokens, request["threads"], **timing), "loaded_bytes": loaded},
    }


def stored_codes(folder: Path) -> list[dict[str, Any]]:
    """The rows of `codes`, read from the file: no more of it is in memory than a block."""
    import onnx

    graph = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph
    weights = {each.name: each for each in graph.initializer}

    def digest(name: str) -> str:
        where = {entry.key: entry.value for entry in weights[name].external_data}
        found, left = hashlib.sha256(), int(where["length"])
        with (folder / where["location"]).open("rb") as file:
            file.seek(int(where.get("offset", 0)))
            while left:
                block = file.read(min(left, _BLOCK))
                found.update(block)
                left -= len(block)
        return found.hexdigest()

    rows = []
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            inputs = [*node.input, "", ""]
            rows.append({
                "name": node.name, "codes": digest(inputs[1]), "scales": digest(inputs[2]),
                "zeros": digest(inputs[3]) if inputs[3] else None,
            })  # fmt: skip
    return rows


def pace(
    generator: Any, tokens: list[int], threads: int, prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens per second, medians of rounds behind one that warms up; memory at most; how long others had the cores."""
    import numpy

    prompt = numpy.array((tokens * (prompt_tokens // len(tokens) + 1))[:prompt_tokens], numpy.int32)
    prefill, decode = [], []
    before = start = 0.0
    for number in range(1 + rounds):
        if number == 1:
            before, start = waited(), time.perf_counter()
        each = generator(prompt_tokens + 1 + new_tokens)
        times = [time.perf_counter()]
        each.append_tokens(prompt)
        each.generate_next_token()
        times.append(time.perf_counter())
        for _ in range(new_tokens):
            each.generate_next_token()
        times.append(time.perf_counter())
        prefill.append(prompt_tokens / (times[1] - times[0]))
        decode.append(new_tokens / (times[2] - times[1]))
    return {
        "prefill_tokens_per_second": median(prefill[1:]),
        "decode_tokens_per_second": median(decode[1:]),
        "peak_bytes": memory()[1],
        "waited": (waited() - before) / (time.perf_counter() - start) / threads,
    }


def memory() -> tuple[int, int]:
    """Bytes resident in this process now and at most."""
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024, int(rows["VmHWM"].split()[0]) * 1024


def waited() -> float:
    """Seconds so far that this process's threads were ready to run while others had the cores (Linux)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that just ended
            total += int(file.read_text(encoding="ascii").split()[1])
    return total / 1e9


def found_versions() -> list[str]:
    """The version of what is installed here, where its builder can run; then names and versions of what that needs."""
    found = []
    with suppress(PackageNotFoundError):
        found = [version(PACKAGE), *(f"{needed} {version(needed)}" for needed in _NEEDED)]
        found.append(f"onnxruntime {version('onnxruntime')}")  # which may have another name
    return found


def main() -> None:
    """Read the request, write the answer, whatever the program does; `--version` prints which are here."""
    if sys.argv[1:] == ["--version"]:
        print("\n".join(found_versions()))
        return
    sys.path.remove(str(Path(__file__).parent))  # what lies beside this script is no library
    asked, to = map(Path, sys.argv[1:])
    found: dict[str, Any] = {"version": next(iter(found_versions()), None)}
    try:
        found |= answer(json.loads(asked.read_text(encoding="utf-8")))
    except Exception as error:  # of ONNX Runtime, which raises RuntimeError and its own kinds
        traceback.print_exc()
        found["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    whole = to.with_suffix(".tmp")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(to)
    sys.stdout.flush()
    os._exit(0)  # its threads need not say goodbye


if __name__ == "__main__":
    main()
