"""The one line that each mistake in calibration text gets."""

import gzip
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from compress.data import sources
from compress.data.calibration import load_calibration, load_windows
from compress.errors import CalibrationError
from compress.recipe.text import CalibrationSpec

MODEL = Path(__file__).parent.parent / "models" / "tiny-wiki-llama"
ALLOWED = ".jsonl, .json, .parquet, .txt, each also .gz"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that messages name short relative paths."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spec(source: str, **changes: Any) -> CalibrationSpec:
    return CalibrationSpec(**{"source": source, "samples": 4, "sequence_length": 16, **changes})


def message(call: Callable[[], object]) -> str:
    with pytest.raises(CalibrationError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return bytes(sink.getvalue())


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("c.jsonl", b"", "c.jsonl: is empty; put text into it or name another file"),
    "blank": ("c.jsonl", b"\n \n", "c.jsonl: holds no text; name a source with more of it"),
    "blank json": ("c.json", b"\n", "c.json: holds no text; name a source with more of it"),
    "suffix": ("./c.csv", b"text\nfox\n", f"c.csv: unknown suffix .csv; allowed: {ALLOWED}"),
    "packed suffix": ("./c.csv.gz", b"fox", f"c.csv.gz: unknown suffix .csv.gz; allowed: {ALLOWED}"),
    "no suffix": ("./c", b"fox", f"c: unknown suffix none; allowed: {ALLOWED}"),
    "gz alone": ("./c.gz", b"fox", f"c.gz: unknown suffix .gz; allowed: {ALLOWED}"),
    "encoding": ("c.txt", b"a fox\nna\xefve", "c.txt: not UTF-8 at byte 8 (0xef); save the file as UTF-8"),
    "packed encoding": (
        "c.txt.gz",
        gzip.compress(b"\xff\xfea\x00"),
        "c.txt.gz: not UTF-8 at byte 0 of its content (0xff); save the file as UTF-8",
    ),
    "json line": (
        "c.jsonl",
        b'{"text": "fox"}\n{"text": fox}\n',
        "c.jsonl:2: invalid JSON (Expecting value at column 10); write one object per line",
    ),
    "json array": (
        "c.json",
        b'\n[{"text": "fox"},\n {"text": dog}]',
        "c.json:3: invalid JSON (Expecting value at column 11); write an array of objects",
    ),
    "pretty object": (
        "c.json",
        b'{\n "text": "fox"\n}',
        "c.json:1: invalid JSON (Expecting property name enclosed in double quotes at column 2); "
        "write one object per line",
    ),
    "no field": (
        "c.jsonl",
        b'{"id": 1, "body": "fox"}\n',
        "c.jsonl:1: no text field (text, content, messages, conversations); fields found: id, body; "
        "choose one with `field`",
    ),
    "number": ("c.jsonl", b'{"text": 7}', "c.jsonl:1: field 'text' is 7; a text or a list of messages is needed"),
    "bare number": ("c.json", b"[7]", "c.json item 1: row is 7; a text or a list of messages is needed"),
    "message keys": (
        "c.jsonl",
        b'{"messages": [{"speaker": "a", "words": "fox"}]}',
        "c.jsonl:1: field 'messages': message 1 has no role and content (or from and value); "
        "keys found: speaker, words",
    ),
    "message text": (
        "c.jsonl",
        b'{"messages": [{"role": "user", "content": "fox"}, "dog"]}',
        "c.jsonl:1: field 'messages': message 2 has no role and content (or from and value); found 'dog'",
    ),
    "list of strings": (
        "c.jsonl",
        b'{"id": 1, "text": ["A fox.", "A dog."]}',
        "c.jsonl:1: field 'text' is a list of strings, which may be passages or turns; write one text, or messages "
        "with role and content",
    ),
    "turns without roles": (
        "c.jsonl",
        b'{"id": 1, "turns": ["Which fox?", "Which dog?"]}',
        "c.jsonl:1: no text field (text, content, messages, conversations); fields found: id, turns; "
        "choose one with `field`",
    ),
    "list of conversations": (
        "c.jsonl",
        b'{"messages": [[{"role": "user", "content": "fox"}]]}',
        "c.jsonl:1: field 'messages': message 1 has no role and content (or from and value); "
        "found [{'role': 'user', 'content': 'fox'}]",
    ),
    "image in a message": (
        "c.jsonl",
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "fox"}, {"type": "image"}]}]}',
        "c.jsonl:1: field 'messages': message 1: its content has a part of type image; only text can be used",
    ),
    "mapping in a message": (
        "c.jsonl",
        b'{"messages": [{"role": "user", "content": {"parts": ["fox"]}}]}',
        "c.jsonl:1: field 'messages': message 1: its content is {'parts': ['fox']}; "
        "a text or a list of texts is needed",
    ),
    "role that is no text": (
        "c.jsonl",
        b'{"conversations": [{"from": ["human"], "value": "fox"}]}',
        "c.jsonl:1: field 'conversations': message 1: its role is ['human']; a text is needed",
    ),
    "tool calls that are no list": (
        "c.jsonl",
        b'{"messages": [{"role": "assistant", "content": null, "tool_calls": "find(fox)"}]}',
        "c.jsonl:1: field 'messages': message 1: its tool_calls are 'find(fox)'; a list is needed",
    ),
    "conversation cut off": (
        "c.jsonl",
        b'{"messages": "[{\\"role\\": \\"user\\", \\"content\\": \\"fo"}',
        "c.jsonl:1: field 'messages' starts as a list of messages and is not whole JSON; write a list or its JSON",
    ),
    "mapping": (
        "c.jsonl",
        b'{"text": {"en": "fox"}}',
        "c.jsonl:1: field 'text' is {'en': 'fox'}; a text or a list of messages is needed",
    ),
    "answer that is no text": (
        "c.jsonl",
        b'{"question": "Which fox?", "answer": {"text": ["red"]}}',
        "c.jsonl:1: field 'answer' is {'text': ['red']}; a text is needed",
    ),
    "prompts alone": (
        "c.jsonl",
        b'{"prompt": "Which fox?"}',
        "c.jsonl:1: no text field (text, content, messages, conversations); fields found: prompt; "
        "choose one with `field`",
    ),
    "parquet field": (
        "c.parquet",
        parquet_bytes([{"id": 1, "body": "fox"}]),
        "c.parquet row 1: no text field (text, content, messages, conversations); fields found: id, body; "
        "choose one with `field`",
    ),
    "not gzip": (
        "c.txt.gz",
        b"a fox",
        "c.txt.gz: not a whole gzip file (Not a gzipped file (b'a ')); download or pack it again",
    ),
    "cut gzip": (
        "c.txt.gz",
        gzip.compress(b"The fox ran over the hills.\n" * 50)[:-9],
        "c.txt.gz: not a whole gzip file (Compressed file ended before the end-of-stream marker was reached); "
        "download or pack it again",
    ),
    "short": (
        "c.txt",
        b"the the the",
        "c.txt: 3 tokens are fewer than one sequence of 16; add text or use sequence_length: 2",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gets_one_line(folder: Path, tokenizer: Any, case: str) -> None:
    source, data, line = BAD_FILES[case]
    Path(source).write_bytes(data)
    assert message(lambda: load_calibration(spec(source), tokenizer)) == line


def test_a_named_field_that_is_missing_says_what_is_there(folder: Path, tokenizer: Any) -> None:
    Path("c.jsonl").write_bytes(b'{"id": 1, "text": "fox"}\n')
    line = message(lambda: load_calibration(spec("c.jsonl", field="body"), tokenizer))
    assert line == "c.jsonl:1: no field 'body'; fields found: id, text"


def test_a_missing_file_names_its_neighbours(folder: Path, tokenizer: Any) -> None:
    Path("stories.jsonl.gz").write_bytes(b"x")
    missing = {
        "storys.jsonl.gz": "storys.jsonl.gz: no such file; did you mean stories.jsonl.gz?",
        "q.txt": "q.txt: no such file; correct the path (relative ones start at the spec)",
        "data/q.txt": "data/q.txt: no such file; there is no folder data",
    }
    for source, line in missing.items():
        assert message(lambda source=source: load_calibration(spec(source), tokenizer)) == line


def test_a_folder_is_refused(folder: Path, tokenizer: Any) -> None:
    Path("texts").mkdir()
    line = f"texts: is a folder; name one file in it ({ALLOWED})"
    assert message(lambda: load_calibration(spec("texts"), tokenizer)) == line
    assert message(lambda: load_calibration(spec("./texts"), tokenizer)) == line


def test_another_checksum_is_refused_before_reading(folder: Path, tokenizer: Any) -> None:
    Path("c.jsonl").write_bytes(b"{broken")
    actual = hashlib.sha256(b"{broken").hexdigest()
    assert message(lambda: load_calibration(spec("c.jsonl", sha256="0" * 64), tokenizer)) == (
        f"c.jsonl: sha256 is {actual} and should be {'0' * 64}; "
        "get the original file again, or correct sha256 if the change is meant"
    )
    assert "invalid JSON" in message(lambda: load_calibration(spec("c.jsonl", sha256=actual), tokenizer))


@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_parquet_file_is_named(folder: Path, tokenizer: Any, packed: bool) -> None:
    data = parquet_bytes([{"id": 1, "text": "fox"}])[:-20]
    source = "c.parquet" + ".gz" * packed
    Path(source).write_bytes(gzip.compress(data) if packed else data)
    line = message(lambda: load_calibration(spec(source), tokenizer))
    assert re.fullmatch(rf"{source}: not a readable parquet file \(.+\); download or write it again", line)


def test_a_file_that_cannot_be_read_is_named(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("c.txt").write_bytes(b"fox")

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sources, "_open", refuse)
    assert message(lambda: load_calibration(spec("c.txt"), tokenizer)) == "c.txt: can't be read (Permission denied)"


def test_a_text_shorter_than_a_window_says_what_would_work(folder: Path, tokenizer: Any) -> None:
    Path("t.txt").write_text("The fox ran over the hills. " * 10)
    count = len(tokenizer(Path("t.txt").read_text())["input_ids"])
    works = 2 ** int(math.log2(count))
    line = message(lambda: load_windows("t.txt", tokenizer, sequence_length=2048, windows=1))
    remedy = f"add text or use sequence_length: {works}"
    assert line == f"t.txt: {count} tokens are fewer than one sequence of 2048; {remedy}"
    assert load_windows("t.txt", tokenizer, sequence_length=works, windows=1).sequences == 1
    Path("t.txt").write_text(" \n")
    line = "t.txt: holds no text; name a source with more of it"
    assert message(lambda: load_windows("t.txt", tokenizer, sequence_length=2, windows=1)) == line


def test_a_hub_dataset_that_cannot_be_read_gets_one_line(folder: Path, tokenizer: Any, monkeypatch: Any) -> None:
    Path("train.jsonl").write_bytes(b'{"text": "fox"}\n')
    real = datasets.load_dataset

    def from_folder(source: str, *args: Any, **options: Any) -> Any:
        return real(str(folder), *args, **options)

    def offline(source: str, *args: Any, **options: Any) -> Any:
        raise ConnectionError(f"Couldn't reach '{source}' on the Hub (OfflineModeIsEnabled)\nsecond line")

    start = "team/corpus: can't be read from the hub ("
    end = f"); check the dataset's id, subset, split and the connection, or use a local file ({ALLOWED})"
    monkeypatch.setattr(datasets, "load_dataset", offline)
    line = message(lambda: load_calibration(spec("team/corpus"), tokenizer))
    assert line == f"{start}Couldn't reach 'team/corpus' on the Hub (OfflineModeIsEnabled){end}"
    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    line = message(lambda: load_calibration(spec("team/corpus", split="nope"), tokenizer))
    assert line.startswith(f"{start}Bad split: nope.")
    assert line.endswith(end)
    Path("train.jsonl").write_bytes(b'{"text": fox\n')
    line = message(lambda: load_calibration(spec("team/corpus"), tokenizer))
    assert line.startswith(start)
    assert line.endswith(end)
