"""GGUF files that are written, opened by llama.cpp itself: the same tokens, the same answers as transformers."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import MODELS, model, sentencepiece, set_tokenizer, written
from gguf_files import byte_level
from random_models import TOKENIZER, load_stock, make_model, random_tokens
from transformers import AutoTokenizer

from compress.errors import ModelError
from compress.evaluation.llama_cpp import LlamaAnswer, ask_llama_cpp, llama_cpp_missing
from compress.exports.gguf.tokenizer import tokenizer_keys
from compress.model.gguf.convert import convert
from compress.model.gguf.header import open_gguf
from compress.model.gguf.odd_texts import ODD_TEXTS
from compress.model.gguf.tokenizer import WORDS

asks_llama_cpp = pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")


def asked(file: Path, tokens: list[int], **options: Any) -> LlamaAnswer:
    answer = ask_llama_cpp(file, tokens, **options)
    assert isinstance(answer, LlamaAnswer), answer
    return answer


@asks_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    """With float32 weights, but a cache and attention in float16: how much that may do is seen from float16 itself."""
    original = model(name, tmp_path / "model")
    tokens = random_tokens(1, 80)
    done = written(original, tmp_path / "model.gguf")
    answer = asked(done.files[0], tokens[0].tolist(), new_tokens=8)
    stock = load_stock(original, torch.float32)
    exact = stock(tokens).logits[0].log_softmax(-1)
    rounded = load_stock(original, torch.float16)(tokens).logits[0].float().log_softmax(-1)
    apart, usual = ((logits - exact).abs().mean() for logits in (answer.logits.log_softmax(-1), rounded))
    assert apart <= 2 * usual
    sure = exact.topk(2).values.diff().abs()[:, 0] > 0.2  # where rounding can't change which one is best
    assert sure.sum() >= 40
    assert torch.equal(answer.logits.argmax(-1)[sure], exact.argmax(-1)[sure])
    whole = torch.cat([tokens[0], torch.tensor(answer.continuation)])
    behind = stock(whole[None]).logits[0].log_softmax(-1)[len(tokens[0]) - 1 : -1]
    gap = behind.max(-1).values - behind.gather(1, whole[len(tokens[0]) :, None])[:, 0]
    assert gap.max() <= 0.2


@asks_llama_cpp
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_the_trained_model_goes_on_as_in_transformers(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    prompt = AutoTokenizer.from_pretrained(tiny_model)("The library was built in", return_tensors="pt")["input_ids"]
    stock = load_stock(tiny_model, torch.float32)
    wanted = stock.generate(prompt, max_new_tokens=12, do_sample=False)[0, prompt.shape[1] :].tolist()  # type: ignore[operator]
    answer = asked(written(tiny_model, tmp_path / "tiny.gguf", kind).files[0], prompt[0].tolist(), new_tokens=12)
    assert answer.continuation[:4] == wanted[:4]
    if kind != "q8_0":
        assert answer.continuation == wanted


@asks_llama_cpp
def test_a_split_model_is_opened_by_its_first_part(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    tokens = random_tokens(1, 8)[0].tolist()
    whole = asked(written(original, tmp_path / "whole.gguf").files[0], tokens)
    parts = written(original, tmp_path / "parts.gguf", split_bytes=600_000).files
    assert len(parts) == 3
    assert torch.equal(asked(parts[0], tokens).logits, whole.logits)


def special_texts(folder: Path) -> list[str]:
    specials = AutoTokenizer.from_pretrained(folder).all_special_tokens
    return [*ODD_TEXTS, *(f"a{token}b {token} c\n{token}" for token in specials)]


@asks_llama_cpp
@pytest.mark.parametrize("pre", WORDS)
def test_each_way_to_split_text_is_found_and_is_llama_cpps(pre: str, tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", vocab_size=4096)
    set_tokenizer(original, byte_level(TOKENIZER, pre, add_bos_token=True))
    found = tokenizer_keys(original, 4096)["tokenizer.ggml.pre"]
    assert WORDS[found] == WORDS[pre]
    tokenizer, texts = AutoTokenizer.from_pretrained(original), special_texts(original)
    if pre == "qwen2":  # llama.cpp does not compose letters
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    if pre == "deepseek-llm":  # it keeps digits together there: no matter to DeepSeek's merges, which have no two
        texts = [text for text in texts if not re.search(r"\d\d", text)]
    assert len(texts) >= 150
    answer = asked(written(original, tmp_path / "model.gguf").files[0], [], texts=texts)
    other = [text for text, ids in zip(texts, answer.ids, strict=True) if tokenizer(text)["input_ids"] != ids]
    assert not other


@asks_llama_cpp
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sentencepiece_is_llama_cpps(family: str, prefix: bool, tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", family)
    set_tokenizer(original, sentencepiece(prefix))
    tokenizer, texts = AutoTokenizer.from_pretrained(original), special_texts(original)
    answer = asked(written(original, tmp_path / "model.gguf").files[0], [], texts=texts)
    other = [text for text, ids in zip(texts, answer.ids, strict=True) if tokenizer(text)["input_ids"] != ids]
    assert not other


@asks_llama_cpp
@pytest.mark.parametrize("name", ["model", "Phi-3-mini"])
def test_blanks_behind_the_special_tokens_of_phi3(name: str, tmp_path: Path) -> None:
    original = make_model(tmp_path / name, "phi3")
    keys = sentencepiece(True)
    keys["tokens"][-3:], keys["token_type"][-3:] = ["<|user|>", "<|end|>", "<|endoftext|>"], [3, 3, 3]
    set_tokenizer(original, keys, "phi3")
    tokenizer = AutoTokenizer.from_pretrained(original)
    texts = ["<|user|>\nThe library<|end|>\n", "a <|end|>   b", "<s> a", "a </s>  b"]
    wanted = [tokenizer(text)["input_ids"] for text in texts]
    assert wanted[0] == tokenizer("<|user|>The library<|end|>")["input_ids"]
    assert asked(written(original, tmp_path / "model.gguf").files[0], [], texts=texts).ids == wanted


@asks_llama_cpp
def test_a_name_of_phi3_for_another_model(tmp_path: Path) -> None:
    """llama.cpp looks for Phi-3's tokens in whatever has its name, and gives up where they are not."""
    file = written(make_model(tmp_path / "my-Phi3-student"), tmp_path / "model.gguf").files[0]
    asked(file, [1, 2, 3])
    assert open_gguf(file).keys["general.name"] == "my-Phi-student"


@asks_llama_cpp
@pytest.mark.parametrize("scheme", ["always", "never"])
def test_another_spelling_of_sentencepiece(scheme: str, tmp_path: Path) -> None:
    """As newer tokenizer.json of Llama 2 have it."""
    original = make_model(tmp_path / "model")
    set_tokenizer(original, sentencepiece(True))
    file = original / "tokenizer.json"
    splitter = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": None, "pre_tokenizer": splitter}))
    tokenizer = AutoTokenizer.from_pretrained(original)
    texts = [text for text in ODD_TEXTS if not text.startswith(" ")]  # this spelling adds no second blank
    answer = asked(written(original, tmp_path / "model.gguf").files[0], [], texts=texts)
    other = [text for text, ids in zip(texts, answer.ids, strict=True) if tokenizer(text)["input_ids"] != ids]
    assert not other


def test_keys_of_a_tokenizer(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    set_tokenizer(original, byte_level(TOKENIZER, "llama-bpe", add_eos_token=True))
    (original / "chat_template.jinja").write_text("{{ messages }}")
    (original / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 17]}))
    keys = tokenizer_keys(original, 4100)
    ours = {name.removeprefix("tokenizer.ggml."): value for name, value in keys.items()}
    assert (ours["add_bos_token"], ours["add_eos_token"]) == (True, True)
    assert (ours["bos_token_id"], ours["eos_token_id"], ours["padding_token_id"], ours["eot_token_id"]) == (0, 0, 0, 17)
    assert ours["tokens"][4096:] == [f"[PAD{number}]" for number in range(4096, 4100)]
    assert ours["token_type"][4096:] == [5] * 4 and ours["token_type"][0] == 3
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


def test_named_chat_templates_go_out_and_in(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    (original / "chat_template.jinja").write_text("{{ messages }}")
    (original / "additional_chat_templates").mkdir()
    (original / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    keys = tokenizer_keys(original, 4096)
    assert keys["tokenizer.chat_template"] == "{{ messages }}"
    assert keys["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    assert keys["tokenizer.chat_templates"] == ["tool_use"]
    convert(written(original, tmp_path / "model.gguf").files[0], tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == {
        "default": "{{ messages }}",
        "tool_use": "{{ tools }}",
    }


def test_rows_without_tokens_stay_unused(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model", vocab_size=4100)
    convert(written(original, tmp_path / "model.gguf").files[0], tmp_path)
    keys = tokenizer_keys(tmp_path, 4100)
    assert keys["tokenizer.ggml.tokens"][4096:] == [f"[PAD{number}]" for number in range(4096, 4100)]
    assert keys["tokenizer.ggml.token_type"][4096:] == [5] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}, "of the kind WordLevel, only BPE"),
        ({"normalizer": {"type": "Lowercase"}}, r"changes text first \(Lowercase\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "splits text into words in a way of its own"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
         "splits text into words in a way of its own"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_has_not(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    file = original / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        tokenizer_keys(original, 4096)


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has token 4095 .* its embeddings end at 3999"):
        tokenizer_keys(make_model(tmp_path / "model"), 4000)
