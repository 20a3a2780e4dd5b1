"""Opens a GGUF file in llama.cpp and writes down what it says and how fast: a script for a process of its own.

    python llama_cpp_client.py REQUEST.json ANSWER.json LOGITS.npy

It is run by its path and imports nothing of dscompress: nothing but llama.cpp has a hand in what is loaded, and an
assertion in it ends this process alone. `compress/evaluation/llama_cpp.py` writes the request and reads the answer.

The request: `library` (the shared library), `file`, `threads`, `texts` (to be tokenized, special tokens and all),
`tokens` (ids), `new_tokens` (how many to continue them by, greedily), `timing` (null, or `prompt_tokens` and
`new_tokens`). The answer: `version`, `description` (of the model, in llama.cpp's words), `ids` (of each text),
`continuation`, `pace` (as `compress.served_records.ServedPace`, or null); or `failure`, llama.cpp's own last words. The
logits [S, V] of the tokens, float32, are in a file of their own.

Called through llama.cpp's C interface (include/llama.h), since the package's Python gives no logits of a prompt. The
structures of parameters grow from version to version: they are passed as they were given, in more room than they need,
and only what has been in front for years is changed: how many tokens fit, and how many are computed at once.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_uint32, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DEFAULTS = [512, 2048, 512]  # of tokens, of tokens in a call, of tokens computed at once
_MOST = 8192  # tokens of a prompt here


class _Parameters(ctypes.Structure):
    """Of a model or a context, by value: at most 1 KB."""

    _fields_ = [("words", c_uint32 * 256)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("count", c_int32),
        ("tokens", POINTER(c_int32)),
        ("embeddings", POINTER(c_float)),
        ("positions", POINTER(c_int32)),
        ("sequence_counts", POINTER(c_int32)),
        ("sequences", POINTER(POINTER(c_int32))),
        ("wanted", POINTER(c_int8)),
    ]


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, c_char_p, c_void_p)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_log_set": (None, [_LOG, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (_Parameters, []),
    "llama_context_default_params": (_Parameters, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, _Parameters]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_model_desc": (c_int32, [c_void_p, c_char_p, ctypes.c_size_t]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_init_from_model": (c_void_p, [c_void_p, _Parameters]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_batch_init": (_Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [_Batch]),
    "llama_decode": (c_int32, [c_void_p, _Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
}


class LlamaError(Exception):
    """What llama.cpp said last before it gave up."""


class Llama:
    """A model opened by llama.cpp.

    Args:
        library: the shared library.
        file: the GGUF file.
        threads: to compute with.
        positions: tokens of the longest sequence.
    """

    def __init__(self, library: str, file: str, threads: int, positions: int) -> None:
        self.lib = ctypes.CDLL(library)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.said: list[str] = []
        self._log = _LOG(lambda level, text, _: self._hear(level, text))
        self.lib.llama_log_set(self._log, None)
        self.model = self.lib.llama_model_load_from_file(file.encode(), self.lib.llama_model_default_params())
        if not self.model:
            raise LlamaError(self._reason())
        self.vocabulary = self.lib.llama_model_get_vocab(self.model)
        self.size = int(self.lib.llama_vocab_n_tokens(self.vocabulary))
        how = self.lib.llama_context_default_params()
        if list(how.words[:3]) != _DEFAULTS:
            raise LlamaError(
                f"its defaults {list(how.words[:3])} are not {_DEFAULTS}: a version that is not known here"
            )
        how.words[:3] = [positions, positions, min(positions, _DEFAULTS[2])]
        self.context = self.lib.llama_init_from_model(self.model, how)
        if not self.context:
            raise LlamaError(self._reason())
        self.lib.llama_set_n_threads(self.context, threads, threads)

    def _hear(self, level: int, text: bytes) -> None:
        words = text.decode(errors="replace").strip()
        if level in (3, 4) and words:  # warnings and errors
            self.said.append(words)

    def _reason(self) -> str:
        if not self.said:
            return "it gave no reason"
        return next((words for words in self.said if "error" in words), self.said[-1])

    @property
    def description(self) -> str:
        """The model in llama.cpp's words."""
        room = ctypes.create_string_buffer(256)
        self.lib.llama_model_desc(self.model, room, len(room))
        return room.value.decode(errors="replace")

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, with what is put before and behind it; special tokens in it are read as such."""
        raw = text.encode()
        room = (c_int32 * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), True, True)
        if count < 0:
            raise LlamaError(f"more than {len(room)} tokens for a text of {len(raw)} bytes")
        return list(room[:count])

    def forget(self) -> None:
        """Empty the cache."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def logits(self, tokens: Sequence[int], start: int = 0, every: bool = False) -> NDArray[np.float32]:
        """Logits [S, V] of all tokens, or [1, V] of the last, float32.

        Args:
            tokens: ids.
            start: position of the first.
            every: of all.
        """
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.count = len(tokens)
        for place, token in enumerate(tokens):
            batch.tokens[place], batch.positions[place] = token, start + place
            batch.sequence_counts[place], batch.sequences[place][0] = 1, 0
            batch.wanted[place] = every or place == len(tokens) - 1
        failed = self.lib.llama_decode(self.context, batch)
        self.lib.llama_batch_free(batch)
        if failed:
            raise LlamaError(f"it did not compute {len(tokens)} tokens: {self._reason()}")
        rows = len(tokens) if every else 1
        found = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows, self.size))
        return np.array(found, np.float32)


def answer(request: dict[str, Any], logits: Path) -> dict[str, Any]:
    """What llama.cpp says to a request."""
    tokens, new, timing = request["tokens"], request["new_tokens"], request["timing"]
    longest = max(len(tokens) + new, sum(timing.values()) + 1 if timing else 0, 32)
    llama = Llama(request["library"], request["file"], request["threads"], min(longest, _MOST))
    loaded = memory()[0]
    found: dict[str, Any] = {
        "description": llama.description,
        "size": llama.size,
        "ids": [llama.ids(text) for text in request["texts"]],
        "continuation": [],
        "pace": None,
    }
    if tokens:
        rows = llama.logits(tokens, every=True)
        np.save(logits, rows)
        last = rows[-1]
        for place in range(len(tokens), len(tokens) + new):
            found["continuation"].append(int(last.argmax()))
            last = llama.logits(found["continuation"][-1:], place)[0]
    if timing is not None:
        found["pace"] = {**pace(llama, request["threads"], **timing), "loaded_bytes": loaded}
    return found


def pace(llama: Llama, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Tokens per second, once to warm up, then measured; memory at most."""
    prompt = [(7 * place + 3) % llama.size for place in range(prompt_tokens)]
    for new in (1, new_tokens):
        llama.forget()
        before, start = waited(), time.perf_counter()
        llama.logits(prompt)
        between = time.perf_counter()
        for place in range(new):
            llama.logits(prompt[:1], prompt_tokens + place)
        end, after = time.perf_counter(), waited()
    return {
        "prefill_tokens_per_second": prompt_tokens / (between - start),
        "decode_tokens_per_second": new_tokens / (end - between),
        "peak_bytes": memory()[1],
        "waited": (after - before) / (end - start) / threads,
    }


def memory() -> tuple[int, int]:
    """Bytes resident in this process now and at most; the mapped file counts as far as it was read."""
    rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
    return int(rows["VmRSS"].split()[0]) * 1024, int(rows["VmHWM"].split()[0]) * 1024


def waited() -> float:
    """Seconds so far that this process's threads were ready to run while others had the cores (Linux)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(file.read_text(encoding="ascii").split()[1])
        except OSError:  # a thread that just ended
            continue
    return total / 1e9


def main() -> None:
    """Read the request, write the answer, whatever llama.cpp does."""
    asked, to, logits = map(Path, sys.argv[1:])
    try:
        found = answer(json.loads(asked.read_text(encoding="utf-8")), logits)
    except (LlamaError, OSError, AttributeError) as error:  # no such library, or a function that it lacks
        found = {"failure": " ".join(str(error).split())}
    whole = to.with_suffix(".tmp")
    whole.write_text(json.dumps(found), encoding="utf-8")
    whole.replace(to)
    sys.stdout.flush()
    os._exit(0)  # its threads need not say goodbye


if __name__ == "__main__":
    main()
