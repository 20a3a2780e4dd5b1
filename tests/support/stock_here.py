"""What asks stock transformers, in this process and not in one of its own, which takes seconds to start."""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr

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
