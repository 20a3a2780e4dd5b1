"""From a spec to tokens: sequences to calibrate on, windows to evaluate on.

The two differ on purpose. Calibration wants a fair draw: documents in an order drawn from the seed, each tokenized by
itself. Evaluation wants the protocol of published perplexities: one text, from its start, tokenized as one string. In
both, every sequence starts with what the tokenizer puts in front of a text (`llama-perplexity` does the same with BOS).
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data.documents import COLUMNS, Document, Record, Renderer, select, shuffle
from compress.data.packing import collect_tokens, cut_sequences, text_prefix
from compress.data.sources import is_plain_text, read_rows
from compress.errors import CalibrationError
from compress.recipe.load import load_evaluation_spec
from compress.recipe.text import CalibrationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHARACTERS_PER_TOKEN = 32  # many times any tokenizer's mean: how much text is read for a given number of windows


@dataclass(frozen=True)
class TokenSet:
    """Full sequences of tokens, and what a report says of them.

    Args:
        tokens: int64 [sequences, sequence_length].
        name: what reports call the text.
        source: hub dataset or file that it came from.
        licence: the text's licence, where the spec states it.
        warnings: what the user should hear, a line each.
        prefix: the tokens, by name, that every sequence starts with because the tokenizer starts every text with them.
        sha256: digest of the tokens and their shape, computed here: the calibration part of a stage's fingerprint.
    """

    tokens: Tensor
    name: str
    source: str
    licence: str | None
    warnings: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256(f"{self.sequences}x{self.sequence_length}:".encode())
        digest.update(self.tokens.numpy().astype("<i8").tobytes())
        object.__setattr__(self, "sha256", digest.hexdigest())

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def sequence_length(self) -> int:
        """Tokens per sequence."""
        return self.tokens.shape[1]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return self.tokens.numel()


def load_calibration(spec: CalibrationSpec, tokenizer: "PreTrainedTokenizerBase") -> TokenSet:
    """Up to `spec.samples` sequences of `spec.length` tokens; the same spec and tokenizer give the same.

    Fewer tokens than asked is a warning, and what there is is used.

    Raises:
        CalibrationError: the source can't be read, or holds fewer tokens than one sequence.
    """
    renderer = Renderer(tokenizer)
    documents = renderer.render(shuffle(_records(spec, shuffle_shards=True), spec.seed))
    tokens = collect_tokens(documents, tokenizer, spec.samples * spec.length)
    return _token_set(spec, tokens, tokenizer, spec.length, spec.samples, renderer.warnings)


def load_windows(
    text: str, tokenizer: "PreTrainedTokenizerBase", *, sequence_length: int, windows: int | None
) -> TokenSet:
    """Consecutive windows from the start of a text, which is tokenized as one string.

    Args:
        text: name of a bundled spec (`wikitext2`), path to a spec, or path to a text or jsonl file; the documents of
            the latter are joined by blank lines. Relative paths start at the current folder.
        tokenizer: the base model's.
        sequence_length: tokens per window.
        windows: how many; None takes all that the text fills. Fewer than asked is a warning.

    Raises:
        CalibrationError: the text can't be read, or is shorter than one window.
        RecipeError: there is no such spec, or it has mistakes.
    """
    spec = load_evaluation_spec(text)
    renderer = Renderer(tokenizer)
    limit = None if windows is None else windows * sequence_length * CHARACTERS_PER_TOKEN
    documents = _take(renderer.render(_records(spec, shuffle_shards=False)), limit)
    tokens = torch.empty(0, dtype=torch.int64)
    if documents:
        joined = ("" if is_plain_text(spec.source) else "\n\n").join(document.text for document in documents)
        encoded = tokenizer(joined, add_special_tokens=documents[0].add_special_tokens, verbose=False)
        tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    return _token_set(spec, tokens, tokenizer, sequence_length, windows, renderer.warnings)


def _records(spec: CalibrationSpec, *, shuffle_shards: bool) -> Iterator[Record]:
    fields = COLUMNS if spec.field is None else (spec.field,)
    return select(read_rows(spec, fields, shuffle_shards=shuffle_shards), spec.field)


def _take(documents: Iterable[Document], characters: int | None) -> list[Document]:
    """The first documents, until they have so many characters; None takes all."""
    taken, size = [], 0
    for document in documents:
        taken.append(document)
        size += len(document.text)
        if characters is not None and size >= characters:
            break
    return taken


def _token_set(
    spec: CalibrationSpec,
    tokens_N: Tensor,
    tokenizer: "PreTrainedTokenizerBase",
    sequence_length: int,
    wanted: int | None,
    warnings: tuple[str, ...],
) -> TokenSet:
    count, name, prefix = len(tokens_N), spec.name or Path(spec.source).name, text_prefix(tokenizer)
    names = tuple(tokenizer.convert_ids_to_tokens(prefix))
    if sequence_length <= len(prefix):
        raise CalibrationError(
            f"sequence_length: {sequence_length} has no room for text behind the {' '.join(names)} that the tokenizer "
            f"puts in front of it; use {len(prefix) + 1} or more"
        )
    tokens = cut_sequences(tokens_N, sequence_length, prefix)[:wanted].clone()
    if not len(tokens):
        reason = "".join(f"; {warning}" for warning in warnings)
        if count < 2:
            raise CalibrationError(f"{spec.source}: holds no text; name a source with more of it{reason}")
        works = 1 << (count.bit_length() - 1)
        raise CalibrationError(
            f"{spec.source}: {count} tokens are fewer than one sequence of {sequence_length}; "
            f"add text or use sequence_length: {works}{reason}"
        )
    if wanted is not None and len(tokens) < wanted:
        asked = f"{wanted} sequences of {sequence_length} tokens were asked for"
        warnings = (f"{name}: {asked} and its {count} tokens fill {len(tokens)}; those are used", *warnings)
    return TokenSet(
        tokens, name=name, source=spec.source, licence=spec.licence or spec.license, warnings=warnings, prefix=names
    )
