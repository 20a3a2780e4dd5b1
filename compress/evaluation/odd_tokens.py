"""Whether another program's tokenizer reads odd texts as the checkpoint's does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from unicodedata import is_normalized

from compress.evaluation.verify import Check
from compress.model.gguf.odd_texts import ODD_TEXTS
from compress.model.tokenizer import load_tokenizer

_SPECIALS = 24  # special tokens that are tried between words


def odd_tokens(folder: Path, trust_remote_code: bool) -> tuple[dict[str, list[int]], int]:
    """Odd texts and their tokens, and how many are left out, whose letters the tokenizer composes first."""
    tokenizer = load_tokenizer(folder, trust_remote_code)
    specials = [str(token) for token in tokenizer.all_special_tokens][:_SPECIALS]
    texts = [*ODD_TEXTS, *(f"a {token}b\n{token} c" for token in specials)]
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    kept = texts if type(normalizer).__name__ != "NFC" else [text for text in texts if is_normalized("NFC", text)]
    return {text: tokenizer(text)["input_ids"] for text in kept}, len(texts) - len(kept)


def same_tokens(
    wanted: Mapping[str, Sequence[int]], ids: Sequence[Sequence[int]], note: str = "", borne: int = 0
) -> Check:
    """Whether the tokens are the same.

    Args:
        wanted: texts and their tokens.
        ids: another program's tokens of each text.
        note: what is said behind, whatever comes out.
        borne: so many texts may have others, which is told and does not fail.
    """
    other = [
        (text, list(ours), list(its)) for (text, ours), its in zip(wanted.items(), ids, strict=True)
        if list(ours) != list(its)
    ]  # fmt: skip
    if not other:
        return Check("tokens", True, f"the same in {len(wanted)} odd texts{note}")
    text, ours, its = other[0]
    place = next(
        (at for at, pair in enumerate(zip(ours, its, strict=False)) if pair[0] != pair[1]), min(len(ours), len(its))
    )
    return Check(
        "tokens",
        None if len(other) <= borne else False,
        f"others in {len(other)} of {len(wanted)} odd texts, first in {text!r}: from the {place + 1}th on "
        f"{its[place : place + 4]} instead of {ours[place : place + 4]}{note}",
    )
