"""Where a model's answers to tasks are kept in a work folder, and what a dry run says of tasks. Never imports torch."""

import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.model.checkpoint import Checkpoint
from compress.model.identity import known_identity
from compress.model.shapes import model_dtype
from compress.model.side_files import side_digest
from compress.recipe.schema import EvaluateSpec
from compress.system.fingerprint import fingerprint
from compress.system.machine import versions

CODE_VERSION = 1
ANSWERS = "answers"  # in a work folder
_LIBRARIES = ("torch", "transformers", "compressed-tensors", "torchao")


def identity_of(model: str, folder: Path, dtype: str, device: str, streamed: bool) -> list[Any]:
    """What answers hang on beside the request.

    Args:
        model: fingerprint of the checkpoint.
        folder: of the checkpoint.
        dtype: "bfloat16", "float16" or "float32".
        device: "cpu" or "cuda".
        streamed: layer by layer, by our reader.
    """
    found = {name: number for name, number in versions().items() if name in _LIBRARIES}
    return [CODE_VERSION, model, side_digest(folder), dtype, device, streamed, found, version("lm_eval")]


def folder_of(cache: Path, identity: list[Any]) -> Path:
    """The folder of the answers that hang on this."""
    return cache / fingerprint("answers", *identity)


def task_lines(spec: EvaluateSpec | None, base: Checkpoint, device: str, width: int, work: Path) -> list[str]:
    """What a dry run says of an evaluation's tasks; nothing where there are none. No data set is opened.

    Args:
        spec: the evaluation.
        base: the recipe's model.
        device: "cpu" or "cuda".
        width: bytes of a number in the forward passes.
        work: the work folder.
    """
    if spec is None or spec.tasks is None:
        return []
    items = "all items" if spec.limit is None else f"at most {spec.limit:,} items"
    examples = "" if spec.fewshot is None else f", {spec.fewshot} examples before each"
    asked = f"{', '.join(spec.tasks)}: {items} of each task, by base and result{examples}; their time is not foreseen"
    kept = _kept(base, device, width, work)
    there = f"{kept:,} are there, and none of them is asked for again" if kept else "none are there yet"
    if kept is None:
        there = "those that are there are not asked for again"
    return [asked, f"answers of the base are kept in {work / ANSWERS} for all runs with it: {there}"]


def _kept(base: Checkpoint, device: str, width: int, work: Path) -> int | None:
    """How many answers of the base are kept of earlier runs in such a place; None where its weights had to be read."""
    if not (work / ANSWERS).is_dir():
        return 0
    model = known_identity(base, work)
    if model is None:
        return None
    sixteen = "float16" if device == "cuda" and model_dtype(base) == "F16" else "bfloat16"
    dtype = "float32" if width == 4 else sixteen
    hang_on = [identity_of(model, base.folder, dtype, device, streamed) for streamed in (False, True)]
    found: set[str] = set()
    for file in (file for each in hang_on for file in folder_of(work / ANSWERS, each).glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            with suppress(ValueError):  # the last line of a run that was killed
                found |= {f"{file.name} {key}" for key in json.loads(line)}
    return len(found)
