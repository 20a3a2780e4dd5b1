"""python -m compress.model.trial TOKENIZER_JSON: tokenize a bit of text, in a process that may be lost.

A tokenizer.json is a program: its patterns can backtrack for ever, its normalizers can multiply text, and the library
then stops the process it is in. What goes wrong here is said in one line there.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from compress.errors import ModelError
from compress.system.fingerprint import sha256
from compress.system.limits import limit_process

_SECONDS, _MEMORY = 5, 4 << 30
_TEXT = """Every morning in 1923, at 9:40, she'd read 4,200 lines aloud; "who will listen?" they asked (twice).
def area(radius): return 3.14159 * radius ** 2  # https://example.org/a_b?c=d
Les forêts brûlent, die Bäume schweigen. Привет, мир! 你好，世界。こんにちは
안녕하세요 مرحبا नमस्ते 👩‍👩‍👧 ½ ﬁ ﷺ\n\n\t\x07"""
_RUN = 200  # of one character: what backtracks doubles its time with each more
_tried: set[str] = set()


class Trial:
    """A trial of a tokenizer.json, under way beside this process. Nothing happens for a file that passed before."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._digest = sha256(file)
        self._process: subprocess.Popen[bytes] | None = None
        if self._digest not in _tried:
            alone = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "compress.model.trial", str(file)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env={**os.environ, **alone},
            )  # fmt: skip

    def wait(self) -> None:
        """Wait for the end of the trial.

        Raises:
            ModelError: the tokenizer can't be used.
        """
        if self._process is None:
            return
        code = self._process.wait()
        if code:
            late = code in (-signal.SIGXCPU, -signal.SIGKILL)
            what = f"takes more than {_SECONDS} seconds" if late else "breaks the tokenizers library"
            raise ModelError(
                f"{self.file}: {what} on a bit of text, for a pattern or a normalizer in it; download it again"
            )
        _tried.add(self._digest)


def _try(file: Path) -> None:
    limit_process(120, _MEMORY + 60 * file.stat().st_size)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # all that the library raises; it is said in the other process, which loads the file too
        return
    limit_process(_SECONDS, _MEMORY + 60 * file.stat().st_size)
    for text in (_TEXT, *(character * _RUN + "~!" for character in sorted({*map(chr, range(32, 127)), *_TEXT}))):
        tokenizer.encode(text)


if __name__ == "__main__":
    _try(Path(sys.argv[1]))
