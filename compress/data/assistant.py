"""Which characters of a conversation, as its chat template writes it, are the assistant's.

A template that marks them ({% generation %}) is believed. With any other, the conversation is rendered up to each of
the assistant's messages, as a model is asked, and once more with the message: the difference is what the model is to
say, the token that ends its turn included. A template is a program, and nothing says that it writes the start of a
conversation as it writes the start of a longer one, so both are checked to begin the whole.

Left out: templates for which that does not hold, such as those that drop the reasoning of earlier turns. What stands
where could only be guessed then, and a wrong guess would train the model to write its user's words.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from compress.data.guard import MEMORY, SECONDS, render
from compress.errors import CalibrationError
from compress.system.limits import LimitError, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans: TypeAlias = tuple[tuple[int, int], ...]
REMEDY = "use assistant_only: false"
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_spans(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], text: str) -> Spans:
    """Start and end of each part that the assistant says, in characters of a rendered conversation.

    Args:
        tokenizer: with a chat template.
        messages: each with role and content.
        text: what the template makes of them.

    Raises:
        CalibrationError: the template writes the conversation in such a way that it can't be known.
        Exception: whatever the template itself raises.
    """
    template = str(tokenizer.get_chat_template())
    if _MARKED.search(template):
        return _marked(tokenizer, messages, text, template)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not number:
            raise ValueError("the assistant speaks first, which no prompt asks for")
        asked, said = list(messages[:number]), list(messages[: number + 1])
        prompt = render(tokenizer, asked, add_generation_prompt=True)
        start = len(prompt) if text.startswith(prompt) else _shorter_prompt(tokenizer, asked, prompt, text)
        answered = text if len(said) == len(messages) else render(tokenizer, said)
        if start is None or not text.startswith(answered) or start > len(answered):
            raise CalibrationError(
                f"the chat template of {_name(tokenizer)} does not write the start of a conversation as it writes the "
                f"whole (message {number + 1}), so what the assistant says can't be told from the rest; {REMEDY}"
            )
        spans.append((start, _turn_end(tokenizer, text, start, len(answered))))
    return tuple(spans)


def holds_any(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> NDArray[np.bool_]:
    """Whether each token [N] holds a character of the spans, from where the tokens start and end in the text."""
    first, last = np.asarray(offsets).T
    found = np.zeros(len(first), np.bool_)
    for start, end in spans:
        found |= (last > start) & (first < end)
    return found


def _marked(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[dict[str, Any]], text: str, template: str
) -> Spans:
    """The parts that the template marks, each with the end-of-sequence token right behind it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    known: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        with limited(SECONDS, MEMORY):
            made: Any = render_jinja_template(
                [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **known
            )
    except LimitError as error:
        raise CalibrationError(f"the chat template {error}; {REMEDY}") from error
    last = str(tokenizer.eos_token or "")
    return tuple((start, end + len(last) * text.startswith(last, end)) for start, end in made[1][0])


def _shorter_prompt(
    tokenizer: "PreTrainedTokenizerBase", asked: list[dict[str, Any]], prompt: str, text: str
) -> int | None:
    """Where the assistant's words start if its prompt ends with tokens that the text lacks, such as <think>; or None.

    What is cut off starts with a token of its own: a template that writes roles otherwise is not taken for one that
    only opens the reasoning.
    """
    before = render(tokenizer, asked)
    if not (text.startswith(before) and prompt.startswith(before)):
        return None
    whole = "|".join(re.escape(token) for token in sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
    pieces = [piece for piece in re.split(f"({whole})", prompt[len(before) :]) if piece] if whole else []
    start = len(before)
    for piece in pieces:
        if not text.startswith(piece, start):
            return start if start > len(before) and re.fullmatch(whole, piece) else None
        start += len(piece)
    return None


def _turn_end(tokenizer: "PreTrainedTokenizerBase", text: str, start: int, end: int) -> int:
    """The end of a turn without the blanks behind its last token, which a model is never asked for."""
    said = text[start:end].rstrip()
    closed = said.endswith(tuple(token for token in tokenizer.get_added_vocab() if not token.isspace()))
    return start + len(said) if closed else end


def _name(tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
