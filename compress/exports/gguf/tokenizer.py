"""A checkpoint's tokenizer as keys of a GGUF header.

Two kinds, as llama.cpp has them: byte-level BPE, of which a header names the way to split text into words, and
sentencepiece, where scores stand for merges. Which way it is is found by what the tokenizer does to odd texts, not by
how its file spells it. What llama.cpp can't do is refused here; that its tokens are the same is seen when it is asked.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ModelError
from compress.model.gguf.odd_texts import ODD_TEXTS
from compress.model.gguf.tokenizer import COMPOSED, WHOLE_WORDS, WORDS, words
from compress.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_REMEDY = "llama.cpp has no such tokenizer"


def tokenizer_keys(folder: Path, rows: int, trust_remote_code: bool = False, name: str | None = None) -> dict[str, Any]:
    """The keys: `tokenizer.` and what follows, and the model's name, by which llama.cpp goes too.

    Args:
        folder: of the checkpoint.
        rows: of its embeddings; llama.cpp wants a token for each.
        trust_remote_code: as in transformers.
        name: of the model; None is that of the folder.

    Raises:
        ModelError: there is no tokenizer, or none that llama.cpp can have.
    """
    tokenizer: Any = load_tokenizer(folder, trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{folder}: its tokenizer has no tokenizer.json (fast) form; {_REMEDY}")
    state = json.loads(backend.to_str())
    if state["model"]["type"] != "BPE":
        raise ModelError(f"{folder}: its tokenizer is of the kind {state['model']['type']}, only BPE; {_REMEDY}")
    tokens, kinds = _tokens(folder, state, rows)
    if state["model"].get("byte_fallback"):
        keys = _sentencepiece(folder, state, tokens, kinds)
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
        keys = {"model": "gpt2", "pre": _pre(folder, backend, state), "merges": merges}
    keys |= {"tokens": tokens, "token_type": kinds, **_special(folder, tokenizer)}
    found = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    found["general.name"] = _name(name or folder.resolve().name, state, tokens)
    return found | _templates(tokenizer.chat_template)


def _templates(given: str | dict[str, str] | None) -> dict[str, Any]:
    """How chats are written; llama.cpp takes the template named tool_use, where there is one, for chats with tools."""
    every = dict(given) if isinstance(given, dict) else {"default": given}
    default = every.pop("default", None)
    named = {re.sub(r"\W", "_", name, flags=re.ASCII): template for name, template in every.items() if template}
    keys: dict[str, Any] = {f"tokenizer.chat_template.{name}": template for name, template in named.items()}
    if named:
        keys["tokenizer.chat_templates"] = list(named)
    return keys | ({"tokenizer.chat_template": default} if default else {})


def _name(name: str, state: dict[str, Any], tokens: Sequence[str]) -> str:
    """llama.cpp takes blanks behind special tokens away in a Phi-3 by name, and opens none without these tokens."""
    said = re.search("phi-?3", name, re.IGNORECASE) is not None
    if not {"<unk>", "<s>", "<|endoftext|>"} <= set(tokens):
        return re.sub("(phi)-?3", r"\1", name, flags=re.IGNORECASE)
    takes_blanks = any(row["special"] and row["rstrip"] for row in state["added_tokens"])
    return f"{name} (phi-3)" if takes_blanks and not said else name


def _tokens(folder: Path, state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """A token and its type for each row."""
    named = {number: token for token, number in state["model"]["vocab"].items()}
    added = {row["id"]: row for row in state["added_tokens"]}
    named |= {number: row["content"] for number, row in added.items()}
    if max(named) >= rows:
        raise ModelError(
            f"{folder}: its tokenizer has token {max(named)} ({named[max(named)]!r}), its embeddings end at {rows - 1};"
            " resize the embeddings (transformers' resize_token_embeddings), or take the token out"
        )
    unknown, falls_back = state["model"].get("unk_token"), bool(state["model"].get("byte_fallback"))
    tokens, kinds, used = [], [], set(named.values())
    for number in range(rows):
        if number not in named:
            tokens.append(f"[PAD{number}]" if f"[PAD{number}]" not in used else f"[UNUSED{number}]")
            kinds.append(_UNUSED)
            continue
        token = named[number]
        tokens.append(token)
        if number not in added and token in (f"[PAD{number}]", f"[UNUSED{number}]"):  # of a GGUF file that was read
            kinds.append(_UNUSED)
        elif falls_back and token == unknown:
            kinds.append(_UNKNOWN)
        elif number in added:
            kinds.append(_CONTROL if added[number]["special"] else _USER_DEFINED)
        else:
            kinds.append(_BYTE if falls_back and _is_byte(token) else _NORMAL)
    return tokens, kinds


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _special(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Ids of special tokens, and whether they go in front of a text and behind it."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in names}
    plain: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: list[int] = tokenizer("a")["input_ids"]
    place = next(at for at in range(len(whole) + 1) if whole[at : at + len(plain)] == plain)
    front, behind = whole[:place], whole[place + len(plain) :]
    for where, found, name in (("in front of", front, "bos"), ("behind", behind, "eos")):
        if found not in ([], [ids[name]]):
            raise ModelError(
                f"{folder}: its tokenizer puts tokens {found} {where} a text; llama.cpp puts {name} there or nothing"
            )
    keys = {f"{names[name]}_token_id": number for name, number in ids.items() if number is not None}
    ends = _ends(folder)
    if others := [number for number in ends if number != ids["eos"]]:
        keys["eot_token_id"] = others[0]
    return {**keys, "add_bos_token": bool(front), "add_eos_token": bool(behind)}


def _ends(folder: Path) -> list[int]:
    """Tokens at which generation ends, by generation_config.json."""
    file = folder / "generation_config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError):
        return []
    return [number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int)]


def _pre(folder: Path, backend: Any, state: dict[str, Any]) -> str:
    """The name of the way to split text into words.

    Raises:
        ModelError: none that llama.cpp has gives the same words of the odd texts.
    """
    normalizer = (state.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC") or backend.pre_tokenizer is None:
        raise ModelError(f"{folder}: its tokenizer changes text first ({normalizer}), or splits none; {_REMEDY}")
    whole = bool(state["model"].get("ignore_merges"))
    wanted = _splits(backend.pre_tokenizer)
    alike = [pre for pre in WORDS if (pre in WHOLE_WORDS) == whole and _splits(words(pre)) == wanted]
    if not alike:
        raise ModelError(
            f"{folder}: its tokenizer splits text into words in a way of its own; llama.cpp has to know it by name, "
            f"and known are those of {', '.join(sorted(WORDS))}"
        )
    return next((pre for pre in alike if (pre in COMPOSED) == (normalizer == "NFC")), alike[0])


def _splits(pre_tokenizer: Any) -> list[list[str]]:
    """The words of the odd texts."""
    return [[word for word, _ in pre_tokenizer.pre_tokenize_str(text)] for text in ODD_TEXTS]


def _sentencepiece(folder: Path, state: dict[str, Any], tokens: Sequence[str], kinds: list[int]) -> dict[str, Any]:
    """A token's score is the place of the first merge that makes it; the others are made by none.

    llama.cpp merges whatever neighbours make a token, the best score first.
    """
    score: dict[str, float] = {}
    for place, merge in enumerate(state["model"]["merges"]):
        made = "".join(merge if not isinstance(merge, str) else merge.split(" ", 1))
        score.setdefault(made, -float(place))
    worst = -float(len(state["model"]["merges"]))
    scores = [score.get(token, worst if kind == _NORMAL else 0.0) for token, kind in zip(tokens, kinds, strict=True)]
    return {"model": "llama", "pre": "default", "scores": scores, "add_space_prefix": _has_prefix(folder, state)}


def _has_prefix(folder: Path, state: dict[str, Any]) -> bool:
    """Whether a blank is put in front of a text; all blanks become U+2581."""
    normalizer, splitter = state.get("normalizer"), state.get("pre_tokenizer")
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    known = [step["type"] for step in steps]
    replaces = any(step["type"] == "Replace" and step["content"] == "▁" for step in steps)
    if splitter is not None and splitter["type"] == "Metaspace" and not steps and not splitter.get("split", True):
        return bool(splitter.get("prepend_scheme", "always") != "never")
    by_blanks = splitter is None or (splitter["type"] == "Split" and splitter["pattern"] == {"String": " "})
    if by_blanks and replaces and known in (["Replace"], ["Prepend", "Replace"]):
        return "Prepend" in known
    raise ModelError(
        f"{folder}: its tokenizer changes or splits text in a way of its own ({known or splitter}); {_REMEDY}"
    )
