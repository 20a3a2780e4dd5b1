"""A model folder's tokenizer, or one line that says why there is none."""

from pathlib import Path
from typing import TYPE_CHECKING

from compress.errors import ModelError
from compress.model.arch import OWN_CODE
from compress.model.trial import Trial

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder.

    Raises:
        ModelError: there is none, or it can't be used.
    """
    if not any((folder / name).is_file() for name in _FILES):
        raise ModelError(f"{folder}: no tokenizer; add the model's tokenizer.json and tokenizer_config.json")
    file = folder / _FILES[0]
    trial = Trial(file) if file.is_file() else None
    from transformers import AutoTokenizer  # takes longer than the trial

    if trial is not None:
        trial.wait()
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer.model_max_length, int | float):
            what = f"model_max_length: {tokenizer.model_max_length!r:.60} is not a number"
            raise ModelError(
                f"{folder / 'tokenizer_config.json'}: {what}; write the most tokens of a text, or remove it"
            )
        tokenizer("A bit of text.")
    except ModelError:
        raise
    except Exception as error:  # what the tokenizers library raises for a damaged file is Exception itself
        if "trust_remote_code" in str(error):
            raise ModelError(f"{folder}: its tokenizer {OWN_CODE}") from error
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({reason}); download its files again") from error
    return tokenizer
