"""Calibration and evaluation text: sources, documents, packing, bundled specs."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from compress.data import documents, sources
from compress.data.calibration import TokenSet, load_calibration, load_windows
from compress.data.documents import Document, Record, Renderer, shuffle
from compress.data.packing import collect_tokens, cut_sequences, text_prefix
from compress.errors import CalibrationError
from compress.recipe.load import load_calibration_spec
from compress.recipe.schema import bundled_dir
from compress.recipe.text import CalibrationSpec

MODEL = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|endoftext|>' + m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
)
STORIES = [f"Story {n}: the {n * 7}th fox ran over {n} hills and met {n + 1} dogs." for n in range(40)]


def load_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer()


@pytest.fixture(scope="module")
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Adds a BOS token to every text, as Llama's does."""
    tokenizer = load_tokenizer()
    bos = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    assert tokenizer("fox")["input_ids"][0] == bos[1]
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages name short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def spec(source: str, **changes: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"source": source, "samples": 4, "sequence_length": 16, **changes})


def documents_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]


# Packing


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=60), max_size=150),
    samples=st.integers(1, 6),
    sequence_length=st.integers(2, 40),
)
@pytest.mark.parametrize("fixture", ["tokenizer", "bos_tokenizer"])
def test_packed_sequences_are_a_prefix_of_the_concatenated_documents(
    fixture: str, request: pytest.FixtureRequest, texts: list[str], samples: int, sequence_length: int
) -> None:
    tokenizer = request.getfixturevalue(fixture)
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    reference = sum(documents_of(tokenizer, texts), [])[: samples * sequence_length]
    tokens = collect_tokens([Document(text, True) for text in texts], tokenizer, samples * sequence_length)
    packed = cut_sequences(tokens, sequence_length)
    assert tokens.tolist() == reference
    assert packed.shape == (len(reference) // sequence_length, sequence_length)
    assert packed.flatten().tolist() == reference[: packed.numel()]


def test_collect_tokens_stops_reading_when_it_has_enough(tokenizer: PreTrainedTokenizerBase) -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(1)
            yield Document("The fox ran over the hills.", True)

    assert len(collect_tokens(endless(), tokenizer, 100)) == 100
    assert len(read) <= 65


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 60), seed=st.integers(0, 2**40), rows=st.integers(1, 80), characters=st.integers(1, 200))
def test_shuffle_is_a_permutation_that_the_seed_fixes(count: int, seed: int, rows: int, characters: int) -> None:
    records = [Record(f"f:{n}", "x" * (n % 9) + str(n)) for n in range(count)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BUFFER_ROWS", rows)
        patch.setattr(documents, "BUFFER_CHARACTERS", characters)
        order = list(shuffle(records, seed))
        assert order == list(shuffle(records, seed))
    assert sorted(order) == sorted(records)


def test_shuffle_holds_no_more_than_its_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BUFFER_CHARACTERS", 1000)
    read = []
    first = next(shuffle((read.append(n) or Record(f"f:{n}", "x" * 100) for n in range(10**9)), seed=0))
    assert first in [Record(f"f:{n}", "x" * 100) for n in range(10)]
    assert len(read) == 10


def test_same_seed_gives_the_same_tokens_and_another_seed_others(folder: Path, tokenizer: Any) -> None:
    Path("s.jsonl").write_bytes(jsonl([{"text": text} for text in STORIES]))
    one, again, other = (load_calibration(spec("s.jsonl", seed=seed), tokenizer) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, again.tokens)
    assert one.sha256 == again.sha256 != other.sha256
    first_stories = sum(documents_of(tokenizer, STORIES), [])[: one.count]
    assert one.tokens.flatten().tolist() != first_stories


def test_token_set_digest_covers_ids_and_shape() -> None:
    ids = torch.arange(12)
    shapes = [TokenSet(ids.view(shape), name="n", source="s", licence=None) for shape in [(3, 4), (4, 3)]]
    assert (
        shapes[0].sha256 == hashlib.sha256(b"3x4:" + b"".join(n.to_bytes(8, "little") for n in range(12))).hexdigest()
    )
    assert shapes[0].sha256 != shapes[1].sha256
    assert (shapes[0].sequences, shapes[0].sequence_length, shapes[0].count) == (3, 4, 12)


# Sources


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=7)
    return bytes(sink.getvalue())


ROWS = [{"id": n, "text": text} for n, text in enumerate(STORIES)]
FORMATS = {
    "s.jsonl": jsonl(ROWS),
    "blank_lines.jsonl": b"\r\n" + jsonl(ROWS).replace(b"\n", b"\r\n\r\n"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(ROWS),
    "strings.jsonl": jsonl(STORIES),
    "content.jsonl": jsonl([{"content": text} for text in STORIES]),
    "lines.json": jsonl(ROWS),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "strings.json": json.dumps(STORIES).encode(),
    "s.parquet": parquet_bytes(ROWS),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_tokens(folder: Path, tokenizer: Any, name: str, packed: bool) -> None:
    data = FORMATS[name]
    Path(name + ".gz" * packed).write_bytes(gzip.compress(data) if packed else data)
    Path("reference.jsonl").write_bytes(FORMATS["s.jsonl"])
    loaded = load_calibration(spec(name + ".gz" * packed), tokenizer)
    assert torch.equal(loaded.tokens, load_calibration(spec("reference.jsonl"), tokenizer).tokens)
    assert loaded.tokens.dtype == torch.int64
    assert loaded.tokens.shape == (4, 16)
    assert loaded.warnings == ()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_rows_join_to_the_file(folder: Path, packed: bool, newline: str) -> None:
    text = " \n".join(f"= {n} =\n" + "The fox ran over the hills.\n" * (n * 40) for n in range(40)) + "\n \n" * 9000
    path = Path("t.txt" + ".gz" * packed)
    data = text.replace("\n", newline).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    rows = list(sources.read_rows(spec(str(path)), (), shuffle_shards=False))
    assert "".join(str(row.value) for row in rows) == text
    assert len(rows) > 20
    assert all(str(row.value).endswith("\n \n") for row in rows)
    lines = text.split("\n")
    assert [lines[int(row.where.split(":")[1]) - 1] for row in rows] == [str(r.value).split("\n")[0] for r in rows]


def test_a_field_can_be_named(folder: Path, tokenizer: Any) -> None:
    Path("s.jsonl").write_bytes(jsonl([{"text": "no", "body": text} for text in STORIES]))
    Path("reference.jsonl").write_bytes(FORMATS["s.jsonl"])
    named = load_calibration(spec("s.jsonl", field="body"), tokenizer)
    assert torch.equal(named.tokens, load_calibration(spec("reference.jsonl"), tokenizer).tokens)


def test_null_and_blank_rows_are_passed_over_and_lone_surrogates_replaced(folder: Path, tokenizer: Any) -> None:
    Path("s.jsonl").write_text('{"text": null}\n{"text": " "}\n{"text": ""}\n{"text": "fox \\ud800 dog"}\n')
    loaded = load_calibration(spec("s.jsonl", samples=1, sequence_length=2), tokenizer)
    assert loaded.tokens[0].tolist() == tokenizer("fox ? dog")["input_ids"][:2]


def test_fewer_tokens_than_asked_is_a_warning(folder: Path, tokenizer: Any) -> None:
    Path("s.jsonl").write_bytes(FORMATS["s.jsonl"])
    count = sum(map(len, documents_of(tokenizer, STORIES)))
    loaded = load_calibration(spec("s.jsonl", samples=1000, licence="CC0", name="stories"), tokenizer)
    assert loaded.sequences == count // 16
    asked = "stories: 1000 sequences of 16 tokens were asked for"
    assert loaded.warnings == (f"{asked} and its {count} tokens fill {count // 16}; those are used",)
    assert (loaded.name, loaded.source, loaded.licence) == ("stories", "s.jsonl", "CC0")


# Hub datasets: a real local dataset folder stands in for the hub, behind the real `datasets` streaming code


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    shards = folder / "shards"
    shards.mkdir()
    for shard in range(4):
        (shards / f"train-{shard}.jsonl").write_bytes(jsonl(ROWS[shard * 10 : shard * 10 + 10]))
    real = datasets.load_dataset

    def from_folder(source: str, *args: Any, **options: Any) -> Any:
        assert source == "team/corpus"
        assert options["streaming"]
        return real(str(shards), *args, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    return "team/corpus"


def test_a_hub_dataset_streams(hub: str, tokenizer: Any) -> None:
    everything = spec(hub, samples=1000, sequence_length=2)
    one, again, other = (load_calibration(spec(hub, seed=seed), tokenizer) for seed in (0, 0, 1))
    assert one.sha256 == again.sha256 != other.sha256
    assert one.source == hub
    count = sum(map(len, documents_of(tokenizer, STORIES)))
    assert load_calibration(everything, tokenizer).count == count // 2 * 2


# Conversations

ROLES = [{"role": "user", "content": "Which fox?"}, {"role": "assistant", "content": "The red one."}]
SHAREGPT = [{"from": "human", "value": "Which fox?"}, {"from": "gpt", "value": "The red one."}]
RENDERED = "<|endoftext|>user: Which fox?\n<|endoftext|>assistant: The red one.\n"


@pytest.fixture
def chat_tokenizer(bos_tokenizer: PreTrainedTokenizerBase, monkeypatch: Any) -> PreTrainedTokenizerBase:
    monkeypatch.setattr(bos_tokenizer, "chat_template", CHAT_TEMPLATE)
    return bos_tokenizer


@pytest.mark.parametrize("row", [{"messages": ROLES}, {"conversations": SHAREGPT}, {"conversations": ROLES}])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_conversations_use_the_chat_template_once(folder: Path, chat_tokenizer: Any, row: Any, kind: str) -> None:
    rows = [row] * 10
    Path(f"c.{kind}").write_bytes(jsonl(rows) if kind == "jsonl" else parquet_bytes(rows))
    loaded = load_calibration(spec(f"c.{kind}"), chat_tokenizer)
    ids = chat_tokenizer(RENDERED, add_special_tokens=False)["input_ids"]  # no BOS before the template's own
    assert loaded.tokens[0].tolist() == (ids * 10)[:16]
    assert loaded.tokens[1].tolist() == [ids[0], *(ids * 10)[16:31]]  # which starts within a conversation
    assert loaded.warnings == ()


def test_texts_and_conversations_keep_their_own_special_tokens(chat_tokenizer: Any) -> None:
    records = [Record("c:1", "The fox."), Record("c:2", ROLES), Record("c:3", "A dog.")]
    tokens = collect_tokens(Renderer(chat_tokenizer).render(records), chat_tokenizer, 10**6)
    plain = [chat_tokenizer(text)["input_ids"] for text in ("The fox.", "A dog.")]
    assert tokens.tolist() == plain[0] + chat_tokenizer(RENDERED, add_special_tokens=False)["input_ids"] + plain[1]


def test_conversations_without_a_chat_template_are_plain_text(folder: Path, tokenizer: Any) -> None:
    Path("c.jsonl").write_bytes(jsonl([{"messages": ROLES}] * 20))
    loaded = load_calibration(spec("c.jsonl"), tokenizer)
    assert loaded.tokens.flatten().tolist() == (tokenizer("Which fox?\n\nThe red one.")["input_ids"] * 20)[:64]
    assert loaded.warnings == (
        "this tokenizer has no chat template: conversations are used as plain text, without roles",
    )


def test_conversations_that_the_template_refuses_are_left_out(folder: Path, chat_tokenizer: Any) -> None:
    refused = {"messages": [{"role": "system", "content": "Be a fox."}, *ROLES]}
    Path("c.jsonl").write_bytes(jsonl([{"messages": ROLES}] * 9 + [refused]))
    loaded = load_calibration(spec("c.jsonl", samples=10**4, sequence_length=2), chat_tokenizer)
    texts = [i for i in chat_tokenizer(RENDERED, add_special_tokens=False)["input_ids"] if i != loaded.tokens[0, 0]]
    assert loaded.tokens[:, 1].tolist() == texts * 9  # behind BOS each
    reason = "are left out because the chat template refuses them"
    assert loaded.warnings[1:] == (f"1 of 10 conversations {reason} (first: c.jsonl:10: no system role)",)
    Path("c.jsonl").write_bytes(jsonl([refused]))
    with pytest.raises(CalibrationError) as caught:
        load_calibration(spec("c.jsonl"), chat_tokenizer)
    assert str(caught.value) == (
        f"c.jsonl: holds no text; name a source with more of it; 1 of 1 conversations {reason} "
        "(first: c.jsonl:1: no system role)"
    )


# What every sequence starts with


def adding(single: str) -> PreTrainedTokenizerBase:
    """A tokenizer that puts special tokens around a text, such as `<|endoftext|> $A`."""
    tokenizer = load_tokenizer()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|endoftext|>", "the") if name in single]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


def test_the_prefix_is_what_the_tokenizer_does_not_what_it_says(tokenizer: Any) -> None:
    bos, other = (tokenizer.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "the"))
    assert text_prefix(tokenizer) == []
    assert text_prefix(adding("<|endoftext|> $A")) == [bos]
    assert text_prefix(adding("$A <|endoftext|>")) == []
    assert text_prefix(adding("<|endoftext|> the $A <|endoftext|>")) == [bos, other]
    assert tokenizer.bos_token_id == bos  # which it has and adds nowhere


@pytest.mark.parametrize("single", ["<|endoftext|> $A", "<|endoftext|> the $A", "<|endoftext|> $A <|endoftext|>"])
def test_every_window_starts_as_the_tokenizer_starts_a_text(single: str) -> None:
    """The text goes on where the window before ended: nothing of it is lost or twice."""
    adds = adding(single)
    text = unpacked(bundled_dir("calibration") / "text" / "wikitext2_raw_test.txt.gz")
    bare, front = adds(text, add_special_tokens=False, verbose=False)["input_ids"], text_prefix(adds)
    room = 128 - len(front)
    loaded = load_windows("wikitext2", adds, sequence_length=128, windows=5)
    assert loaded.tokens.tolist() == [front + bare[n * room : (n + 1) * room] for n in range(5)]
    assert loaded.prefix == tuple(adds.convert_ids_to_tokens(front))
    whole = load_windows("wikitext2", adds, sequence_length=128, windows=None)
    ending = len(adds("a")["input_ids"]) - len(front) - 1
    assert whole.sequences == (len(bare) + ending) // room


def test_every_calibration_sequence_starts_with_bos_and_documents_keep_theirs(
    folder: Path, bos_tokenizer: PreTrainedTokenizerBase
) -> None:
    Path("s.jsonl").write_bytes(jsonl(STORIES))
    loaded = load_calibration(spec("s.jsonl"), bos_tokenizer)
    order = [record.content for record in shuffle([Record("", story) for story in STORIES], 0)]
    stream, bos = sum(documents_of(bos_tokenizer, order), []), 0
    expected = []
    for _ in range(4):
        taken = stream[:16] if stream[0] == bos else [bos, *stream[:15]]
        stream = stream[16 if stream[0] == bos else 15 :]
        expected.append(taken)
    assert loaded.tokens.tolist() == expected
    assert loaded.prefix == ("<|endoftext|>",)


def test_a_sequence_that_starts_at_a_document_has_one_bos() -> None:
    stream = torch.tensor([0, 5, 6, 7, 0, 8, 9, 10, 11])
    assert cut_sequences(stream, 4, [0]).tolist() == [[0, 5, 6, 7], [0, 8, 9, 10]]
    assert cut_sequences(stream, 3, [0]).tolist() == [[0, 5, 6], [0, 7, 0], [0, 8, 9], [0, 10, 11]]
    assert cut_sequences(stream[1:], 3, [0, 1]).tolist() == [[0, 1, n] for n in (5, 6, 7, 0, 8, 9, 10, 11)]
    assert cut_sequences(stream[:3], 4, [0]).shape == (0, 4)


def test_a_prefix_that_leaves_no_room_is_refused(folder: Path) -> None:
    Path("s.jsonl").write_bytes(jsonl(STORIES))
    with pytest.raises(CalibrationError) as caught:
        load_windows("s.jsonl", adding("<|endoftext|> the $A"), sequence_length=2, windows=1)
    assert str(caught.value) == (
        "sequence_length: 2 has no room for text behind the <|endoftext|> the that the tokenizer puts in front of it; "
        "use 3 or more"
    )


# Evaluation windows


def unpacked(path: Path) -> str:
    return gzip.decompress(path.read_bytes()).decode()


def test_windows_equal_an_independent_computation(tokenizer: Any) -> None:
    text = unpacked(bundled_dir("calibration") / "text" / "wikitext2_raw_test.txt.gz")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    everything = load_windows("wikitext2", tokenizer, sequence_length=512, windows=None)
    count = len(ids) // 512
    assert torch.equal(everything.tokens, ids[: count * 512].view(count, 512))
    some = load_windows("wikitext2", tokenizer, sequence_length=128, windows=5)
    assert torch.equal(some.tokens, ids[: 5 * 128].view(5, 128))
    assert (some.name, some.warnings) == ("wikitext2", ())
    assert "CC BY-SA 3.0" in str(some.licence)


def test_windows_of_documents_join_them_by_blank_lines(folder: Path, tokenizer: Any) -> None:
    Path("s.jsonl").write_bytes(FORMATS["s.jsonl"])
    ids = tokenizer("\n\n".join(STORIES))["input_ids"]
    loaded = load_windows("s.jsonl", tokenizer, sequence_length=10, windows=None)
    assert loaded.tokens.flatten().tolist() == ids[: len(ids) // 10 * 10]
    Path("spec.yaml").write_text("source: s.jsonl\nlicence: CC0\n")
    from_spec = load_windows("spec.yaml", tokenizer, sequence_length=10, windows=3)
    assert torch.equal(from_spec.tokens, loaded.tokens[:3])
    assert from_spec.licence == "CC0"


def test_fewer_windows_than_asked_is_a_warning(folder: Path, tokenizer: Any) -> None:
    Path("t.txt").write_text("The fox ran over the hills. " * 10)
    count = len(tokenizer(Path("t.txt").read_text())["input_ids"])
    loaded = load_windows("t.txt", tokenizer, sequence_length=count // 2, windows=64)
    assert loaded.sequences == 2
    asked = f"t.txt: 64 sequences of {count // 2} tokens were asked for"
    assert loaded.warnings == (f"{asked} and its {count} tokens fill 2; those are used",)


# Bundled text


@pytest.mark.parametrize(
    ("name", "samples", "sequence_length"), [("general_en", 128, 2048), ("general_en_small", 32, 512)]
)
def test_bundled_calibration_fills_its_spec(tokenizer: Any, name: str, samples: int, sequence_length: int) -> None:
    bundled = load_calibration_spec(name, base=Path())
    loaded = load_calibration(bundled, tokenizer)
    assert loaded.tokens.shape == (samples, sequence_length)
    assert loaded.warnings == ()
    assert loaded.name == name
    assert "ODC-BY" in str(loaded.licence)


@pytest.mark.parametrize("name", ["general_en", "general_en_small", "wikitext2"])
def test_bundled_checksums_match(name: str) -> None:
    bundled = load_calibration_spec(name, base=Path())
    path = Path(bundled.source)
    assert bundled.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name in (path.parent / "README.md").read_text()


def test_bundled_calibration_and_evaluation_text_share_no_13_words() -> None:
    folder = bundled_dir("calibration") / "text"

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall("[a-z0-9]+", text.lower())
        return set(zip(*(words[start:] for start in range(13)), strict=False))

    evaluation = runs(unpacked(folder / "wikitext2_raw_test.txt.gz"))
    assert len(evaluation) > 100_000
    rows = [json.loads(line) for line in unpacked(folder / "general_en.jsonl.gz").split("\n")[:-1]]
    assert all(set(row) == {"text", "url"} for row in rows)
    assert not any(evaluation & runs(row["text"]) for row in rows)
