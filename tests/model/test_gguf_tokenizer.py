"""Tokenizers of GGUF files: the tokens of the model's own tokenizer, or one line that says why not."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_files import CONTROL, USER_DEFINED, byte_level, write_gguf
from random_models import TOKENIZER, make_model
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.errors import ModelError
from compress.model.gguf.convert import convert
from compress.model.gguf.header import Gguf, GgufTensor
from compress.model.gguf.tokenizer import make_tokenizer

TEXT = "  The old library, in 1987: it's\n\nnever 12345 locked. Größe 你好 \tx"
REMEDY = "give the model's safetensors folder instead"


def header(tokenizer: dict[str, Any], architecture: str = "llama") -> Gguf:
    keys = {f"tokenizer.ggml.{name}": value for name, value in tokenizer.items() if value is not None}
    embeddings = GgufTensor(Path("model.gguf"), 0, (len(tokenizer.get("tokens") or "x") + 3, 8), 0, 0)
    return Gguf((Path("model.gguf"),), keys | {"general.architecture": architecture}, {"token_embd.weight": embeddings})


def test_a_byte_level_tokenizer_is_that_of_the_model(tmp_path: Path) -> None:
    made = make_tokenizer(header(byte_level(TOKENIZER)))
    made.save_pretrained(tmp_path)
    own, loaded = (AutoTokenizer.from_pretrained(folder) for folder in (TOKENIZER, tmp_path))
    expected = own(TEXT)["input_ids"]
    assert loaded(TEXT)["input_ids"] == made(TEXT)["input_ids"] == expected
    assert loaded.decode(expected) == TEXT
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>",) * 3


def test_nothing_beside_the_file_is_read(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    keys = {"tokenizer.chat_template": "{{ messages[0]['content'] }}"}
    file = write_gguf(original, tmp_path / "model.gguf", keys)
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
        (tmp_path / name).write_text("of another model")
    (tmp_path / "chat_template.jinja").write_text("of another model")
    made = tmp_path / "made"
    made.mkdir()
    convert(file, made)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(made)
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(original)(TEXT)["input_ids"]
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == 0


@pytest.mark.parametrize(
    ("pre", "said", "bos"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_put_in_front_where_the_file_says_so(pre: str, said: bool | None, bos: bool, tmp_path: Path) -> None:
    make_tokenizer(header(byte_level(TOKENIZER, pre, add_bos_token=said, add_eos_token=True))).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    plain = made("library", add_special_tokens=False)["input_ids"]
    assert made("library")["input_ids"] == [0] * bos + plain + [0]


# Words of "I'M 12345 cats.  Größe 你好\n\n x", as the tokenizer.json of a model with that pre-tokenizer splits them
WORDS = {
    "gpt-2": ["I", "'", "M", " 12345", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "smollm": ["I", "'", "M", " ", "1", "2", "3", "4", "5", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "llama-bpe": ["I", "'M", " ", "123", "45", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "qwen2": ["I", "'M", " ", "1", "2", "3", "4", "5", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "tekken": ["I", "'M", " ", "1", "2", "3", "4", "5", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "gpt-4o": ["I'M", " ", "123", "45", " cats", ".", " ", " Größe", " 你好", "\n\n", " x"],
    "deepseek-coder": [
        "I", "'", "M", " ", "1", "2", "3", "4", "5", " cats", ".", " ", " Größe", " ", "你好", "\n", "\n", " x",
    ],
    "deepseek-llm": [
        "I", "'", "M", " ", "1", "2", "3", "4", "5", " cats", ".", " ", " Gr", "öß", "e", " ", "你好", "\n", "\n", " x",
    ],
    "deepseek-v3": ["I", "'M", " ", "123", "45", " cats", ".", " ", " Größe", " ", "你好", "\n\n", " x"],
}  # fmt: skip


@pytest.mark.parametrize("pre", WORDS)
def test_text_is_split_into_words_as_the_model_learned_it(pre: str) -> None:
    text = "I'M 12345 cats.  Größe 你好\n\n x"
    backend = make_tokenizer(header(byte_level(TOKENIZER, pre))).backend_tokenizer
    spans = [span for _, span in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == WORDS[pre]


def test_a_word_that_is_a_token_needs_no_merges() -> None:
    """As in the tokenizer.json of Llama 3, where tokens exist that no merge reaches."""
    keys = byte_level(TOKENIZER)
    word = "Ġxylographs"
    keys["tokens"] += [word]
    keys["token_type"] += [1]
    tokens = {
        pre: make_tokenizer(header(keys | {"pre": pre})).tokenize(" xylographs") for pre in ("llama-bpe", "gpt-2")
    }
    assert tokens["llama-bpe"] == [word] and len(tokens["gpt-2"]) > 1


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """A vocabulary like that of Llama 2: three special tokens, the bytes, then pieces, the earlier the better."""
    rows = json.loads((TOKENIZER / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = [
        piece.replace("Ġ", "▁") for piece in sorted(rows, key=rows.__getitem__) if piece.isascii() or "Ġ" in piece
    ]
    pieces = [piece for piece in dict.fromkeys(pieces) if not piece.startswith("<|")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<user>"]
    kinds = [2, CONTROL, CONTROL, *[6] * 256, *[1] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(place) for place in range(len(pieces))] + [0.0]
    keys = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds}
    return keys | {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0} | changes


def by_the_paper(keys: dict[str, Any], text: str, prefix: bool) -> list[int]:
    """Sentencepiece's BPE, one merge at a time: the neighbours with the best score, the leftmost of equals."""
    ids = {token: number for number, token in enumerate(keys["tokens"])}
    symbols = list((" " if prefix else "") + text)
    symbols = ["▁" if symbol == " " else symbol for symbol in symbols]
    while True:
        joined = [left + right for left, right in itertools.pairwise(symbols)]
        pairs = [(keys["scores"][ids[piece]], -place) for place, piece in enumerate(joined) if piece in ids]
        if not pairs:
            break
        place = -max(pairs)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    found: list[int] = []
    for symbol in symbols:
        found += [ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()]
    return found


@pytest.mark.parametrize("text", [TEXT, "library", " library", "   library", "", " "], ids=repr)
@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_with_its_leading_blanks(prefix: bool | None, text: str, tmp_path: Path) -> None:
    keys = sentencepiece()
    make_tokenizer(header({**keys, "add_space_prefix": prefix})).save_pretrained(tmp_path)
    made = AutoTokenizer.from_pretrained(tmp_path)
    expected = by_the_paper(keys, text, prefix is not False) if text else []
    assert made(text)["input_ids"] == [1, *expected]
    assert made.decode(expected) == text


def test_special_tokens_of_sentencepiece() -> None:
    keys = sentencepiece(add_bos_token=False)
    made, user = make_tokenizer(header(keys)), len(keys["tokens"]) - 1
    library = by_the_paper(keys, "library", True)
    assert made("library</s><user>library")["input_ids"] == [*library, 2, user, *library]


def test_gemma_has_the_order_of_its_tokens() -> None:
    keys = sentencepiece(add_space_prefix=False)
    shuffled = keys | {"scores": [0.0] * len(keys["scores"])}
    text = "The old library stood at the corner"
    assert make_tokenizer(header(shuffled, "gemma2"))(text)["input_ids"] == [1, *by_the_paper(keys, text, False)]


def test_a_chat_template_with_a_path_for_a_name_is_left_out() -> None:
    given = header(BYTE_LEVEL)
    names = {"": "{{ a }}", ".tool_use": "{{ b }}", "../x": "{{ c }}", ".../x": "{{ d }}"}
    given.keys.update({f"tokenizer.chat_template{name}": text for name, text in names.items()})
    assert make_tokenizer(given).chat_template == {"default": "{{ a }}", "tool_use": "{{ b }}"}


def test_a_chat_template_that_is_no_text() -> None:
    given = header(BYTE_LEVEL)
    given.keys["tokenizer.chat_template"] = 5
    with pytest.raises(ModelError, match=f"^model: model.gguf: tokenizer.chat_template is no text; {REMEDY}$"):
        make_tokenizer(given)


BYTE_LEVEL = byte_level(TOKENIZER)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({}, f"has no tokenizer; {REMEDY}"),
    "another kind": (
        {**BYTE_LEVEL, "model": "t5"}, f"tokenizer.ggml.model 't5' is not supported, only gpt2 and llama are; {REMEDY}",
    ),
    "no merges": ({**BYTE_LEVEL, "merges": None}, f"its tokenizer lacks tokenizer.ggml.merges; {REMEDY}"),
    "token twice": (
        {**BYTE_LEVEL, "tokens": ["a", "b", "a"], "token_type": [1, 1, 1]},
        f"its tokenizer has the token 'a' twice; {REMEDY}",
    ),
    "too few scores": (
        {"model": "llama", "tokens": ["a", "b", "c"], "scores": [0.0, -1.0]},
        f"tokenizer.ggml.scores does not have a number for each of 3 tokens; {REMEDY}",
    ),
    "merge of unknown tokens": (
        {**BYTE_LEVEL, "merges": ["a qqqq"]},
        "its merges do not fit its tokens (Token `qqqq` out of vocabulary); " + REMEDY,
    ),
    "id that is no token": (
        {**BYTE_LEVEL, "bos_token_id": 10**6},
        f"tokenizer.ggml.bos_token_id is 1000000, which is no token of its tokenizer; {REMEDY}",
    ),
    "bos that is wanted but not named": (
        {**BYTE_LEVEL, "bos_token_id": None, "add_bos_token": True},
        f"tokenizer.ggml.add_bos_token is true, but it has no bos token; {REMEDY}",
    ),
    "unknown key": (
        {**BYTE_LEVEL, "precompiled_charsmap": [1, 2]},
        f"not understood, and may change its tokens: tokenizer.ggml.precompiled_charsmap; {REMEDY}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    tokenizer, line = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        make_tokenizer(header(tokenizer))
    assert str(caught.value) == f"model: model.gguf: {line}"


@pytest.mark.parametrize(("pre", "said"), [(None, "is missing"), ("poro-chat", "is 'poro-chat'")])
def test_a_way_to_split_words_that_is_not_known(pre: str | None, said: str) -> None:
    with pytest.raises(ModelError) as caught:
        make_tokenizer(header({**BYTE_LEVEL, "pre": pre}))
    assert str(caught.value) == (
        f"model: model.gguf: tokenizer.ggml.pre {said}, so how to split text into words is not known; supported: "
        "codeshell, command-r, dbrx, deepseek-coder, deepseek-llm, deepseek-r1-qwen, deepseek-v3, falcon3, gpt-2, "
        "gpt-4o, llama-bpe, llama-v3, llama3, megrez, minerva-7b, mpt, olmo, phi-2, qwen2, refact, smaug-bpe, smollm, "
        f"stablelm2, starcoder, tekken; {REMEDY}"
    )
