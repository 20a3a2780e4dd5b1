"""Documents become full sequences of tokens, without padding.

Each document is tokenized as the tokenizer does by default, so the boundary between two documents is whatever the
model's own tokenizer puts there: BOS for Llama, nothing for SmolLM2 or Qwen. Documents follow one another, and the
stream is cut every `sequence_length` tokens; a document may continue in the next sequence, and the remainder that
does not fill one is dropped. A padded position would enter every statistic of a layer; a packed one is real text.
"""

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.data.documents import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_DOCUMENTS = 64
BATCH_CHARACTERS = 250_000


def collect_tokens(documents: Iterable[Document], tokenizer: "PreTrainedTokenizerBase", count: int) -> Tensor:
    """The first `count` tokens of the documents, or all when there are fewer: int64 [N].

    Stops reading `documents` once it has enough.
    """
    tokens = array("q")
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        encoded = tokenizer(texts, add_special_tokens=batch[0].add_special_tokens, verbose=False)
        for ids in encoded["input_ids"]:
            tokens.extend(ids)
        if len(tokens) >= count:
            break
    return torch.tensor(tokens[:count], dtype=torch.int64)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Neighbours that are tokenized in one call: fast tokenizers work on them in parallel."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        full = len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS
        if batch and (full or batch[0].add_special_tokens != document.add_special_tokens):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
    if batch:
        yield batch


def cut_sequences(tokens_N: Tensor, sequence_length: int) -> Tensor:
    """Consecutive windows of full length, from the start: [N] -> [N // sequence_length, sequence_length]."""
    count = len(tokens_N) // sequence_length
    return tokens_N[: count * sequence_length].view(count, sequence_length)
