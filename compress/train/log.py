"""What happened at each step: JSON lines in a file, and the user's own tracker where one is asked for."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import UserError, reason
from compress.system.files import write_text, writing
from compress.system.progress import Reporter
from compress.system.tracker import Tracker, open_tracker


class Log:
    """Lines of one run.

    A tracker that fails is warned of once and gets no more; the file goes on, and so does the training.

    Args:
        file: where they go; what a run that was stopped has left there stays until `rewind` says where it goes on.
        tracker: "tensorboard", "trackio", "wandb" or None.
        events: folder of tensorboard's files.
        name: what the tracker calls the run.
        settings: what the tracker notes with it.
        reporter: told of a tracker that fails.

    Raises:
        UserError: the tracker is not installed.
    """

    def __init__(
        self, file: Path, tracker: str | None, events: Path, name: str, settings: dict[str, Any], reporter: Reporter
    ) -> None:
        self._file, self._kind, self._reporter = file, tracker, reporter
        self._tracker: Tracker | None = None
        if tracker is None:
            return
        try:
            self._tracker = open_tracker(tracker, events, name, settings)
        except UserError:
            raise
        except Exception as error:
            self._warn(error)

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
        self._tell(lambda tracker: tracker.rewind(step))

    def write(self, step: int, **values: Any) -> None:
        """Add a line."""
        with writing(self._file), self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
        self._tell(lambda tracker: tracker.add(step, numbers))

    def close(self) -> None:
        """Let the tracker write what it still has."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell the tracker, until it fails."""
        tracker = self._tracker
        if tracker is None:
            return
        try:
            what(tracker)
        except Exception as error:
            self._tracker = None
            self._warn(error)
            with suppress(Exception):  # what follows is a run of its own
                tracker.close()

    def _warn(self, error: Exception) -> None:
        said = f"{self._kind} failed ({reason(error)}) and gets no more of this training"
        self._reporter.warn(f"tracker: {said}; all its steps are in {self._file.name}")
