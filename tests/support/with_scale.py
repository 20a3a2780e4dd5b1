"""`dscompress` with one stage kind more, which takes one row: a process that forks for each command.

Recipes know the kinds that there are when they are imported; here all is imported once, so that a command starts in a
moment. Beside `python with_scale.py FOLDER`, which holds what commands print, there is `Commands` to give them.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).parent


class Commands:
    """Runs commands, each in a process of its own; one at a time.

    Args:
        folder: for what they print.
    """

    def __init__(self, folder: Path) -> None:
        self.printed = folder
        path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        command: list[Any] = [sys.executable, __file__, folder]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
        )

    def begin(self, folder: Path, *arguments: str) -> int:
        """Begin a command in a folder; returns its process."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(folder), arguments]) + "\n")
        self.server.stdin.flush()
        return self._answer()

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for the end of the command that was begun."""
        code = self._answer()
        printed = [(self.printed / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess("dscompress", code, *printed)

    def __call__(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.begin(folder, *arguments)
        return self.end()

    def close(self) -> None:
        self.server.communicate()

    def _answer(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


def main(printed: Path) -> None:
    """Commands as lines of JSON on standard input; the number of each one's process, and its exit code, come back."""
    from compress.stages import KINDS, Kind

    KINDS["scale"] = Kind("scale_stage.plan:ScaleStage", "scale_stage")
    import accelerate  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from stock_here import asked_here

    import compress.report.plots
    import compress.runs.runner
    import compress.stages.quantize.run  # noqa: F401
    from compress import cli
    from compress.evaluation import base, verify

    base.asked = verify.asked = asked_here  # the stock loader in the command's process: it starts at once
    gc.freeze()
    for line in sys.stdin:
        folder, arguments = json.loads(line)
        process = os.fork()
        if not process:
            os.chdir(folder)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(printed / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["dscompress", *arguments]
            sys.exit(cli.main())
        print(process, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
