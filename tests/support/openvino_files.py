"""A stand-in for the environment that makes folders for OpenVINO."""

import stat
import sys
from pathlib import Path

from compress.system.programs import Engine

_SCRIPT = """#!/bin/sh
if [ "$2" = --version ]; then echo 2026.4.1; exit; fi
{more}
exec {python} -S -c '
import json, shutil, sys
from pathlib import Path
request = json.loads(Path(sys.argv[1]).read_text())
made = Path(request["output"])
made.mkdir()
shutil.copytree(request["checkpoint"], made / "read")
shutil.copy(sys.argv[1], made / "request")
(made / "openvino_model.bin").write_text("12345")
(made / "openvino_detokenizer.xml").touch()
' "$2"
"""


def environment(python: Path, more: str = "") -> Engine:
    """An environment that copies what would be traced (`read`) and what it was asked for (`request`).

    Args:
        python: the interpreter to write.
        more: shell commands that it runs first.
    """
    python.write_text(_SCRIPT.format(python=sys.executable, more=more))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return Engine(python, "2026.4.1")
