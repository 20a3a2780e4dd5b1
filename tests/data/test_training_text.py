"""Text to train on: sources, packing on disk, what is scored, fingerprints, mixtures; against slow plain versions."""

import gzip
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.data import training
from compress.data.assistant import assistant_spans
from compress.data.calibration import load_calibration
from compress.data.documents import Record, Renderer, shuffle
from compress.data.guard import render
from compress.data.mixture import LONGEST_CYCLE, Mixture, cycle, held_counts, whole_shares, words
from compress.data.packing import cut_sequences, text_prefix
from compress.data.sources import Row, read_rows
from compress.data.training import Batch, PackedText, pack, text_key
from compress.errors import CalibrationError
from compress.recipe.text import CalibrationSpec, TrainingText
from compress.system.progress import Reporter

MODEL = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
ALLOWED = ".jsonl, .json, .parquet, .txt, each also .gz"
STORIES = [f"Story {n}: the {n * 7}th fox ran over {n} hills and met {n + 1} dogs." for n in range(40)]
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]",
           "[/INST]", "<|User|>", "<|Assistant|>"]  # fmt: skip


def make_tokenizer(*prefix: str) -> PreTrainedTokenizerBase:
    """The tiny model's, with the special tokens of chats; it puts `prefix` in front of every text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "bos_token": "<s>"})
    tokenizer.add_tokens(["<think>", "</think>"])
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in dict.fromkeys(prefix)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join([*prefix, "$A"]), special_tokens=ids
    )
    return tokenizer  # type: ignore[no-any-return]


PREFIXES: dict[str, tuple[str, ...]] = {
    "none": (), "BOS": ("<s>",), "BOS that is EOS": ("<|endoftext|>",), "two": ("<s>", "<|eot_id|>"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {name: make_tokenizer(*prefix) for name, prefix in PREFIXES.items()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


def write_jsonl(file: Path, texts: list[Any], field: str = "text") -> str:
    file.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(file)


def packed(
    text: TrainingText | str, tokenizer: PreTrainedTokenizerBase, folder: Path, *, length: int = 16,
    sequences: int = 1000, assistant_only: bool = False, key: str = "k", reporter: Reporter | None = None,
) -> PackedText:  # fmt: skip
    return pack(
        TrainingText(source=text) if isinstance(text, str) else text, tokenizer, length=length, sequences=sequences,
        assistant_only=assistant_only, folder=folder, key=key, reporter=reporter or Reporter(silent=True),
    )  # fmt: skip


def everything(text: PackedText) -> Batch:
    return text.read(range(text.sequences))


def same(one: Batch, other: Batch) -> bool:
    fields = ("tokens", "documents", "scored")
    return all(torch.equal(getattr(one, each), getattr(other, each)) for each in fields)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def problem(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(CalibrationError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Packing


def slow_sequences(
    documents: list[list[int]], prefix: list[int], length: int, most: int
) -> list[list[tuple[int, int, bool]]]:
    """Token by token: (token, document of its sequence, scored)."""
    stream = [
        (token, number, place >= max(1, len(prefix)))
        for number, ids in enumerate(documents)
        for place, token in enumerate(ids)
    ]
    sequences: list[list[tuple[int, int, bool]]] = []
    while len(sequences) < most and stream:
        starts_so = [token for token, _, _ in stream[: len(prefix)]] == prefix
        row = [] if starts_so else [(token, stream[0][1], False) for token in prefix]
        taken = length - len(row)
        if taken > len(stream):
            break
        row += stream[:taken]
        stream = stream[taken:]
        order = list(dict.fromkeys(number for _, number, _ in row))
        sequences.append(
            [(token, order.index(number), scored and place >= max(1, len(prefix)))
             for place, (token, number, scored) in enumerate(row)]
        )  # fmt: skip
    return sequences


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=40),
    most=st.integers(1, 12),
    length=st.integers(3, 40),
    seed=st.integers(0, 3),
    shard=st.integers(1, 4),
)
@pytest.mark.parametrize("kind", PREFIXES)
def test_packed_text_is_what_a_slow_version_makes(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase], texts: list[str], most: int, length: int, seed: int,
    shard: int,
) -> None:  # fmt: skip
    tokenizer, end = tokenizers[kind], 0
    records = [Record("", text) for text in texts if text.strip()]
    ids = [tokenizer(str(record.content))["input_ids"] for record in shuffle(records, seed)]
    prefix = text_prefix(tokenizer)
    assert prefix == tokenizer.convert_tokens_to_ids(list(PREFIXES[kind]))
    documents = [each if each[-1] == end else [*each, end] for each in ids]
    expected = slow_sequences(documents, prefix, length, most)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SHARD_SEQUENCES", shard)
        text = TrainingText(source=write_jsonl(Path(folder) / "c.jsonl", texts), seed=seed)
        if not expected:
            problem(packed, text, tokenizer, Path(folder) / "p", length=length, sequences=most)
            return
        found = packed(text, tokenizer, Path(folder) / "p", length=length, sequences=most)
        assert len(list((Path(folder) / "p").glob("*.safetensors"))) == -(-len(expected) // shard)
        batch = everything(found)
    assert found.tokens == len(expected) * length
    assert batch.tokens.tolist() == [[token for token, _, _ in row] for row in expected]
    assert batch.documents.tolist() == [[number for _, number, _ in row] for row in expected]
    assert batch.scored.tolist() == [[scored for _, _, scored in row] for row in expected]
    stream = torch.tensor(sum(documents, []))
    assert torch.equal(batch.tokens, cut_sequences(stream, length, prefix)[:most])


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text("abc ", min_size=1, max_size=30), min_size=8, max_size=30), length=st.integers(3, 20))
@pytest.mark.parametrize("kind", PREFIXES)
def test_every_scored_token_follows_one_of_its_document(
    kind: str, tokenizers: dict[str, PreTrainedTokenizerBase], texts: list[str], length: int
) -> None:
    with TemporaryDirectory() as folder:
        source = write_jsonl(Path(folder) / "c.jsonl", [*texts, "abc " * 30])
        batch = everything(packed(source, tokenizers[kind], Path(folder) / "p", length=length))
    assert batch.scored.any()
    for documents, scored, positions in zip(
        batch.documents.tolist(), batch.scored.tolist(), batch.positions.tolist(), strict=True
    ):
        assert documents[0] == 0 and not scored[0]
        for place in range(1, length):
            assert documents[place] - documents[place - 1] in (0, 1)
            assert not scored[place] or documents[place] == documents[place - 1]
        assert positions == [place - documents.index(number) for place, number in enumerate(documents)]


def test_dtypes_and_shapes(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    text = packed(write_jsonl(tmp_path / "c.jsonl", STORIES), tokenizer, tmp_path / "p")
    batch = text.read([2, 0, 2])
    assert [(each.dtype, tuple(each.shape)) for each in (batch.tokens, batch.documents, batch.scored)] == [
        (torch.int64, (3, 16)), (torch.int32, (3, 16)), (torch.bool, (3, 16)),
    ]  # fmt: skip
    assert batch.positions.dtype == torch.int64
    whole = everything(text)
    assert torch.equal(batch.tokens, whole.tokens[[2, 0, 2]]) and torch.equal(batch.scored, whole.scored[[2, 0, 2]])


def test_a_plain_text_ends_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    texts = ["A fox.<|endoftext|>", "A dog."]
    length = sum(len(tokenizer(text)["input_ids"]) for text in texts) + 1
    batch = everything(packed(write_jsonl(tmp_path / "c.jsonl", texts), tokenizer, tmp_path / "p", length=length))
    assert batch.tokens.shape == (1, length) and int((batch.tokens == 0).sum()) == 2
    assert batch.tokens[0, -1] == 0 and batch.documents[0, -1] == 1
    assert batch.scored[batch.tokens == 0].all()  # a model learns where texts end


def test_the_first_sequences_are_those_of_a_longer_packing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", STORIES)
    whole = packed(source, tokenizer, tmp_path / "whole")
    part = packed(source, tokenizer, tmp_path / "part", sequences=5)
    assert part.sequences == 5 and same(everything(part), whole.read(range(5)))
    limited = packed(TrainingText(source=source, samples=3), tokenizer, tmp_path / "limited")
    assert limited.sequences == 3 and same(everything(limited), whole.read(range(3)))


def test_no_more_is_read_than_needed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Counter[str]()

    def endless(*_: Any, **__: Any) -> Iterator[Row]:
        while True:
            read["rows"] += 1
            yield Row("c:1", f"Row {read['rows']} of a text without an end.")

    monkeypatch.setattr(training, "read_rows", endless)
    assert packed("c.jsonl", tokenizer, tmp_path / "p", sequences=100).sequences == 100
    assert read["rows"] < 12_000  # the buffer that shuffles holds 10,000


def test_what_a_packed_text_says_of_itself(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    source = write_jsonl(tmp_path / "c.jsonl", STORIES)
    text = packed(TrainingText(source=source, name="tales", licence="MIT"), tokenizer, tmp_path / "p")
    assert (text.name, text.licence, text.source, text.key) == ("tales", "MIT", source, "k")
    again = packed(TrainingText(source=source, license="X"), tokenizer, tmp_path / "p")
    assert (again.name, again.licence) == ("c.jsonl", "X")
    chats = [[{"role": "user", "content": story}] for story in STORIES]
    text = packed(write_jsonl(tmp_path / "m.jsonl", chats, "messages"), tokenizer, tmp_path / "q")
    assert text.warnings == (
        "this tokenizer has no chat template: conversations are used as plain text, without roles",
    )
    assert packed(write_jsonl(tmp_path / "m.jsonl", chats, "messages"), tokenizer, tmp_path / "q") == text


# Interruptions


@pytest.fixture
def whole(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> PackedText:
    """Seven shards of stories."""
    monkeypatch.setattr(training, "SHARD_SEQUENCES", 8)
    text = packed(write_jsonl(tmp_path / "c.jsonl", STORIES), tokenizer, tmp_path / "whole")
    assert len(list(text.folder.glob("*.safetensors"))) > 5
    return text


def test_a_whole_one_is_opened_and_nothing_read(
    whole: PackedText, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(whole.folder)
    monkeypatch.setattr(training, "read_rows", None)
    assert packed(whole.source, tokenizer, whole.folder) == whole
    assert files(whole.folder) == before


@pytest.mark.parametrize("left", ["no meta.json", "no shard", "half a meta.json", "shorter shard"])
def test_what_was_left_half_way_is_made_again(left: str, whole: PackedText, tokenizer: PreTrainedTokenizerBase) -> None:
    before = files(whole.folder)
    meta, shard = whole.folder / "meta.json", whole.folder / "shard-00002.safetensors"
    if left == "no meta.json":
        meta.unlink()
    elif left == "no shard":
        shard.unlink()
    elif left == "half a meta.json":
        meta.write_bytes(before["meta.json"][:20])
    else:
        shard.write_bytes(before[shard.name][:-8])
    assert packed(whole.source, tokenizer, whole.folder) == whole
    assert files(whole.folder) == before


def test_stopped_at_any_sequence_and_started_again(
    whole: PackedText, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, add = files(whole.folder), training._Writer.add
    for stop in (1, 9, 30):

        def stopping(writer: Any, *sequence: Any, at: int = stop) -> None:
            add(writer, *sequence)
            if writer.count == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training._Writer, "add", stopping)
            packed(whole.source, tokenizer, tmp_path / "p")
        assert not (tmp_path / "p" / "meta.json").exists()
    packed(whole.source, tokenizer, tmp_path / "p")
    assert files(tmp_path / "p") == before


def test_two_texts_never_mix(whole: PackedText, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "d.jsonl", ["A tale of two cats."] * 20)
    alone = files(packed(other, tokenizer, tmp_path / "alone", key="other").folder)
    packed(other, tokenizer, whole.folder, key="other")
    assert files(whole.folder) == alone


def test_a_shard_that_is_gone_is_one_line(whole: PackedText) -> None:
    shard = whole.folder / "shard-00001.safetensors"
    shard.write_bytes(b"x")
    message = problem(whole.read, [9])
    assert message.startswith(f"{shard}: cannot be read (")
    assert message.endswith(f"; delete {whole.folder} and run the same command again")


# Mistakes


def test_mistakes(tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    plain, source = tokenizers["none"], write_jsonl(tmp_path / "c.jsonl", ["A fox."])
    count = len(plain("A fox.")["input_ids"]) + 1
    few = f"{count} tokens are fewer than one sequence of 16; add text or use sequence_length: 4"
    assert problem(packed, source, plain, tmp_path / "p") == f"{source}: {few}"
    blank = write_jsonl(tmp_path / "b.jsonl", [" "])
    assert problem(packed, blank, plain, tmp_path / "p") == f"{blank}: holds no text; name a source with more of it"
    room = "sequence_length: 2 has no room for text behind the <s> <|eot_id|> that the tokenizer puts in front of it"
    assert problem(packed, source, tokenizers["two"], tmp_path / "p", length=2) == f"{room}; use 3 or more"
    chats = write_jsonl(tmp_path / "m.jsonl", [[{"role": "user", "content": "A fox."}]] * 40, "messages")
    said = r"m\.jsonl:\d+: a conversation, and this tokenizer has no chat template; use assistant_only: false$"
    assert re.search(said, problem(packed, chats, plain, tmp_path / "p", assistant_only=True))
    chatty = make_tokenizer()
    chatty.chat_template = CHATML
    assert problem(packed, chats, chatty, tmp_path / "p", assistant_only=True) == (
        f"{chats}: no assistant says anything in it; name conversations with answers, or use assistant_only: false"
    )


# Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of one story each or several, and files that are none."""
    made = tmp_path / "texts"
    (made / "more").mkdir(parents=True)
    write_jsonl(made / "b.jsonl", STORIES[:2])
    (made / "a.txt.gz").write_bytes(gzip.compress(STORIES[2].encode()))
    (made / "d.JSON").write_text(json.dumps([{"text": STORIES[3]}]))
    pq.write_table(pa.Table.from_pylist([{"text": STORIES[4]}]), made / "c.parquet")
    for name in ("README.md", ".hidden.txt", "._a.jsonl", "more/e.txt"):
        (made / name).write_text("not this")
    (made / "empty.txt").touch()
    return made


def rows(spec: Any, shuffled: bool = False) -> list[str]:
    values = [row.value for row in read_rows(spec, ("text",), shuffle_shards=shuffled)]
    return [value["text"] if isinstance(value, dict) else str(value) for value in values]


def test_a_folder_is_read_by_name_or_in_an_order_of_the_seed(folder: Path) -> None:
    blocks = [[STORIES[2]], STORIES[:2], [STORIES[4]], [STORIES[3]]]
    assert rows(TrainingText(source=str(folder))) == sum(blocks, [])
    orders = [rows(TrainingText(source=str(folder), seed=seed), shuffled=True) for seed in range(12)]
    assert orders == [rows(TrainingText(source=str(folder), seed=seed), shuffled=True) for seed in range(12)]
    assert len({tuple(order) for order in orders}) > 4
    assert all(order.index(STORIES[1]) == order.index(STORIES[0]) + 1 for order in orders)
    assert all(sorted(order) == sorted(STORIES[:5]) for order in orders)


def test_mistakes_in_folders(folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    spec = CalibrationSpec(source=str(folder), samples=1, sequence_length=8)
    assert problem(load_calibration, spec, tokenizer) == (f"{folder}: is a folder; name one file in it ({ALLOWED})")
    (tmp_path / "none").mkdir()
    assert problem(packed, str(tmp_path / "none"), tokenizer, tmp_path / "p") == (
        f"{tmp_path / 'none'}: holds no text; put files into it ({ALLOWED})"
    )
    pinned = TrainingText(source=str(folder), sha256="0" * 64)
    assert problem(packed, pinned, tokenizer, tmp_path / "p") == (
        f"{folder}: is a folder, and sha256 is of one file; remove sha256"
    )


# Fingerprints


def key(text: TrainingText, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> str:
    return text_key(text, tokenizer, **{"length": 16, "sequences": 9, "assistant_only": False, **changes})


def test_a_copy_is_the_same_text_and_another_content_is_not(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text, copied = TrainingText(source=str(folder)), TrainingText(source=str(copy), name="x", licence="y", weight=2)
    assert key(text, tokenizer) == key(copied, tokenizer)
    (copy / "README.md").write_text("changed")
    assert key(text, tokenizer) == key(copied, tokenizer)
    write_jsonl(copy / "b.jsonl", STORIES[1:3])
    assert key(text, tokenizer) != key(copied, tokenizer)
    file = TrainingText(source=str(shutil.copy(folder / "b.jsonl", tmp_path / "c.jsonl")))
    before = key(file, tokenizer)
    assert key(TrainingText(source=str(folder / "b.jsonl")), tokenizer) == before
    write_jsonl(tmp_path / "c.jsonl", STORIES[:3])
    assert key(file, tokenizer) != before
    assert problem(key, TrainingText(source=str(tmp_path / "d.jsonl")), tokenizer).endswith("did you mean c.jsonl?")


def test_everything_that_decides_the_tokens_is_in_the_key(folder: Path) -> None:
    text = TrainingText(source=str(folder / "b.jsonl"))
    hub = TrainingText(source="org/text")
    plain, chatty, more, starting = (make_tokenizer() for _ in range(4))
    chatty.chat_template = CHATML
    more.add_tokens(["fox"])
    starting.eos_token = "<|im_end|>"
    keys = [
        key(text, plain), key(text, plain, length=17), key(text, plain, sequences=8),
        key(text, plain, assistant_only=True), key(text, chatty), key(text, more), key(text, starting),
        key(text, make_tokenizer("<s>")),
        *(key(text.model_copy(update=change), plain) for change in ({"seed": 1}, {"field": "text"}, {"samples": 7})),
        *(key(hub.model_copy(update=change), plain)
          for change in ({}, {"subset": "en"}, {"split": "test"}, {"revision": "v1"}, {"source": "org/other"})),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key(text.model_copy(update={"samples": 7}), plain) == key(text, plain, sequences=7)
    plain("A fox.", truncation=True, max_length=2)  # what the last call asked for is kept in the tokenizer
    assert key(text, plain) == key(text, make_tokenizer()) == keys[0]


# What the assistant says

CHATML = (  # SmolLM2
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (  # strips what it is given
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (  # asks without a generation prompt
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
R1 = (  # asks with a token that the whole does not have
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] "
    "}}{% else %}{{ '<|Assistant|>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKED_WITHOUT_END = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'Answer: ' }}"
    "{%- generation -%}{{ message['content'] }}{%- endgeneration -%}{{ eos_token }}"
    "{% else %}{{ 'Question: ' + message['content'] + '\n' }}{% endif %}{% endfor %}"
)
NO_TOKENS = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
QWEN3 = (  # the last answer alone has its reasoning
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OTHER_ROLE = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>model\n'")
CHAT = [
    {"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "  The red one. "},
    {"role": "user", "content": "assistant\nThe red one."}, {"role": "assistant", "content": "Yes: naïve ✓"},
]  # fmt: skip
FIRST, SECOND = "  The red one. ", "Yes: naïve ✓"
CASES = {
    "ChatML": (CHATML, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    "Llama 3": (LLAMA3, ["The red one.<|eot_id|>", f"{SECOND}<|eot_id|>"]),
    "Mistral": (MISTRAL, [f" {FIRST}<|endoftext|>", f" {SECOND}<|endoftext|>"]),
    "R1": (R1, [f"{FIRST}<|endoftext|>", f"{SECOND}<|endoftext|>"]),
    "marked": (MARKED, [f"{FIRST}<|im_end|>", f"{SECOND}<|im_end|>"]),
    "marked without the end": (MARKED_WITHOUT_END, [f"{FIRST}<|endoftext|>", f"{SECOND}<|endoftext|>"]),
    "no tokens": (NO_TOKENS, [f"{FIRST}\n", f"{SECOND}\n"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_assistant_says(case: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: Any) -> None:
    template, said = CASES[case]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = render(tokenizer, CHAT)
    assert [text[start:end] for start, end in assistant_spans(tokenizer, CHAT, text)] == said
    alone = render(tokenizer, CHAT[:1])
    assert assistant_spans(tokenizer, CHAT[:1], alone) == ()


@pytest.mark.parametrize("case", CASES)
def test_the_tokens_that_are_scored_hold_what_the_assistant_says(
    case: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any
) -> None:
    template, said = CASES[case]
    monkeypatch.setattr(tokenizer, "chat_template", template)
    text = render(tokenizer, CHAT)
    encoded = tokenizer(text, add_special_tokens=False)
    starts = [text.index(said[0]), text.rindex(said[1])]
    ends = [start + len(each) - 1 for start, each in zip(starts, said, strict=True)]
    expected = {
        token
        for start, end in zip(starts, ends, strict=True)
        for token in range(encoded.char_to_token(start), encoded.char_to_token(end) + 1)
    }
    ids = encoded["input_ids"]
    source = write_jsonl(tmp_path / "c.jsonl", [CHAT, CHAT], "messages")
    batch = everything(packed(source, tokenizer, tmp_path / "p", length=len(ids), assistant_only=True))
    assert batch.tokens.tolist() == [ids, ids]
    for row in batch.scored:
        assert set(row.nonzero().flatten().tolist()) == expected
    if said[0].endswith(">") and case != "marked without the end":  # there the first word has the blank before it
        assert tokenizer.decode(batch.tokens[batch.scored]) == "".join(said * 2)
    whole = everything(packed(source, tokenizer, tmp_path / "w", length=len(ids)))
    assert whole.scored[:, 1:].all() and not whole.scored[:, 0].any()


def test_a_tokenizer_whose_offsets_leave_blanks_out(tmp_path: Path) -> None:
    trimming: Any = make_tokenizer()  # as GPT-2's and Llama 3's do
    trimming.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    assert trimming("A fox", return_offsets_mapping=True)["offset_mapping"][1][0] == 2
    trimming.chat_template = CHATML
    text = render(trimming, CHAT)
    length = len(trimming(text)["input_ids"])
    source = write_jsonl(tmp_path / "c.jsonl", [CHAT], "messages")
    batch = everything(packed(source, trimming, tmp_path / "p", length=length, assistant_only=True))
    assert trimming.decode(batch.tokens[batch.scored]) == "".join(CASES["ChatML"][1])


def test_plain_texts_among_conversations_are_scored_whole(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("<s>")
    tokenizer.chat_template = CHATML
    lines = [{"text": STORIES[0]}, {"messages": CHAT}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = everything(packed(str(tmp_path / "c.jsonl"), tokenizer, tmp_path / "p", length=40, assistant_only=True))
    starts = (batch.tokens[0] == tokenizer.convert_tokens_to_ids("<s>")).tolist().index(True)
    story = tokenizer(STORIES[0])["input_ids"][1:]
    scored = batch.tokens[0][starts:][batch.scored[0][starts:]].tolist()
    assert scored[: len(story)] == story[: len(scored)]


@pytest.mark.parametrize(("template", "number"), [(QWEN3, 2), (OTHER_ROLE, 2)], ids=["reasoning", "role"])
def test_a_template_that_cannot_be_used_is_refused_by_name(
    template: str, number: int, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", template)
    source = write_jsonl(tmp_path / "c.jsonl", [CHAT], "messages")
    assert problem(packed, source, tokenizer, tmp_path / "p", assistant_only=True) == (
        f"{source}:1: the chat template of {MODEL} does not write the start of a conversation as it writes the whole "
        f"(message {number}), so what the assistant says can't be told from the rest; use assistant_only: false"
    )
    assert packed(source, tokenizer, tmp_path / "p").sequences > 0  # without, it is used


def test_an_assistant_that_speaks_first_is_left_out(tokenizer: PreTrainedTokenizerBase, monkeypatch: Any) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    renderer = Renderer(tokenizer, assistant_only=True)
    records = [Record("c:1", CHAT[1:]), Record("c:2", CHAT)]
    (document,) = renderer.render(records)
    assert [document.text[start:end] for start, end in document.assistant or ()] == CASES["ChatML"][1]
    assert renderer.warnings == (
        "1 of 2 conversations are left out because the chat template refuses them "
        "(first: c:1: the assistant speaks first, which no prompt asks for)",
    )


# Mixtures


@dataclass(frozen=True)
class Numbered:
    """A packed text without a disk: sequence n is n everywhere."""

    sequences: int
    name: str = "text"
    key: str = "k"
    sequence_length: int = 4

    def read(self, indices: Any) -> Batch:
        tokens = torch.tensor(list(indices)).view(-1, 1).expand(-1, self.sequence_length)
        return Batch(tokens, torch.zeros_like(tokens, dtype=torch.int32), torch.ones_like(tokens, dtype=torch.bool))


def mixture(*counts: int, weights: Any = None, **more: int) -> Mixture:
    texts: Any = [Numbered(count, f"t{number}", f"k{number}") for number, count in enumerate(counts)]
    usual = {"seed": 0, "batch_size": 4, "held_out": 0}
    return Mixture(texts, weights or [1.0] * len(counts), **usual | more)


WEIGHTS = st.lists(
    st.one_of(st.integers(1, 9).map(float), st.floats(0.01, 10), st.sampled_from([0.7, 0.3, 0.25])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60, deadline=None)
@given(weights=WEIGHTS)
def test_shares_are_met_to_within_one_slot_at_all_times(weights: list[float]) -> None:
    shares = whole_shares(weights)
    total = sum(shares)
    assert total <= LONGEST_CYCLE
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / total - weight / sum(weights)) <= 1 / LONGEST_CYCLE
    if total > 3000:
        shares = [max(1, share * 2000 // total) for share in shares]
        total = sum(shares)
    slots = cycle(shares)
    assert Counter(slots) == dict(enumerate(shares))
    counts = [0] * len(shares)
    for slot, number in enumerate(slots, 1):
        counts[number] += 1
        assert all(abs(count * total - slot * share) < total for count, share in zip(counts, shares, strict=True))


def test_shares_of_weights() -> None:
    assert whole_shares([1.0]) == [1] and whole_shares([2, 4.0]) == [1, 2]
    assert whole_shares([0.7, 0.3]) == [7, 3] and whole_shares([0.5, 0.25, 0.25]) == [2, 1, 1]
    assert whole_shares([1e-9, 1.0]) == [1, LONGEST_CYCLE - 1]
    assert cycle([2, 1, 1]) == [0, 1, 2, 0] or Counter(cycle([2, 1, 1])[:2])[0] == 1


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([1.0, 2.0, 0.5, 0.3]), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    batch_size=st.integers(1, 7),
    held_out=st.integers(0, 9),
)
def test_each_pass_takes_every_sequence_once(
    counts: list[int], weights: list[float], seed: int, batch_size: int, held_out: int
) -> None:
    mixed = mixture(*counts, weights=weights[: len(counts)], seed=seed, batch_size=batch_size, held_out=held_out)
    held = mixed.held_out()
    assert len(set(held)) == len(held)
    steps = 60
    taken: list[list[int]] = [[] for _ in counts]
    for step in range(steps):
        for number, index in mixed.indices(step):
            taken[number].append(index)
        for number, (count, name) in enumerate(zip(counts, mixed.names, strict=True)):
            left = count - sum(of == number for of, _ in held)
            assert mixed.passes(step + 1)[name] == len(taken[number]) / left
    for number, order in enumerate(taken):
        trained = sorted({*range(counts[number])} - {index for of, index in held if of == number})
        for start in range(0, len(order), len(trained)):
            one_pass = order[start : start + len(trained)]
            assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(trained)
    exhausted = next(
        (step for step in range(steps) if any(each > 1 for each in mixed.passes(step + 1).values())), steps
    )
    assert min(mixed.steps_before_exhausted(), steps) == exhausted


def test_a_batch_follows_from_seed_and_step_alone() -> None:
    steps = [7, 0, 1_000_000, 7, 3]
    one, other = mixture(50, 30, held_out=4), mixture(50, 30, held_out=4)
    ahead = {step: other.batch(step) for step in sorted(set(steps))}
    assert all(same(one.batch(step), ahead[step]) for step in steps)
    for steps_of_a_pass, same_order in ((range(9), True), (range(30, 39), False)):  # packing has drawn the first order
        orders = [
            [place for step in steps_of_a_pass for place in mixture(50, 30, seed=seed, held_out=4).indices(step)]
            for seed in (0, 1)
        ]
        assert (orders[0] == orders[1]) == same_order
    first, second = ([index for step in range(n, n + 10) for _, index in mixture(40).indices(step)] for n in (0, 10))
    assert first == list(range(40)) != second and sorted(second) == first
    assert one.batch(5).tokens[:, 0].tolist() == [index for _, index in one.indices(5)]


def test_steps_are_the_same_whatever_the_batch_size() -> None:
    small, large = mixture(50, 30, batch_size=2), mixture(50, 30, batch_size=6)
    assert [place for step in range(30) for place in small.indices(step)] == [
        place for step in range(10) for place in large.indices(step)
    ]


@settings(max_examples=60, deadline=None)
@given(
    sequences=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    shares=st.lists(st.integers(1, 9), min_size=5, max_size=5),
    wanted=st.integers(0, 40),
)
def test_how_many_are_held_out(sequences: list[int], shares: list[int], wanted: int) -> None:
    held = held_counts(sequences, shares[: len(sequences)], wanted)
    room = [0 if count == 1 or not wanted else max(1, count // 10) for count in sequences]
    assert all(min(1, most) <= count <= most for count, most in zip(held, room, strict=True))
    least = sum(min(1, most) for most in room)
    assert sum(held) == min(max(wanted, least), sum(room))


def test_which_are_held_out() -> None:
    assert held_counts([1000, 1000, 1000], [2, 1, 1], 16) == [8, 4, 4]
    assert held_counts([1000, 20, 1], [1, 8, 1], 16) == [14, 2, 0]
    mixed, reseeded = mixture(1000, 2, held_out=5), mixture(1000, 2, held_out=5, seed=9)
    assert mixed.held_out() == reseeded.held_out() == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    assert mixture(10, 1).held_out() == []
    assert mixed.read(mixed.held_out()).tokens[:, 0].tolist() == [0, 1, 2, 3, 0]
    assert mixture(500, held_out=5).held_out() == mixture(5000, held_out=5).held_out()  # of a longer pack too
    assert mixed.names == ["t0", "t1"] and list(mixed.passes(1)) == mixed.names


def test_what_earlier_steps_have_taken_is_skipped() -> None:
    whole, rest = mixture(50, 30, held_out=4), mixture(90, 70, held_out=4, skipped=24)
    taken = [place for step in range(6) for place in whole.indices(step)]
    after = [place for step in range(6) for place in rest.indices(step)]
    assert not set(taken) & set(after) and not set(rest.held_out()) & {*taken, *after}
    both = [place for step in range(12) for place in mixture(90, 70, held_out=4).indices(step)]
    assert taken + after == both
    assert rest.passes(6) == mixture(90, 70, held_out=4).passes(12)
    assert rest.steps_before_exhausted() == mixture(90, 70, held_out=4).steps_before_exhausted() - 6


def test_a_mixture_of_texts_on_disk(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", STORIES[n * 20 : n * 20 + 20]) for n in range(2)]
    texts = [packed(source, tokenizer, tmp_path / f"p{n}", key=f"k{n}") for n, source in enumerate(sources)]
    mixed = Mixture(texts, [3.0, 1.0], seed=1, batch_size=8, held_out=4)
    before = mixed.batch(11)
    again = Mixture(
        [packed(source, tokenizer, tmp_path / f"p{n}", key=f"k{n}") for n, source in enumerate(sources)],
        [3.0, 1.0], seed=1, batch_size=8, held_out=4,
    )  # fmt: skip
    assert same(again.batch(11), before)
    for row, (number, index) in enumerate(mixed.indices(11)):
        alone = texts[number].read([index])
        assert torch.equal(alone.tokens[0], before.tokens[row]) and torch.equal(alone.scored[0], before.scored[row])
        assert torch.equal(alone.documents[0], before.documents[row])
    assert Counter(number for number, _ in mixed.indices(11)) == {0: 6, 1: 2}
    assert mixed.tokens(5) == 5 * 8 * 16
    other = replace(texts[1], sequence_length=32)
    assert problem(Mixture, [texts[0], other], [1.0, 1.0], seed=0, batch_size=1, held_out=0) == (
        "0.jsonl has sequences of 16 tokens and 1.jsonl of 32; give all texts one sequence_length"
    )


def test_a_million_steps_cost_nothing() -> None:
    mixed = mixture(50_000, 20_000, 3, weights=[0.61, 0.29, 0.1], batch_size=16)
    assert mixed.passes(10**6)["t2"] == 16 * 10**5 / 3
    assert len(mixed.indices(10**9)) == 16
    assert mixed.steps_before_exhausted() == 2  # 3 sequences of t2 in 32 slots, and a fourth in 48


def test_what_is_said_of_passes() -> None:
    assert words({"a": 0.2, "b": 1.0}) == []
    assert words({"a": 1.25, "b": 4.0, "c": 12.34}) == [
        "a: has fewer tokens than are trained on, and is gone through 1.2 times",
        "b: has fewer tokens than are trained on, and is gone through 4.0 times",
        "c: is gone through 12.3 times; from about 4 passes on repeats help little, and many hurt (arXiv 2305.16264): "
        "add text or train on fewer tokens",
    ]
