"""What happened at each step: JSON lines in a file, and the user's own tracker where one is asked for."""

import json
from pathlib import Path
from typing import Any

from compress.system.files import write_text, writing
from compress.system.tracker import open_tracker


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
        self._tracker = None if tracker is None else open_tracker(tracker, events, name, settings)

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
