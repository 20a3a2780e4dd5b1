"""Chat templates are programs that come with a model: they are run with a limit of time, memory and length."""

from typing import TYPE_CHECKING, Any

from compress.errors import CalibrationError
from compress.system.limits import LimitError, limited

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS, MEMORY = 10, 2 << 30
_FACTOR, _FREE = 10, 200_000  # a text may be so many times as long as what it is made of, and so much longer


def render(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> str:
    """A conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: with a chat template.
        messages: each with role and content.
        options: of `apply_chat_template`.

    Raises:
        CalibrationError: the template does not end, or multiplies what it is given.
        Exception: whatever the template itself raises.
    """
    try:
        with limited(SECONDS, MEMORY):
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except LimitError as error:
        raise CalibrationError(f"the chat template {error} for {_size(messages):,} characters; {_REMEDY}") from error
    if len(text) > _FREE + _FACTOR * _size(messages):
        raise CalibrationError(f"the chat template makes {len(text):,} characters of {_size(messages):,}; {_REMEDY}")
    return text


_REMEDY = "get the model's own tokenizer_config.json and chat_template.jinja again"


def _size(messages: list[dict[str, Any]]) -> int:
    return len(str(messages))
