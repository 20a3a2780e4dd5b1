"""The state of training on disk: masters, the optimizer's moments and where training stood, by torch's own format.

A state appears under its name when it is whole, loses the name before any of it is deleted, and can be taken up by
another number of processes. Beside states lie weights alone, in the dtypes in which a checkpoint has them: those that
measured best, and at the end the last.

Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from compress.errors import UserError
from compress.system import distributed
from compress.system.files import unwritable, write_text

_NOTES = "notes.json"
_PARTIAL, _GONE = ".part", ".gone"  # behind the names of what is being written, and deleted
_TRAINED_ONLY = StateDictOptions(ignore_frozen_params=True, strict=False)


def of_step(folder: Path, step: int) -> Path:
    """Where the state behind a step lies."""
    return folder / f"state-{step:08d}"


def best_of_step(folder: Path, step: int) -> Path:
    """Where the weights behind a step lie that measured best when they were written."""
    return folder / f"best-{step:08d}"


def newest(folder: Path, every: int = 1) -> Path | None:
    """The state of the highest step that is a multiple of `every`."""
    found = folder.glob("state-" + "[0-9]" * 8)
    return max((each for each in found if int(each.name.rpartition("-")[2]) % every == 0), default=None)


def keep(folder: Path, kept: set[Path]) -> None:
    """Delete all other states, and then all other weights, which states hang on."""
    for each in [*folder.glob("state-*"), *folder.glob("best-*")]:
        if each in kept:
            continue
        gone = each
        if each.suffix not in (_PARTIAL, _GONE):
            gone = each.with_name(each.name + _GONE)
            shutil.rmtree(gone, ignore_errors=True)
            with suppress(OSError):
                each.rename(gone)  # half a state under its name would be taken up
        shutil.rmtree(gone, ignore_errors=True)


def save(folder: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer, notes: dict[str, Any]) -> None:
    """Write a state. Called in all processes.

    Raises:
        OutputError: it can't be written.
    """
    _save(folder, _tensors(trainee, optimizer), notes)


def save_weights(folder: Path, trainee: nn.Module, dtypes: Mapping[str, torch.dtype], notes: dict[str, Any]) -> None:
    """Write the weights alone, in these dtypes; those that have none here, as they are. Called in all processes.

    Raises:
        OutputError: they can't be written.
    """
    model = _tensors(trainee, None)["model"]
    _save(folder, {"model": {name: each.to(dtypes.get(name, each.dtype)) for name, each in model.items()}}, notes)


def _save(folder: Path, tensors: dict[str, Any], notes: dict[str, Any]) -> None:
    partial = folder.with_name(folder.name + _PARTIAL)
    with _writing(folder), _quiet():
        distributed.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        state_dict_saver.save(tensors, checkpoint_id=partial)
        distributed.first(lambda: _commit(partial, folder, notes))


def _commit(partial: Path, folder: Path, notes: dict[str, Any]) -> None:
    write_text(partial / _NOTES, json.dumps(notes))
    shutil.rmtree(folder, ignore_errors=True)  # only weights come twice, before the state that hangs on them
    partial.rename(folder)


def read_notes(folder: Path) -> dict[str, Any]:
    """What stands beside a state or weights."""
    notes: dict[str, Any] = json.loads((folder / _NOTES).read_text(encoding="utf-8"))
    return notes


def rewrite_notes(folder: Path, notes: dict[str, Any]) -> None:
    """Give a state other notes, at once. Called in one process.

    Raises:
        OutputError: they can't be written.
    """
    with _writing(folder):
        write_text(folder / _NOTES, json.dumps(notes))


def load(folder: Path, trainee: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Take up a state, or weights alone where training has ended or there is no optimizer; returns its notes.

    Called in all processes.

    Raises:
        UserError: it is damaged.
    """
    with _reading(folder, optimizer is None), _quiet():
        notes = read_notes(folder)
        if notes.get("ended"):
            optimizer = None
        state = _tensors(trainee, optimizer)
        state_dict_loader.load(state, checkpoint_id=folder)
        if optimizer is None:
            set_model_state_dict(trainee, state["model"], options=_TRAINED_ONLY)
        else:
            set_state_dict(
                trainee, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                options=_TRAINED_ONLY,
            )  # fmt: skip
    return notes


@torch.no_grad()
def complete(optimizer: torch.optim.Optimizer) -> None:
    """Give parameters that have neither a gradient nor moments the moments with which their first step begins.

    An optimizer makes moments when a gradient comes, and a state with some missing can't be taken up. They are made by
    a step of rate 0 with gradients of 0, which changes no weight and is not counted.
    """
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    bare = [parameter for parameter in own if parameter.grad is None and parameter not in optimizer.state]
    if not bare:
        return
    gradients = [parameter.grad for parameter in own]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in own:
        parameter.grad = None
    for parameter in bare:
        parameter.grad = torch.zeros_like(parameter)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
    optimizer.step()
    for parameter in bare:
        optimizer.state[parameter]["step"].zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter, gradient in zip(own, gradients, strict=True):
        parameter.grad = gradient


def _tensors(trainee: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {"model": get_model_state_dict(trainee, options=_TRAINED_ONLY)}
    model, moments = get_state_dict(trainee, optimizer, options=_TRAINED_ONLY)
    return {"model": model, "optimizer": moments}


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the disk says, and what torch makes of it, into one line.

    Raises:
        OutputError: no space, or no right to write there.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(folder, error) from error
    except CheckpointException as error:
        inner = _met(error)
        if isinstance(inner, OSError):
            raise unwritable(folder, inner) from error
        if isinstance(inner, RuntimeError) and not isinstance(inner, torch.OutOfMemoryError):  # torch's own writer
            raise unwritable(folder, OSError(_line(inner))) from error
        raise inner from error


@contextmanager
def _reading(folder: Path, weights: bool) -> Iterator[None]:
    """Turn whatever is wrong with a state, or with weights alone, into one line.

    Raises:
        UserError: naming the folder to remove.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise _damaged(folder, weights, error) from error
    except CheckpointException as error:
        inner = _met(error)
        if isinstance(inner, Exception) and not isinstance(inner, torch.OutOfMemoryError | MemoryError):
            raise _damaged(folder, weights, inner) from error
        raise inner from error


def _damaged(folder: Path, weights: bool, error: BaseException) -> UserError:
    said = f"{folder}: this state of training is damaged ({_line(error)}); remove "
    if weights:  # the state beside it hangs on it
        return UserError(f"{said}{folder.parent} and run the same command again to train anew")
    return UserError(f"{said}it and run the same command again to continue from an earlier one or from the start")


def _met(error: CheckpointException) -> BaseException:
    """What the first of the processes that failed met, which torch wraps in what is no Exception."""
    return error.failures[min(error.failures)][0]


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Hush torch, which warns of its own choices, and of a group of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
