"""What asks stock transformers, in this process and not in one of its own, which takes seconds to start."""

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr
from pathlib import Path

import torch

from compress.evaluation.stock import Answer, Request, _continue


def answering(ask: Callable[[Request], Answer]) -> Callable[[Request], AbstractContextManager[Callable[[], Answer]]]:
    """`compress.evaluation.stock.asked`, with answers from a function."""

    @contextmanager
    def asked(request: Request) -> Iterator[Callable[[], Answer]]:
        answer = ask(request)
        yield lambda: answer

    return asked


def ask_here(request: Request) -> Answer:
    """`compress.evaluation.stock.ask` for logits and continuations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logits = None
    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():
            own_code = {"trust_remote_code": True} if request.trust_remote_code else {}
            dtype = getattr(torch, request.dtype)
            model = AutoModelForCausalLM.from_pretrained(request.model, dtype=dtype, **own_code)
            model.to(request.device).eval()
            model.config.return_dict = True
            if request.tokens:
                tokens = torch.tensor([request.tokens], device=request.device)
                logits = model(tokens, use_cache=False).logits[0].float().cpu()
            tokenizer = AutoTokenizer.from_pretrained(request.model, **own_code) if request.prompts else None
            return Answer(logits, [_continue(model, tokenizer, prompt) for prompt in request.prompts])
    except Exception as error:  # whatever it is, the process would have ended with its last line
        return Answer(logits, [], f"{type(error).__name__}: {error}".splitlines()[0])


asked_here = answering(ask_here)

_WITHIN = """\
import os, sys

if {where}:
    from stock_here import asked_here

    from compress.evaluation import stock

    stock.asked = asked_here
"""


def asking_within(where: str, folder: Path) -> dict[str, str]:
    """Environment for processes of a command, some of which ask without another one.

    Args:
        where: a condition of Python, in which `os` and `sys` are there, that holds in them.
        folder: for what makes it so.
    """
    (folder / "sitecustomize.py").write_text(_WITHIN.format(where=where))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}
