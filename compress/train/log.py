"""What happened at each step: JSON lines in a file, and the user's own tracker where one is asked for."""

import importlib.util
import json
from pathlib import Path
from typing import Any, Protocol

from compress.errors import UserError
from compress.system.files import write_text, writing

_PACKAGES = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}


def tracker_problem(name: str | None) -> str | None:
    """Why a tracker can't be used, in one line; None when it can."""
    if name is None or importlib.util.find_spec(_PACKAGES[name]) is not None:
        return None
    return f"{name} is not installed; pip install {_PACKAGES[name]}, or remove tracker"


class Log:
    """Lines of one run.

    Args:
        file: where they go; what a run that was stopped has left there stays until `rewind` says where it goes on.
        tracker: "tensorboard", "trackio", "wandb" or None.
        events: folder of tensorboard's files.
        name: what the tracker calls the run.
        settings: what the tracker notes with it.
    """

    def __init__(self, file: Path, tracker: str | None, events: Path, name: str, settings: dict[str, Any]) -> None:
        self._file = file
        self._tracker = _tracker(tracker, events, name, settings)

    def rewind(self, step: int) -> None:
        """Drop the lines behind a step; -1 drops all."""
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.is_file() else []
        kept = []
        for line in lines:
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):  # the last line of a run that was killed
                continue
        with writing(self._file):
            write_text(self._file, "".join(f"{line}\n" for line in kept))
        if self._tracker is not None:
            self._tracker.rewind(step)

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self._tracker is not None:
            self._tracker.add(step, numbers)

    def close(self) -> None:
        """Let the tracker write what it still has."""
        if self._tracker is not None:
            self._tracker.close()


class _Tracker(Protocol):
    """Where numbers go beside the file."""

    def add(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers at a step."""

    def rewind(self, step: int) -> None:
        """What comes behind a step comes again."""

    def close(self) -> None:
        """No more is logged."""


class _TensorBoard:
    """Files of events."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None

    def _open(self, **settings: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), **settings)

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


def _tracker(kind: str | None, folder: Path, name: str, settings: dict[str, Any]) -> _Tracker | None:
    """The user's own; None where nobody asked."""
    if (problem := tracker_problem(kind)) is not None:
        raise UserError(problem)
    if kind is None:
        return None
    return _TensorBoard(folder / name) if kind == "tensorboard" else _Run(kind, name, settings)
