"""Opens a folder in OpenVINO, and compares what it says with our reader of the checkpoint that it was made of.

It runs on the CPU in a process of its own (`openvino_client.py`), in this environment or another. Three things are
looked at: whether the file holds the checkpoint's codes, scales and zero points bit for bit, whether the program's
tokenizer reads odd texts as the checkpoint's does, and whether it gives the tokens of a probe the same
log-probabilities as our reader does, where both keep to float32. On a machine that is faster with less OpenVINO chooses
less by itself: a second process is timed with its own choice, which may be some times as far off as our reader in
bfloat16 is.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.evaluation import openvino_client
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

ENGINE = "OpenVINO"
CHECK_VERSION = 1  # raised when the same file is asked or judged otherwise
PROGRAM = Program(
    ENGINE,
    "openvino_genai",
    ".venv-openvino",
    Path(openvino_client.__file__),
    "pip install 'dscompress[openvino]' in an environment of its own",
)
TOLERANCE = 1e-3  # nats, on average; tiny-wiki-llama, SmolLM2-135M and a model of each family came to 1e-6 to 2e-4
_BORNE = 10
_CHOSEN = "as it runs here"
_ITS_OWN = "; OpenVINO has a tokenizer of its own (the checkpoint's can be used instead: it takes ids)"
_SECONDS, _BYTES_PER_SECOND = 300, 20_000_000  # to open a folder and answer, at most

Found = Mapping[str, list[str]]


@dataclass(frozen=True)
class OpenvinoAnswer:
    """What OpenVINO said of a folder.

    Args:
        logits: float32 [S, V] of the tokens.
        ids: of each text.
        continuation: tokens by which LLMPipeline goes on greedily.
        codes: digests of codes, scales and zero points, by module.
        options: of its CPU device, which the model ran with.
        pace: tokens per second and memory, where it was timed.
    """

    logits: Tensor
    ids: list[list[int]]
    continuation: list[int]
    codes: Found
    options: dict[str, str]
    pace: ServedPace | None


def ask_openvino(
    folder: Path,
    engine: Engine,
    tokens: Sequence[int],
    texts: Sequence[str] = (),
    new_tokens: int = NEW_TOKENS,
    exact: bool = True,
    timing: Timing | None = None,
) -> OpenvinoAnswer | str:
    """Open a folder in OpenVINO, or say in one line why it failed.

    Args:
        folder: with openvino_model.xml.
        engine: whom to ask.
        tokens: of a prompt, which is computed at once.
        texts: to be turned into tokens.
        new_tokens: to go on with, greedily, one by one.
        exact: in float32, whatever the machine is faster with.
        timing: what is timed.
    """
    with tempfile.TemporaryDirectory(prefix="dscompress-") as scratch:
        logits = Path(scratch) / "logits.npy"
        request = {
            "folder": str(folder), "threads": torch.get_num_threads(), "exact": exact, "tokens": list(tokens),
            "logits": str(logits), "texts": list(texts), "new_tokens": new_tokens,
            "timing": None if timing is None else asdict(timing),
        }  # fmt: skip
        seconds = _SECONDS + sum(file.stat().st_size for file in folder.iterdir()) / _BYTES_PER_SECOND
        found = run_client(engine.python, PROGRAM.client, request, seconds, {})
        if "failure" in found:
            return str(found["failure"])
        pace = None if found["pace"] is None else ServedPace.model_validate(found["pace"])
        values = torch.from_numpy(np.load(logits))
        return OpenvinoAnswer(values, found["ids"], found["continuation"], found["codes"], found["options"], pace)


def check_in_openvino(
    folder: Path,
    exported: Path,
    engine: Engine,
    matrices: int,
    other: Callable[[Found], list[str]],
    timing: Timing | None = None,
    device: torch.device | None = None,
) -> tuple[list[Check], ServedPace | None]:
    """Whether OpenVINO computes what the checkpoint is, with its codes; and its pace.

    Args:
        folder: the checkpoint.
        exported: what was made of it.
        engine: whom to ask.
        matrices: how many of the checkpoint's matrices should be there as codes.
        other: which of them are others, by the file's digests.
        timing: what is timed, with what OpenVINO chooses on this machine.
        device: where our reader computes; None is the best there is.
    """
    checkpoint = Checkpoint(folder)
    prompt = probe_prompt(checkpoint, False, NEW_TOKENS)
    wanted, _ = odd_tokens(folder, False)
    answer = ask_openvino(exported, engine, prompt.tolist(), list(wanted))
    name = f"{ENGINE} {engine.version}"
    if isinstance(answer, str):
        return [Check("openvino", False, f"{name} does not open it: {answer}")], None
    checks = [same_codes(matrices, other(answer.codes))] if matrices else []
    tokens = same_tokens(wanted, answer.ids, borne=_BORNE)
    checks.append(tokens if tokens.passed else replace(tokens, detail=tokens.detail + _ITS_OWN))
    sequence = torch.cat([prompt, torch.tensor(answer.continuation, dtype=torch.long)])
    view, place = DequantizedCheckpoint(checkpoint).unrounded(), device or pick_device("auto")
    exact = stream_logits(open_view(view, place, torch.float32, False), sequence)
    agreed, _ = agreement(exact[len(prompt) - 1 : -1], sequence[len(prompt) :])
    differences = apart(answer.logits, exact, prompt)
    checks.append(same_numbers("openvino", name, differences, TOLERANCE, len(answer.continuation), agreed))
    if timing is None:
        return checks, None
    chosen = ask_openvino(exported, engine, prompt.tolist(), (), 0, False, timing)
    if isinstance(chosen, str):
        return [*checks, Check(_CHOSEN, False, f"{name} does not run it: {chosen}")], None
    differences, allowed = apart(chosen.logits, exact, prompt), allowed_for_rounding(view, place, exact, prompt)
    said = ", ".join(f"{option} {value}" for option, value in chosen.options.items())
    detail = (
        f"with what it chooses on this machine ({said}) they differ by {differences.mean():.2g} nats on average "
        f"(allowed {allowed:.2g})"
    )
    return [*checks, Check(_CHOSEN, bool(differences.mean() <= allowed), detail)], chosen.pace
