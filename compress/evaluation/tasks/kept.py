"""A language model for lm-eval whose answers are kept on disk as they come: what was answered is never asked again.

lm-eval words the prompts and scores the answers; another of its models, the backend, gives them. It is opened when the
first answer is missing. Where it takes one request at a time, an answer depends on its request alone, and is kept by
that; where it takes several, padded to one length, rounding may depend on the company, so requests always go together
in the same way, and what is kept belongs to all the requests of a task.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs

from compress.errors import NumericalError, UserError
from compress.system.fingerprint import fingerprint

Encoded = tuple[tuple[str, str], list[int], list[int]]  # context and continuation, as text and as tokens


class Backend(Protocol):
    """What answers: a model of lm-eval's, or one that is streamed."""

    def answer(self, kind: str, requests: Sequence[Any], rows: int) -> list[Any]:
        """Answers in the order of the requests, `rows` at a time.

        Args:
            kind: "loglikelihood", whose requests are encoded; "loglikelihood_rolling" or "generate_until".
            requests: `Encoded`, or lm-eval's instances.
            rows: how many go through the model together.
        """


class Kept:
    """Answers in a file of JSON lines, one for each batch; a last line that was cut off counts as never written.

    Args:
        file: where; its folder exists.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.answers: dict[str, Any] = {}
        whole = 0
        for line in file.read_bytes().splitlines(keepends=True) if file.is_file() else ():
            if not line.endswith(b"\n"):
                break
            self.answers |= json.loads(line)
            whole += len(line)
        if file.is_file() and whole < file.stat().st_size:
            os.truncate(file, whole)

    def add(self, answers: dict[str, Any]) -> None:
        """Keep answers by their keys; they are on disk when this returns."""
        self.answers |= answers
        with self.file.open("ab") as opened:
            opened.write(json.dumps(answers).encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())


class KeptLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """The model that lm-eval is given.

    Args:
        tokenizer: of the checkpoint.
        positions: tokens that the model takes at most.
        open_backend: opens what answers.
        folder: where answers are kept.
        identity: what they hang on beside the request: model, precision, device, versions.
        rows: of requests that long, how many go through the model together.
        at_once: tokens after which answers are written down.
        progress: told a title, how many requests there are and how many are done.
    """

    def __init__(
        self,
        tokenizer: Any,
        positions: int,
        open_backend: Callable[[], Backend],
        folder: Path,
        identity: Sequence[Any],
        rows: Callable[[int], int],
        at_once: int,
        progress: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self.tokenizer, self.positions, self.folder, self.identity = tokenizer, positions, folder, identity
        self.rows, self.at_once, self.progress = rows, at_once, progress
        self.used_rows = 1
        self._open = open_backend
        self._backend: Backend | None = None

    @property
    def eot_token_id(self) -> int:
        """As in lm-eval's own model for transformers."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the token that the tokenizer begins with, or else ends with."""
        first = self.tokenizer.bos_token_id
        return int(self.eot_token_id if first is None else first)

    @property
    def tokenizer_name(self) -> str:
        """As in lm-eval's own model for transformers."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, as lm-eval's own model for transformers has them: no second BOS before one in the text."""
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            special["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **special))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template words it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )  # fmt: skip

    def _loglikelihood_tokens(self, requests: list[Encoded], **_: Any) -> list[Encoded]:
        """What lm-eval's own encoding ends with: here the requests as they are, to be answered all at once."""
        return requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation behind its context, nats, and whether greedy decoding writes it.

        Raises:
            UserError: a request that is longer than the model has positions.
            NumericalError: a log-likelihood that is no number.
        """
        encoded: list[Encoded] = super().loglikelihood(requests, disable_tqdm=True)
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in encoded]
        self._check_lengths(requests, lengths)
        found = self._answers("loglikelihood", requests, encoded, lengths)
        for request, (value, _) in zip(requests, found, strict=True):
            if not math.isfinite(value):
                raise NumericalError(
                    f"{request.task_name}: the model's log-likelihood of an item is {value}; its weights are damaged, "
                    "or its numbers overflow this dtype"
                )
        return [(float(value), bool(greedy)) for value, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, nats."""
        lengths = [len(self.tok_encode(request.args[0])) for request in requests]
        return [float(value) for value in self._answers("loglikelihood_rolling", requests, requests, lengths)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, as its generation arguments say.

        Raises:
            UserError: a context that leaves no room for the answer.
        """
        lengths = [
            len(self.tok_encode(request.args[0])) + int(normalize_gen_kwargs(request.args[1])["max_gen_toks"])
            for request in requests
        ]
        self._check_lengths(requests, lengths)
        return [str(text) for text in self._answers("generate_until", requests, requests, lengths)]

    def _check_lengths(self, requests: Sequence[Instance], lengths: Sequence[int]) -> None:
        """lm-eval would cut the beginning off, and score another item than the task's."""
        for request, length in zip(requests, lengths, strict=True):
            if length > self.positions:
                raise UserError(
                    f"tasks: {request.task_name}: item {request.doc_id} takes {length:,} tokens and the model "
                    f"has {self.positions:,} positions; use fewer examples (fewshot) or leave the task out"
                )

    def _answers(
        self, kind: str, instances: Sequence[Instance], requests: Sequence[Any], lengths: Sequence[int]
    ) -> list[Any]:
        """Answers in the order of the requests: those that are there, and the others asked for, task by task."""
        keys = [hash_args(kind, instance.args) for instance in instances]
        by_task = sorted(range(len(keys)), key=lambda place: str(instances[place].task_name))
        tasks = [list(places) for _, places in groupby(by_task, key=lambda place: instances[place].task_name)]
        found: dict[int, Any] = {}
        done = 0
        self.progress(len(keys), done)
        for places in tasks:
            rows = self.rows(max(lengths[place] for place in places))
            self.used_rows = max(self.used_rows, rows)
            company = sorted(keys[place] for place in places) if rows > 1 else None
            kept = Kept(self.folder / f"{fingerprint('answers', *self.identity, kind, rows, company)}.jsonl")
            for chunk in self._chunks(kind, places, requests, lengths, rows):
                if any(keys[place] not in kept.answers for place in chunk):
                    asked = chunk if rows > 1 else [place for place in chunk if keys[place] not in kept.answers]
                    answers = self._ask(kind, [requests[place] for place in asked], rows)
                    kept.add({keys[place]: answer for place, answer in zip(asked, answers, strict=True)})
                done += len(chunk)
                self.progress(len(keys), done)
            found |= {place: kept.answers[keys[place]] for place in places}
        return [found[place] for place in range(len(keys))]

    def _chunks(
        self, kind: str, places: list[int], requests: Sequence[Any], lengths: Sequence[int], rows: int
    ) -> Iterator[list[int]]:
        """The requests of a task in the backend's order, longest first, in parts that are written down together."""

        def order(place: int) -> tuple[Any, ...]:
            if kind == "loglikelihood":
                _, context, continuation = requests[place]
                return (-lengths[place], tuple(context + continuation))
            return (json.dumps(requests[place].args[1:], sort_keys=True, default=str), -lengths[place], place)

        chunk: list[int] = []
        for place in sorted(places, key=order):
            chunk.append(place)
            if len(chunk) % rows == 0 and sum(lengths[each] for each in chunk) >= self.at_once:
                yield chunk
                chunk = []
        if chunk:
            yield chunk

    def _ask(self, kind: str, requests: Sequence[Any], rows: int) -> list[Any]:
        if self._backend is None:
            self._backend = self._open()
        return self._backend.answer(kind, requests, rows)
