"""Opens a folder in ONNX Runtime GenAI, and compares what it says with our reader of the checkpoint it was made of.

It runs in a process of its own (`onnx_client.py`), in this environment or another. Three things are looked at: whether
the file holds the checkpoint's codes, scales and zero points bit for bit, whether the program's tokenizer reads odd
texts as the checkpoint's does, and whether it gives the tokens of a probe the same log-probabilities as our reader does
in float32, where nothing is rounded but the codes. That is its own precision too; where it rounds inputs of linears to
8 bits, it may be some times as far off as our reader in bfloat16 is.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.evaluation import onnx_client
from compress.evaluation.compare import open_view
from compress.evaluation.odd_tokens import odd_tokens, same_tokens
from compress.evaluation.other_program import (
    NEW_TOKENS,
    Timing,
    allowed_for_rounding,
    apart,
    same_codes,
    same_numbers,
)
from compress.evaluation.served import agreement
from compress.evaluation.verify import Check, probe_prompt, stream_logits
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint
from compress.served_records import ServedPace
from compress.system.compute import pick_device
from compress.system.programs import Engine, Program, run_client

ENGINE = "ONNX Runtime GenAI"
CHECK_VERSION = 1  # raised when the same file is asked or judged otherwise
PROGRAM = Program(
    ENGINE, "onnxruntime_genai", ".venv-ort", Path(onnx_client.__file__), "pip install 'dscompress[onnx]'"
)
TOLERANCE = 1e-3  # nats, on average; tiny-wiki-llama, SmolLM2-135M and a model of each family came to 1e-6 to 6e-6
# Its tokenizer is its own and may differ in a few odd texts: of SmolLM2's 202 in 4, in digits of other scripts.
_BORNE = 10
_ITS_OWN = "; ONNX Runtime has a tokenizer of its own (the checkpoint's can be used instead: it takes ids)"
_SECONDS, _BYTES_PER_SECOND = 300, 20_000_000  # to open a folder and answer, at most

Nodes = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class OnnxAnswer:
    """What ONNX Runtime GenAI said of a folder.

    Args:
        logits: float32 [S, V] of the tokens.
        ids: of each text.
        continuation: tokens by which it goes on greedily.
        nodes: digests of the codes, scales and zero points of each node that has some, by its name.
        pace: tokens per second and memory, where it was timed.
    """

    logits: Tensor
    ids: list[list[int]]
    continuation: list[int]
    nodes: Nodes
    pace: ServedPace | None


def ask_onnx_runtime(
    folder: Path,
    engine: Engine,
    tokens: Sequence[int],
    texts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    timing: Timing | None = None,
) -> OnnxAnswer | str:
    """Open a folder in ONNX Runtime GenAI, or say in one line why it failed.

    Args:
        folder: with genai_config.json.
        engine: whom to ask.
        tokens: of a prompt, which is computed at once.
        texts: to be turned into tokens.
        new_tokens: to go on with, greedily, one by one.
        timing: what is timed.
    """
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        logits = Path(scratch) / "logits.npy"
        request = {
            "folder": str(folder), "threads": torch.get_num_threads(), "tokens": list(tokens), "logits": str(logits),
            "texts": list(texts), "new_tokens": new_tokens, "timing": None if timing is None else asdict(timing),
        }  # fmt: skip
        seconds = _SECONDS + sum(file.stat().st_size for file in folder.iterdir()) / _BYTES_PER_SECOND
        found = run_client(engine.python, PROGRAM.client, request, seconds, {})
        if "failure" in found:
            return str(found["failure"])
        nodes = {row["name"]: (row["codes"], row["scales"], row["zeros"]) for row in found["codes"]}
        pace = None if found["pace"] is None else ServedPace.model_validate(found["pace"])
        return OnnxAnswer(torch.from_numpy(np.load(logits)), found["ids"], found["continuation"], nodes, pace)


def check_in_onnx_runtime(
    folder: Path,
    exported: Path,
    engine: Engine,
    matrices: int,
    other: Callable[[Nodes], list[str]],
    int8_inputs: bool = False,
    timing: Timing | None = None,
    device: torch.device | None = None,
) -> tuple[list[Check], ServedPace | None]:
    """Whether ONNX Runtime GenAI computes what the checkpoint is, with its codes; and its pace.

    Args:
        folder: the checkpoint.
        exported: what was made of it.
        engine: whom to ask.
        matrices: how many of the checkpoint's matrices should be there as codes.
        other: which of them are others, by the digests of the file's nodes.
        int8_inputs: whether it rounds the inputs of linears.
        timing: what is timed, in the same breath.
        device: where our reader computes; None is the best there is.
    """
    checkpoint = Checkpoint(folder)
    prompt = probe_prompt(checkpoint, False, NEW_TOKENS)
    wanted, _ = odd_tokens(folder, False)
    answer = ask_onnx_runtime(exported, engine, prompt.tolist(), list(wanted), timing=timing)
    name = f"{ENGINE} {engine.version}"
    if isinstance(answer, str):
        return [Check("onnx runtime", False, f"{name} does not open it: {answer}")], None
    checks = [same_codes(matrices, other(answer.nodes))] if matrices else []
    tokens = same_tokens(wanted, answer.ids, borne=_BORNE)
    checks.append(tokens if tokens.passed else replace(tokens, detail=tokens.detail + _ITS_OWN))
    sequence = torch.cat([prompt, torch.tensor(answer.continuation, dtype=torch.long)])
    place, allowed = device or pick_device("auto"), TOLERANCE
    view = DequantizedCheckpoint(checkpoint).unrounded()
    exact = stream_logits(open_view(view, place, torch.float32, False), sequence)
    differences = apart(answer.logits, exact, prompt)
    if int8_inputs:
        allowed = allowed_for_rounding(view, place, exact, prompt)
    agreed, _ = agreement(exact[len(prompt) - 1 : -1], sequence[len(prompt) :])
    checks.append(same_numbers("onnx runtime", name, differences, allowed, len(answer.continuation), agreed))
    return checks, answer.pace
