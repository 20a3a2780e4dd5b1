"""Tokenizers of real models, from the vocabularies that llama.cpp's sources carry for its own tests.

LLAMA_CPP_SOURCES names a source tree of llama.cpp, or the unpacked source archive of llama-cpp-python, which holds one
(`make clients` fetches it). Beside a vocabulary lie texts (.inp) and the tokens that the model's own tokenizer makes of
them (.out), nothing put in front.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unicodedata import is_normalized

import pytest
from exported import written
from random_models import make_model
from transformers import AutoTokenizer

from compress.errors import ModelError
from compress.evaluation.llama_cpp import LlamaAnswer, ask_llama_cpp, llama_cpp_missing
from compress.model.gguf.header import Gguf, GgufTensor, open_gguf
from compress.model.gguf.odd_texts import ODD_TEXTS
from compress.model.gguf.tokenizer import WORDS, make_tokenizer, special_ids

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
SOURCES = "LLAMA_CPP_SOURCES"
SEPARATOR = "\n__ggml_vocab_test__\n"
NAMES = ["llama-bpe", "qwen2", "phi-3", "llama-spm", "gpt-2", "mpt", "starcoder", "refact", "command-r"]
NAMES += ["deepseek-llm", "deepseek-coder"]
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {}, "phi3": {"sliding_window": None}}  # others go with a Llama
CONTROL, UNKNOWN, UNUSED = 3, 2, 5
BLANKS = [f"a{' ' * count}b\n{' ' * count}the" for count in range(1, 80)]  # pieces of blanks have one score for all
REFUSED = {
    "qwen35": "tokenizer.ggml.pre is 'qwen35', so how to split text into words is not known",
    "falcon": "tokenizer.ggml.pre is 'falcon', so how to split text into words is not known",
    "gpt-neox": "tokenizer.ggml.pre is missing, so how to split text into words is not known",
    "gemma-4": "tokenizer.ggml.model 'gemma4' is not supported",
    "bert-bge": "tokenizer.ggml.model 'bert' is not supported",
    "nomic-bert-moe": "tokenizer.ggml.model 't5' is not supported",
}


def vocabulary(name: str) -> tuple[Path, Gguf]:
    """The file, and what is in it, as if embeddings were too."""
    if not (root := os.environ.get(SOURCES)):
        pytest.skip(f"{SOURCES} names no folder: a source tree of llama.cpp, or llama-cpp-python's archive unpacked")
    places = [Path(root, *inside, "models") for inside in ((), ("vendor", "llama.cpp"))]
    files = [file for place in places if (file := place / f"ggml-vocab-{name}.gguf").is_file()]
    assert files, f"{places} have no ggml-vocab-{name}.gguf"
    file = files[0]
    gguf = open_gguf(file)
    rows = GgufTensor(file, 0, (len(gguf.keys["tokenizer.ggml.tokens"]), 64), 0, 0)
    return file, replace(gguf, tensors={"token_embd.weight": rows})


@dataclass(frozen=True)
class Real:
    """A vocabulary, a model of random weights that has its tokenizer by way of our reader, and what our writer made."""

    name: str
    given: dict[str, Any]
    folder: Path
    file: Path
    texts: list[str]
    ids: list[list[int]]


@pytest.fixture(scope="module", params=NAMES)
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    source, gguf = vocabulary(request.param)
    place = tmp_path_factory.mktemp(request.param)
    family = gguf.architecture if gguf.architecture in FAMILIES else "llama"
    rows = len(gguf.keys["tokenizer.ggml.tokens"])
    config = {"vocab_size": rows, "num_hidden_layers": 1, **special_ids(gguf), **FAMILIES.get(family, {})}
    folder = make_model(place / "model", family, **config)
    make_tokenizer(gguf).save_pretrained(folder)
    file = written(folder, place / "model.gguf", "bf16", name=gguf.keys["general.name"]).files[0]
    whole = source.with_name(f"{source.name}.inp").read_bytes().decode()
    rows_of_ids = source.with_name(f"{source.name}.out").read_text(encoding="utf-8").splitlines()
    ids = [[int(each) for each in row.split()] for row in rows_of_ids]
    yield Real(request.param, gguf.keys, folder, file, whole.removesuffix(SEPARATOR).split(SEPARATOR), ids)
    file.unlink()


def test_the_reader_makes_the_tokens_of_the_models_own_tokenizer(real: Real) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real.folder)
    assert len(real.texts) == len(real.ids) >= 46
    for text, ids in zip(real.texts, real.ids, strict=True):
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text


def test_llama_cpp_makes_them_and_those_of_odd_texts_with_the_file_that_is_written(real: Real) -> None:
    if why := llama_cpp_missing():
        pytest.skip(why)
    tokenizer = AutoTokenizer.from_pretrained(real.folder)
    odd = [text for text in (*ODD_TEXTS, *BLANKS) if is_normalized("NFC", text)]  # llama.cpp does not compose letters
    answer = ask_llama_cpp(real.file, [], [*real.texts, *odd])
    assert isinstance(answer, LlamaAnswer), answer
    first = tokenizer("")["input_ids"]
    wanted = [*(first + ids for ids in real.ids), *(tokenizer(text)["input_ids"] for text in odd)]
    other = [text for text, a, b in zip([*real.texts, *odd], answer.ids, wanted, strict=True) if a != b]
    assert other == []


def test_the_writer_gives_the_fields_that_were_read(real: Real) -> None:
    given, found = (
        {key: value for key, value in keys.items() if key.startswith(("tokenizer.", "general.name"))}
        for keys in (real.given, open_gguf(real.file).keys)
    )
    prefix = "tokenizer.ggml."
    is_bpe = given[f"{prefix}model"] == "gpt2"
    if is_bpe:  # one name for all that split text in the same way
        assert WORDS[found.pop(f"{prefix}pre")] == WORDS[given.pop(f"{prefix}pre")]
    else:
        assert_same_order(given.pop(f"{prefix}scores"), found.pop(f"{prefix}scores"), given[f"{prefix}tokens"])
    if real.name == "phi-3":  # of a converter that gave padding the type of <unk>, and <unk> that of control tokens
        kinds = given[f"{prefix}token_type"]
        tokens = given[f"{prefix}tokens"]
        assert kinds[0] == CONTROL and tokens[0] == "<unk>"
        kinds[:] = [UNKNOWN if no == 0 else UNUSED if kind == UNKNOWN else kind for no, kind in enumerate(kinds)]
        assert kinds.count(UNUSED) == sum(token.startswith("[PAD") for token in tokens) == 53
    usual = {"add_bos_token": not is_bpe or real.name == "llama-bpe", "add_eos_token": False}
    usual |= {} if is_bpe else {"add_space_prefix": True}
    given = {f"{prefix}{name}": value for name, value in usual.items()} | given  # what llama.cpp takes for granted
    for keys in (given, found):
        keys["tokenizer.chat_templates"] = sorted(keys.get("tokenizer.chat_templates", []))
    assert found.keys() == given.keys()
    assert [name for name in given if found[name] != given[name]] == []


def assert_same_order(given: list[float], found: list[float], tokens: list[str]) -> None:
    """Tokens that two others make come in an order that the scores allow; of the rest, no score is ever looked at."""
    known = set(tokens)
    made = [
        number for number, token in enumerate(tokens)
        if any(token[:cut] in known and token[cut:] in known for cut in range(1, len(token)))
    ]  # fmt: skip
    assert len(made) > 20_000
    by_ours = [given[number] for number in sorted(made, key=lambda number: -found[number])]
    assert by_ours == sorted(by_ours, reverse=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name: str) -> None:
    file, gguf = vocabulary(name)
    with pytest.raises(ModelError) as caught:
        make_tokenizer(gguf)
    assert str(caught.value).startswith(f"model: {file}: {REFUSED[name]}")
