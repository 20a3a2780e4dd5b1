"""The README's plan is what the command prints."""

import re
import shutil
from pathlib import Path

import pytest
from command import invoke

README = Path(__file__).parents[2] / "README.md"


def test_the_output_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = re.search(r"    \$ dscompress plan (.*)\n((?:    .*\n|\n)+)", README.read_text(encoding="utf-8"))
    assert block is not None
    shutil.copy(Path(__file__).parent / "configs" / "llama-3.1-8b.json", tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    arguments = [quoted or word for quoted, word in re.findall(r'"([^"]+)"|(\S+)', block[1])]
    result = invoke("plan", *arguments)
    assert result.exit_code == 0, result.stderr
    printed = iter([line.rstrip() for line in result.stdout.splitlines()])
    for line in block[2].splitlines():
        assert line.strip() in ("", "...") or line.removeprefix("    ") in printed  # in this order


def test_its_commands_have_options_that_there_are() -> None:
    commands = re.findall(r"^    dscompress plan .*$", README.read_text(encoding="utf-8"), re.MULTILINE)
    options = {option for command in commands for option in re.findall(r"--[a-z]+", command)}
    helped = invoke("plan", "--help").stdout
    assert options >= {"--gpu", "--memory", "--write", "--json"}
    assert all(option in helped for option in options)
