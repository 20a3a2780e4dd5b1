"""Opens a folder in OpenVINO on a CPU and writes down what it says and how fast: a script for an environment with it.

    python openvino_client.py REQUEST.json ANSWER.json
    python openvino_client.py --version

It is run by its path and imports nothing of dscompress, which that environment need not have: nothing but OpenVINO then
has a hand in what is loaded. `compress/evaluation/openvino_runtime.py` writes the request and reads the answer.

The request: `folder`, `threads`, `exact` (whether the program keeps to float32 instead of what it chooses on this
machine), `tokens` (the prompt's ids), `logits` (a file for those of the prompt, float32 [S, V]), `texts` (to be
tokenized), `new_tokens` (how many to continue the prompt by, greedily), `timing` (null, or `prompt_tokens`,
`new_tokens` and `rounds`). The answer: `version`, then `codes`, `options` (which it runs with), `ids` (of each text),
`continuation`, `pace` (as `compress.served_records.ServedPace`, or null); or `failure`, the program's own line. `codes`
has the SHA-256 of codes, scales and zero points ("" without any) that each module's product or look-up reads, by the
module.

Logits are those of the model as OVModelForCausalLM runs it; LLMPipeline, which runs it otherwise, gives the rest.
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

_EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
_NEEDED = ("torch", "transformers", "optimum-intel", "openvino-tokenizers", "openvino-genai")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What OpenVINO says to a request."""
    import numpy
    import openvino
    import openvino_genai

    folder, tokens, timing = request["folder"], request["tokens"], request["timing"]
    options = {"INFERENCE_NUM_THREADS": request["threads"], **(_EXACT if request["exact"] else {})}
    pipeline = openvino_genai.LLMPipeline(folder, "CPU", **options)
    loaded, tokenizer = memory()[0], pipeline.get_tokenizer()

    def go_on(prompt: list[int], count: int) -> Any:
        how = openvino_genai.GenerationConfig()
        how.max_new_tokens, how.do_sample, how.ignore_eos = count, False, True
        ids, mask = numpy.array([prompt], numpy.int64), numpy.ones((1, len(prompt)), numpy.int64)
        return pipeline.generate(openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask)), how)

    paced = None
    if timing is not None:  # before anything else is in memory
        paced = {**pace(go_on, tokens, request["threads"], **timing), "loaded_bytes": loaded}
    found = {
        "ids": [tokenizer.encode(text).input_ids.data[0].tolist() if text else [] for text in request["texts"]],
        "continuation": list(go_on(tokens, request["new_tokens"]).tokens[0]) if request["new_tokens"] else [],
        "pace": paced,
    }
    model = openvino.Core().read_model(str(Path(folder) / "openvino_model.xml"))
    codes = stored_codes(model)
    compiled = openvino.Core().compile_model(model, "CPU", options)
    numpy.save(request["logits"], logits(compiled, tokens))
    chosen = {name: compiled.get_property(name) for name in _EXACT}
    said = {
        name: each.get_type_name() if isinstance(each, openvino.Type) else str(each) for name, each in chosen.items()
    }
    return {**found, "codes": codes, "options": said}


def logits(compiled: Any, tokens: list[int]) -> Any:
    """Float32 [S, V] of a prompt."""
    import numpy

    count = len(tokens)
    inputs = {
        "input_ids": numpy.array([tokens], numpy.int64), "attention_mask": numpy.ones((1, count), numpy.int64),
        "position_ids": numpy.arange(count)[None], "beam_idx": numpy.zeros(1, numpy.int32),
    }  # fmt: skip
    names = {name for each in compiled.inputs for name in each.get_names()}
    outputs = compiled.create_infer_request().infer({name: inputs[name] for name in inputs if name in names})
    return numpy.array(outputs[compiled.outputs[0]][0], numpy.float32)


def stored_codes(model: Any) -> dict[str, list[str]]:
    """The `codes` of a file: what products and look-ups reach over nothing but the arithmetic of codes."""
    found = {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind in ("MatMul", "Gather"):
            parts = parts_of(node.input_value(1 if kind == "MatMul" else 0).get_node())
            if "codes" in parts:
                module = node.get_friendly_name().removeprefix("__module.").split("/")[0]
                found[module] = [parts.get(part, "") for part in ("codes", "scales", "zeros")]
    return found


def parts_of(node: Any) -> dict[str, str]:
    """Digests of the constants of (codes - zeros) * scales; nothing where a node is something else."""
    parts = {}
    node = below(node)
    if node.get_type_name() == "Multiply":
        parts["scales"] = digest(below(node.input_value(1).get_node()))
        node = below(node.input_value(0).get_node())
        if node.get_type_name() == "Subtract":
            parts["zeros"] = digest(below(node.input_value(1).get_node()))
            node = below(node.input_value(0).get_node())
        if node.get_type_name() == "Constant":
            return {**parts, "codes": digest(node)}
    return {}


def below(node: Any) -> Any:
    """What a node reads, without changes of type and shape."""
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node


def digest(node: Any) -> str:
    """SHA-256 of a constant's bytes."""
    return hashlib.sha256(node.get_data().tobytes()).hexdigest() if node.get_type_name() == "Constant" else ""


def pace(
    go_on: Any, tokens: list[int], threads: int, prompt_tokens: int, new_tokens: int, rounds: int
) -> dict[str, float]:
    """Tokens per second, medians of rounds behind one that warms up; memory at most; how long others had the cores.

    Each round's prompt begins otherwise: LLMPipeline remembers what it has read.
    """
    prefill, decode = [], []
    before = start = 0.0
    for number in range(1 + rounds):
        if number == 1:
            before, start = waited(), time.perf_counter()
        turned = tokens[number:] + tokens[:number]
        measured = go_on((turned * (prompt_tokens // len(tokens) + 1))[:prompt_tokens], 1 + new_tokens).perf_metrics
        prefill.append(1000 * prompt_tokens / measured.get_ttft().mean)
        decode.append(1000 / measured.get_tpot().mean)
    return {
        "prefill_tokens_per_second": median(prefill[1:]),
        "decode_tokens_per_second": median(decode[1:]),
        "peak_bytes": memory()[1],
        "waited": (waited() - before) / (time.perf_counter() - start) / threads,
    }


def memory() -> tuple[int, int]:
    """Bytes resident in this process now and at most; the mapped file counts as far as it was read."""
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
    """The version of OpenVINO here, then names and versions of what makes and opens models beside it; all or none."""
    with suppress(PackageNotFoundError):
        return [version("openvino"), *(f"{needed} {version(needed)}" for needed in _NEEDED)]
    return []


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
    except Exception as error:  # of OpenVINO, which raises RuntimeError and its own kinds
        traceback.print_exc()
        found["failure"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    whole = to.with_suffix(".tmp")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(to)
    sys.stdout.flush()
    os._exit(0)  # its threads need not say goodbye


if __name__ == "__main__":
    main()
