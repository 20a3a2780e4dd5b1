"""What answers the requests of tasks: stock transformers through lm-eval's own model, or our layer loop.

The first is what lm-eval's command line uses. The second is for models that do not fit: all requests of a part go
through a layer before the next layer is read.

Dimensions: B batch, S sequence, D hidden, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.evaluation.tasks.kept import Encoded
from compress.loop.stream import TOKENS_PER_BATCH, LayerStream


class Stock:
    """A checkpoint that transformers has opened, asked by lm-eval's model for transformers.

    Args:
        folder: the checkpoint.
        device: "cpu" or "cuda:0".
        dtype: in what precision.
        trust_remote_code: as in transformers.
    """

    def __init__(self, folder: str, device: str, dtype: torch.dtype, trust_remote_code: bool) -> None:
        from lm_eval.models.huggingface import HFLM
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=trust_remote_code)
        model.to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        self.lm: Any = HFLM(pretrained=model, tokenizer=tokenizer)

    def answer(self, kind: str, requests: Sequence[Any], rows: int) -> list[Any]:
        """As in `Backend`."""
        self.lm.batch_size_per_gpu = rows
        if kind == "loglikelihood":
            _, context, continuation = requests[0]
            text = requests[0][0]
            assert not text[0] or self.lm._encode_pair(*text) == (context, continuation), "encoded as lm-eval does"
            answers: list[Any] = self.lm._loglikelihood_tokens(list(requests), disable_tqdm=True)
        else:
            answers = getattr(self.lm, kind)(list(requests), disable_tqdm=True)
        return answers


class Streamed:
    """A checkpoint that is never held, for log-likelihoods.

    Args:
        stream: it.
    """

    def __init__(self, stream: LayerStream) -> None:
        self.stream = stream

    @torch.no_grad()
    def answer(self, kind: str, requests: Sequence[Encoded], rows: int) -> list[Any]:
        """As in `Backend`; `rows` is ignored, since requests of one length go together without padding."""
        assert kind == "loglikelihood", "others are not asked"
        by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)  # continuations may differ in their last token
        for place, (_, context, continuation) in enumerate(requests):
            by_input[tuple((context + continuation)[:-1])].append(place)
        by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for tokens in sorted(by_input):
            by_length[len(tokens)].append(tokens)
        answers: list[Any] = [None] * len(requests)
        with self.stream.outer():
            for inputs, states in self._last_hidden(by_length):
                for tokens, state in zip(inputs, states, strict=True):
                    for place in by_input[tokens]:
                        answers[place] = self._score(requests[place], state[None].to(self.stream.device))
        return answers

    def _last_hidden(self, by_length: dict[int, list[tuple[int, ...]]]) -> list[tuple[list[tuple[int, ...]], Tensor]]:
        """What the last layer puts out for all inputs: [B, S, D] for those of one length."""
        stream, parts = self.stream, []
        for length, inputs in by_length.items():
            batch = max(1, TOKENS_PER_BATCH[stream.device.type] // length)
            for start in range(0, len(inputs), batch):
                part = inputs[start : start + batch]
                parts.append((part, stream.start(torch.tensor(part), batch)))
        for index in range(stream.depth):
            stream.fill_layer(index, stream.load_layer(index))
            for _, activations in parts:
                stream.run_layer(index, activations)
            stream.empty_layer(index)
        return [(part, activations.hidden[0]) for part, activations in parts]

    def _score(self, request: Encoded, hidden: Tensor) -> tuple[float, bool]:
        """The log-likelihood of a request's continuation behind `hidden` [1, S, D], summed as lm-eval does."""
        continuation = torch.tensor(request[2], device=hidden.device)
        logits = self.stream.logits(hidden[:, -len(continuation) :])[0]
        log_p = torch.log_softmax(logits, dim=-1)
        greedy = bool((log_p.argmax(dim=-1) == continuation).all())
        return float(log_p.gather(1, continuation[:, None])[:, 0].sum()), greedy
