"""What happened at each step: JSON lines in a file, and the user's own tracker where one is asked for."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from compress.errors import UserError

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
        self._file.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        if self._tracker is not None:
            self._tracker(step, numbers)


def _tracker(kind: str | None, folder: Path, name: str, settings: dict[str, Any]) -> Any:
    """A function that logs numbers at a step; None where nobody asked."""
    if (problem := tracker_problem(kind)) is not None:
        raise UserError(problem)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder / name))

        def add(step: int, numbers: dict[str, float]) -> None:
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return add
    if kind is None:
        return None
    module: Any = importlib.import_module(kind)
    module.init(project="dscompress", name=name, config=settings)
    return lambda step, numbers: module.log(numbers, step=step)
