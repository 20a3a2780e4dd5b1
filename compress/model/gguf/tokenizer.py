"""The tokenizer of a GGUF file, built from what its header holds and from nothing beside the file.

Two kinds: byte-level BPE, whose way to split text into words the header names (`tokenizer.ggml.pre`), and
sentencepiece, whose merges follow from the scores. Words are split as in the tokenizer.json of the models that each way
is named after.
"""

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from compress.model.gguf.header import Gguf
from compress.model.gguf.keys import REMEDY

if TYPE_CHECKING:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

_NORMAL_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{endings}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{endings}|{digits}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = [_NORMAL_WORDS.format(digits=r"\p{N}{1,3}")]
_QWEN2 = [_NORMAL_WORDS.format(digits=r"\p{N}")]
_TEKKEN = [_CASED.format(upper=_UPPER, lower=_LOWER, endings="", digits=r"\p{N}") + _REST]
_GPT4O = [
    _CASED.format(upper=_UPPER, lower=_LOWER, endings="(?i:'s|'t|'re|'ve|'m|'ll|'d)?", digits=r"\p{N}{1,3}") + _REST
]
_CJK = "[一-龥ࠀ-一가-퟿]+"
# DeepSeek's list of letters, which is that of letters with case but for these
_NOT_LISTED = r"\x{560}-\x{588}\x{10c7}-\x{10ff}\x{1c80}-\x{1c88}\x{2d00}-\x{2d2d}\x{a790}-\x{ab68}\x{10570}-\x{105bc}"
_LISTED = rf"[\p{{Lu}}\p{{Ll}}\p{{Lt}}&&[^{_NOT_LISTED}\x{{16e40}}-\x{{1df1e}}]]"
_DEEPSEEK_LLM = [r"[\r\n]", rf"\s?{_LISTED}+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK]
_DEEPSEEK_CODER = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK]
_DEEPSEEK_V3 = [
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
]
# What splits text, one after the other; "digits": each digit alone; "gpt2": as GPT-2 does.
WORDS: dict[str, list[str]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), ["gpt2"]),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), ["digits", "gpt2"]),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
    "deepseek-llm": [*_DEEPSEEK_LLM, "digits"],
    "deepseek-coder": [*_DEEPSEEK_CODER, "digits"],
    "deepseek-v3": _DEEPSEEK_V3,
}
# A word that is a token is one, whatever the merges say; and BOS comes first unless the file says otherwise.
WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
COMPOSED = ("qwen2",)  # text is brought into Unicode's form NFC before
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_READ = {
    *("model", "pre", "tokens", "scores", "token_type", "merges", "add_bos_token", "add_eos_token", "add_space_prefix"),
    *("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"),
}
# Names of tokens that no text gets by itself.
_HARMLESS = {"token_type_count", "seperator_token_id", "mask_token_id", "eot_token_id", "eom_token_id", "eog_token_ids"}


def special_ids(gguf: Gguf) -> dict[str, int | None]:
    """Token ids for the config: bos, eos, pad; sentencepiece files without them mean the usual 1 and 2."""
    usual = (1, 2) if gguf.keys.get("tokenizer.ggml.model") == "llama" else (None, None)
    return {
        "bos_token_id": _id(gguf, "bos", usual[0]),
        "eos_token_id": _id(gguf, "eos", usual[1]),
        "pad_token_id": _id(gguf, "padding", None),
    }


def make_tokenizer(gguf: Gguf) -> "PreTrainedTokenizerFast":
    """The tokenizer, which splits text as the model was trained on it.

    Raises:
        ModelError: there is none in the file, or one that can't be rebuilt.
    """
    from transformers import PreTrainedTokenizerFast

    tokens, kind = _checked(gguf)
    made = _byte_level(gguf, tokens) if kind == "gpt2" else _sentencepiece(gguf, tokens)
    _add_tokens(gguf, made, tokens)
    ids = special_ids(gguf) | {"unk_token_id": _id(gguf, "unknown", 0 if kind == "llama" else None)}
    named = {name.removesuffix("_id"): None if no is None else tokens[no] for name, no in ids.items()}
    _add_ends(gguf, made, named, ids)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(tokenizer_object=made, **named)
    tokenizer.chat_template = _templates(gguf)
    return tokenizer


def _templates(gguf: Gguf) -> str | dict[str, str] | None:
    """How chats are written: the template, or all by name where others are beside it. Their names become files'."""
    key = "tokenizer.chat_template"
    found = {name: value for name, value in gguf.keys.items() if name == key or name.startswith(f"{key}.")}
    for name, value in found.items():
        if not isinstance(value, str):
            raise gguf.error(f"{name} is no text; {REMEDY}")
    default = found.pop(key, None)
    named = {name.removeprefix(f"{key}."): value for name, value in found.items()}
    named = {name: value for name, value in named.items() if value and re.fullmatch(r"\w{1,64}", name, re.ASCII)}
    return {**named, "default": default} if default and named else default


def _checked(gguf: Gguf) -> tuple[list[str], str]:
    """Tokens and the kind of tokenizer."""
    tokens, kind = gguf.keys.get("tokenizer.ggml.tokens"), gguf.keys.get("tokenizer.ggml.model")
    if not isinstance(tokens, list) or not tokens or kind is None:
        raise gguf.error(f"has no tokenizer; {REMEDY}")
    if kind not in ("gpt2", "llama"):
        raise gguf.error(f"tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama are; {REMEDY}")
    needed = "merges" if kind == "gpt2" else "scores"
    if not isinstance(gguf.keys.get(f"tokenizer.ggml.{needed}"), list):
        raise gguf.error(f"its tokenizer lacks tokenizer.ggml.{needed}; {REMEDY}")
    for name in ("scores", "token_type"):
        values = gguf.keys.get(f"tokenizer.ggml.{name}", tokens)
        if not isinstance(values, list) or len(values) != len(tokens):
            raise gguf.error(f"tokenizer.ggml.{name} does not have a number for each of {len(tokens)} tokens; {REMEDY}")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise gguf.error(f"its tokenizer has the token {twice!r} twice; {REMEDY}")
    rows = gguf.tensors["token_embd.weight"].shape[0]
    if len(tokens) > rows:
        raise gguf.error(f"its tokenizer has {len(tokens)} tokens, its embeddings {rows} rows; {REMEDY}")
    prefix = "tokenizer.ggml."
    names = {key.removeprefix(prefix) for key in gguf.keys if key.startswith(prefix)}
    unknown = sorted(name for name in names - _READ - _HARMLESS if not _changes_nothing(gguf, name))
    if unknown:
        raise gguf.error(
            f"not understood, and may change its tokens: {', '.join(prefix + n for n in unknown)}; {REMEDY}"
        )
    return tokens, kind


def _changes_nothing(gguf: Gguf, name: str) -> bool:
    marks = name.startswith(("fim_", "prefix_", "suffix_", "middle_")) and name.endswith("_token_id")
    return marks or gguf.keys[f"tokenizer.ggml.{name}"] is False


def _id(gguf: Gguf, name: str, usual: int | None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value, tokens = gguf.keys.get(key, usual), gguf.keys.get("tokenizer.ggml.tokens")
    if value is None:
        return None
    if not isinstance(value, int) or not isinstance(tokens, list) or not 0 <= value < len(tokens):
        raise gguf.error(f"{key} is {value}, which is no token of its tokenizer; {REMEDY}")
    return value


def _byte_level(gguf: Gguf, tokens: list[str]) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = gguf.keys.get("tokenizer.ggml.pre")
    merges: list[Any] = [tuple(str(merge).split(" ", 1)) for merge in gguf.keys["tokenizer.ggml.merges"]]
    vocabulary = {token: no for no, token in enumerate(tokens)}
    try:
        made = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in WHOLE_WORDS))
    except Exception as error:  # what the tokenizers library raises for a merge of unknown tokens is Exception itself
        reason = str(error).removeprefix("Error while initializing BPE: ")
        raise gguf.error(f"its merges do not fit its tokens ({reason}); {REMEDY}") from error
    if pre in COMPOSED:
        made.normalizer = normalizers.NFC()
    if pre not in WORDS:
        said = "is missing" if pre is None else f"is {pre!r}"
        raise gguf.error(
            f"tokenizer.ggml.pre {said}, so how to split text into words is not known; supported: "
            f"{', '.join(sorted(WORDS))}; {REMEDY}"
        )
    made.pre_tokenizer = words(pre)
    made.decoder = decoders.ByteLevel()
    return made


def words(pre: str) -> "pre_tokenizers.PreTokenizer":
    """What splits text into words, by a name that `WORDS` has."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = []
    for step in WORDS[pre]:
        if step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step != "gpt2":
            steps.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in WORDS[pre])
    return pre_tokenizers.Sequence([*steps, last]) if steps else last


def _sentencepiece(gguf: Gguf, tokens: list[str]) -> "Tokenizer":
    """Blanks become U+2581, one is put in front (of each piece between special tokens) unless the file says no."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocabulary, unknown = {token: no for no, token in enumerate(tokens)}, _id(gguf, "unknown", 0)
    assert unknown is not None
    model = models.BPE(
        vocabulary, _merges(gguf, vocabulary), unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True
    )
    made = Tokenizer(model)
    prefixed = gguf.keys.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefixed else []
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return made


def _merges(gguf: Gguf, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best score first. Gemma's order is that of its tokens."""
    scores = gguf.keys["tokenizer.ggml.scores"]
    by_place = gguf.architecture.startswith("gemma")
    kinds = gguf.keys.get("tokenizer.ggml.token_type") or [1] * len(vocabulary)
    found = []
    for token, no in vocabulary.items():
        if kinds[no] in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((no if by_place else -scores[no], vocabulary[left], vocabulary[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _add_tokens(gguf: Gguf, made: "Tokenizer", tokens: list[str]) -> None:
    """Tokens that are found in the text whole, before all else."""
    from tokenizers import AddedToken

    kinds = gguf.keys.get("tokenizer.ggml.token_type")
    if not isinstance(kinds, list):
        return
    takes_blanks = gguf.architecture == "phi3" and gguf.keys["tokenizer.ggml.model"] == "llama"
    for kind in (_CONTROL, _USER_DEFINED):
        added = [
            AddedToken(
                token,
                normalized=False,
                special=kind == _CONTROL,
                rstrip=takes_blanks and token not in ("<unk>", "<s>", "<|endoftext|>"),  # as in Phi-3's tokenizer.json
            )
            for token, its in zip(tokens, kinds, strict=True)
            if its == kind
        ]
        made.add_special_tokens(added) if kind == _CONTROL else made.add_tokens(added)


def _add_ends(gguf: Gguf, made: "Tokenizer", named: dict[str, str | None], ids: dict[str, int | None]) -> None:
    """What is put before and behind a text."""
    from tokenizers import processors

    is_sentencepiece = gguf.keys["tokenizer.ggml.model"] == "llama"
    usual = {"bos": is_sentencepiece or gguf.keys.get("tokenizer.ggml.pre") in WHOLE_WORDS, "eos": False}
    added = {}
    for end in ("bos", "eos"):
        if gguf.keys.get(f"tokenizer.ggml.add_{end}_token", usual[end]):
            token, no = named[f"{end}_token"], ids[f"{end}_token_id"]
            if token is None:
                raise gguf.error(f"tokenizer.ggml.add_{end}_token is true, but it has no {end} token; {REMEDY}")
            added[end] = (token, no)
    template = [*([added["bos"][0]] if "bos" in added else []), "$A", *([added["eos"][0]] if "eos" in added else [])]
    made.post_processor = processors.TemplateProcessing(
        single=template,
        pair=[*template, *(f"{part}:1" for part in template[:-1]), "$B:1"],
        special_tokens=[*added.values()],
    )
