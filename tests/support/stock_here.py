"""What asks stock transformers, in this process and not in one of its own, which takes seconds to start."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import torch
from random_models import load_stock

from compress.evaluate.stock import Answer, Request, _continue


def ask_here(request: Request) -> Answer:
    """`compress.evaluate.stock.ask` for logits and continuations on a CPU."""
    from transformers import AutoTokenizer

    logits = None
    try:
        with redirect_stderr(io.StringIO()), torch.no_grad():
            model = load_stock(Path(request.model), getattr(torch, request.dtype))
            if request.tokens:
                logits = model(torch.tensor([request.tokens]), use_cache=False).logits[0].float()
            tokenizer = AutoTokenizer.from_pretrained(request.model) if request.prompts else None
            return Answer(logits, [_continue(model, tokenizer, prompt) for prompt in request.prompts])
    except Exception as error:  # whatever it is, the process would have ended with its last line
        return Answer(logits, [], f"{type(error).__name__}: {error}".splitlines()[0])
