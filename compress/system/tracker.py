"""The user's own tracker of runs: TensorBoard, trackio or Weights & Biases, where one is asked for and installed."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

import yaml

from compress.errors import UserError

EVENTS = "tensorboard"  # tensorboard's folder in a work folder
_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def tracker_problem(name: str | None) -> str | None:
    """Why a tracker can't be used, in one line; None when it can."""
    if name is None or importlib.util.find_spec(_PACKAGES[name]) is not None:
        return None
    return f"{name} is not installed; pip install {_PACKAGES[name]}, or remove tracker"


class Tracker(Protocol):
    """Where the numbers of one run go."""

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers at a step."""

    def rewind(self, step: int) -> None:
        """What comes behind a step comes again."""

    def close(self) -> None:
        """No more is logged."""


def open_tracker(kind: str, folder: Path, name: str, settings: dict[str, Any]) -> Tracker:
    """A run in a tracker.

    Args:
        kind: "tensorboard", "trackio" or "wandb".
        folder: of tensorboard's files, a folder for each run.
        name: of the run.
        settings: noted with it.

    Raises:
        UserError: it is not installed.
    """
    if (problem := tracker_problem(kind)) is not None:
        raise UserError(problem)
    if kind == "tensorboard":
        inside = [part for part in name.split("/") if part not in ("", ".", "..")]
        return _TensorBoard(folder.joinpath(*inside), settings)
    return _Run(kind, name, settings)


class _TensorBoard:
    """Files of events."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings = folder, settings
        self._writer: Any = None

    def _open(self, **settings: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), **settings)
        if self._settings:
            lines = yaml.safe_dump(self._settings, sort_keys=False).splitlines()
            self._writer.add_text("settings", "\n".join(f"    {line}" for line in lines))  # Markdown of a code block

    def add(self, step: int, numbers: dict[str, float]) -> None:
        if self._writer is None:
            self._open()
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """A new file, which hides the later points of those before it."""
        self.close()
        self._open(purge_step=step + 1)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class _Run:
    """A run of wandb or trackio, whose packages have the same functions; neither takes a point back."""

    def __init__(self, kind: str, name: str, settings: dict[str, Any]) -> None:
        self._module: Any = importlib.import_module(kind)
        self._module.init(project="dscompress", name=name, config=settings)
        self._drops = kind == "wandb"  # steps that go backwards, unless the step is a number like the others
        if self._drops:
            self._module.define_metric("*", step_metric="step")

    def add(self, step: int, numbers: dict[str, float]) -> None:
        if self._drops:
            self._module.log({"step": step, **numbers})
        else:
            self._module.log(numbers, step=step)

    def rewind(self, step: int) -> None:
        """Points that come again lie beside the first ones."""

    def close(self) -> None:
        self._module.finish()
