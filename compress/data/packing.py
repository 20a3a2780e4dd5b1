"""Documents become full sequences of tokens, without padding.

Each document is tokenized as the tokenizer does by default, so the boundary between two documents is whatever the
model's own tokenizer puts there: BOS for Llama, nothing for SmolLM2 or Qwen. Documents follow one another, and the
stream is cut into full sequences; a document may continue in the next one, which then starts with what the tokenizer
puts in front of a text, as every input that the model was made for does: the first token of a sequence takes up much of
the attention, and a model that knows it as BOS may fail without. The remainder that does not fill a sequence is
dropped. A padded position would enter every statistic of a layer; a packed one is real text.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
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


def text_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that a tokenizer puts in front of a text, by what it does: BOS, nothing, or a few."""
    whole, bare = (
        tokenizer("of the text", add_special_tokens=add, verbose=False)["input_ids"] for add in (True, False)
    )
    starts = (n for n in range(len(whole) - len(bare) + 1) if whole[n : n + len(bare)] == bare)
    return list(whole[: next(starts, 0)])


def cut_sequences(tokens_N: Tensor, sequence_length: int, prefix: Sequence[int] = ()) -> Tensor:
    """Consecutive sequences of full length, from the start, each of which starts with `prefix`.

    Args:
        tokens_N: int64 [N].
        sequence_length: S, more than the prefix has.
        prefix: put in front of a sequence whose tokens do not start with it themselves.

    Returns:
        [sequences, S]; without a prefix N // S of them.
    """
    if not prefix:
        count = len(tokens_N) // sequence_length
        return tokens_N[: count * sequence_length].view(count, sequence_length)
    front = tokens_N.new_tensor(prefix)
    sequences: list[Tensor] = []
    start = 0
    while True:
        there = torch.equal(tokens_N[start : start + len(front)], front)
        end = start + sequence_length - (0 if there else len(front))
        if end > len(tokens_N):
            return torch.stack(sequences) if sequences else tokens_N.new_empty(0, sequence_length)
        sequences.append(tokens_N[start:end] if there else torch.cat([front, tokens_N[start:end]]))
        start = end
