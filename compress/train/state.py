"""The state of training on disk: masters, the optimizer's moments and where training stood, by torch's own format.

A state appears under its name when it is whole, and can be taken up by another number of processes.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from compress.system import distributed
from compress.system.files import write_text, writing

_NOTES = "notes.json"
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def save(folder: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer | None, notes: dict[str, Any]) -> None:
    """Write a state; without an optimizer the weights alone. Called in all processes.

    Raises:
        OutputError: it can't be written.
    """
    partial = folder.with_name(folder.name + ".part")
    distributed.first(lambda: shutil.rmtree(partial, ignore_errors=True))
    with writing(folder), _quiet():
        state_dict_saver.save(_tensors(trainee, optimizer), checkpoint_id=partial)
    distributed.first(lambda: _commit(partial, folder, notes))


def _commit(partial: Path, folder: Path, notes: dict[str, Any]) -> None:
    write_text(partial / _NOTES, json.dumps(notes))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def load(folder: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Take up a state; returns its notes. Called in all processes."""
    with _quiet():
        state = _tensors(trainee, optimizer)
        state_dict_loader.load(state, checkpoint_id=folder)
        if optimizer is None:
            set_model_state_dict(trainee, state["model"], options=_TRAINED_ONLY)
        else:
            set_state_dict(
                trainee, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                options=_TRAINED_ONLY,
            )  # fmt: skip
    notes: dict[str, Any] = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
    return notes


def _tensors(trainee: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {"model": get_model_state_dict(trainee, options=_TRAINED_ONLY)}
    model, moments = get_state_dict(trainee, optimizer, options=_TRAINED_ONLY)
    return {"model": model, "optimizer": moments}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hush torch, which warns of its own choices, and of a group of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
