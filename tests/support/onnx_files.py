"""Checkpoints to export, and a stand-in for the environment whose builder makes folders for ONNX Runtime GenAI."""

import stat
from pathlib import Path
from typing import Any

import torch
from quantized import quantize
from random_models import random_tokens

from compress.data.calibration import TokenSet
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.recipe.quantize import WeightActivationStage, WeightOnlyStage
from compress.system.programs import Engine
from compress.system.progress import Reporter


def quantized(dense: Path, work: Path, **spec: Any) -> Path:
    """A model quantized by a stage."""
    kind = WeightActivationStage if spec.get("method") in ("dynamic", "static") else WeightOnlyStage
    tokens = TokenSet(random_tokens(2, 24, 1), "random", "random", None)
    context = Context(torch.device("cpu"), torch.float32, tokens, random_tokens(1, 8, 2), Reporter(quiet=True), False)
    quantize(kind(kind="quantize", **spec), Checkpoint(dense), work, context)
    return work / "checkpoint"


def refusing(python: Path, failure: str) -> Engine:
    """The same; asked about a folder, it fails with this error. It notes each call in the file `calls` beside it."""
    engine = builder(python, f'echo "$1" >> "{python.parent}/calls"')
    lines = python.read_text().split("\n")
    answer = f"""case "$1" in *onnx_client.py) echo '{{"failure": "{failure}"}}' > "$3"; exit;; esac"""
    python.write_text("\n".join([*lines[:2], lines[2], answer, *lines[3:]]))
    return engine


def builder(python: Path, more: str = "") -> Engine:
    """An environment whose builder copies what it reads (`read`) and notes how it was called (`command`).

    Args:
        python: the interpreter to write.
        more: shell commands that it runs first; -i and -o are "$4" and "$6".
    """
    python.write_text(
        '#!/bin/sh\nif [ "$2" = --version ]; then echo 0.18.0; exit; fi\n'
        f'{more}\nmkdir "$6"; cp -rL "$4" "$6/read"; echo "$@" > "$6/command"; printf 12345 > "$6/model.onnx"\n'
        'echo "{}" > "$6/genai_config.json"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Engine(python, "0.18.0")
