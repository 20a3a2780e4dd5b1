"""`dscompress export` and `compress.export`: what they write, print and refuse."""

from pathlib import Path
from typing import Any

import pytest
from command import invoke
from random_models import make_model

import compress
from compress.errors import UserError
from compress.evaluation.llama_cpp import llama_cpp_missing
from compress.model.gguf.header import open_gguf
from compress.system.progress import Reporter


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")
def test_the_command_says_what_it_wrote_and_what_llama_cpp_reads(here: Path, tiny_model: Path) -> None:
    done = invoke("export", tiny_model, "--to", "gguf")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    size = (here / "tiny-wiki-llama.gguf").stat().st_size
    assert lines[0] == f"file        {here / 'tiny-wiki-llama.gguf'}"
    assert lines[1] == f"size        11.7 MB ({size:,} bytes)"
    assert lines[2] == "tensors     43 BF16, 13 F32"
    assert lines[3].startswith("ok   tokens: the same in ")
    assert lines[4].startswith("ok   llama.cpp: xllamacpp ")
    assert lines[5].startswith("speed       ")
    assert "writing tiny-wiki-llama.gguf: 56/56 tensors" in done.stderr


def test_the_file_can_be_named_and_have_a_type_and_parts(here: Path) -> None:
    model = make_model(here / "model")
    done = invoke("export", model, "--to", "gguf", "--type", "q8_0", "-o", "deep/er/out.gguf", "--no-check", "-q")
    assert done.exit_code == 0 and done.stderr == ""
    assert done.stdout.splitlines()[0] == f"file        {here / 'deep/er/out.gguf'}"
    assert open_gguf(here / "deep/er/out.gguf").keys["general.file_type"] == 7
    parts = invoke("export", model, "--to", "gguf", "--split", "200kB", "--type", "f16", "--no-check", "-q")
    assert parts.exit_code == 0, parts.stderr
    assert [line.split()[1] for line in parts.stdout.splitlines()[:3]] == [
        str(here / f"model-F16-0000{number}-of-00003.gguf") for number in (1, 2, 3)
    ]


MISTAKES: dict[str, tuple[list[str], str]] = {
    "another program": (["model", "--to", "mlx"], "--to mlx: is not known; use gguf, onnx, openvino"),
    "another type": (
        ["model", "--to", "gguf", "--type", "q4_k"],
        "--type q4_k: is not known; use auto, f32, bf16, f16, q8_0",
    ),
    "no checkpoint": (["empty", "--to", "gguf"], "empty: no config.json, so this is no Hugging Face model folder"),
    "nothing there": (["./nowhere", "--to", "gguf"], "model: ./nowhere does not exist"),
    "a folder": (["model", "--to", "gguf", "-o", "empty"], "empty: is a folder; name a file, like empty/model.gguf"),
    "no size": (["model", "--to", "gguf", "--split", "big"], "--split big: is no size; write it like 4GB"),
    "a foreign file": (["model", "--to", "gguf", "-o", "text"], "text: exists, and was not written by dscompress"),
    "below a file": (["model", "--to", "gguf", "-o", "text/x.gguf"], "text: a file is where a folder should be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, here: Path) -> None:
    make_model(here / "model")
    (here / "empty").mkdir()
    (here / "text").write_text("precious")
    arguments, message = MISTAKES[name]
    done = invoke("export", *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in here.iterdir()) == ["empty", "model", "text"]


def test_without_the_gguf_package(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--to gguf: gguf is not installed; pip install 'dscompress\[gguf\]'"):
        compress.export(make_model(here / "model"), reporter=Reporter(quiet=True))


def test_a_check_that_fails_fails_the_command_and_leaves_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.evaluation import llama_cpp
    from compress.evaluation.verify import Check

    def wrong(*arguments: Any, **options: Any) -> tuple[list[Check], None]:
        return [Check("llama.cpp", False, "says something else")], None

    monkeypatch.setattr(llama_cpp, "check_in_llama_cpp", wrong)
    done = invoke("export", make_model(here / "model"), "--to", "gguf", "-q")
    assert done.exit_code == 1 and done.stdout.splitlines()[-1] == "FAIL llama.cpp: says something else"
    assert (here / "model.gguf").is_file()
