"""Every script under examples/ runs, as a user would run it, on a model that is small."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from random_models import make_model

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "small", intermediate_size=128, max_position_embeddings=512)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script with its arguments, in this process; returns what it prints."""

    def script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return script


def chats(file: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"Who lived in town {n}?"}, {"role": "assistant", "content": TEXT}]}
        for n in range(300)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


TEXT = "The old library stood at the corner of two quiet streets, and its door was never locked. " * 8


def test_all_are_run_here() -> None:
    assert set(EXAMPLES) == {"eight_billion.py", "own_chats.py", "python_api.py", "walk.py"}


def test_python_api(run: Callable[..., str], tmp_path: Path, model: Path) -> None:
    printed = run("python_api.py", model, tmp_path / "out")
    assert "KL divergence" in printed and "perplexity" in printed and "stock loader: " in printed
    assert (tmp_path / "out" / "report.html").is_file()


def test_own_chats(run: Callable[..., str], tmp_path: Path, model: Path) -> None:
    printed = run("own_chats.py", model, chats(tmp_path / "chats.jsonl"), tmp_path / "out")
    assert "calibrated on " in printed and " x 512 tokens of chats.jsonl" in printed


def test_eight_billion(run: Callable[..., str], tmp_path: Path, model: Path) -> None:
    small = ["calibration.samples=8", "calibration.sequence_length=128", "stages.0.group_size=64"]
    small += ["evaluate={sequence_length: 128, windows: 2}"]
    printed = run("eight_billion.py", model, tmp_path / "out", *small)
    assert "largest logit difference 0.0" in printed


def test_walk(run: Callable[..., str], tmp_path: Path, model: Path) -> None:
    printed = run("walk.py", model, tmp_path)
    sizes = [line for line in printed.splitlines() if "times smaller" in line]
    assert [line.split(":")[0].strip() for line in sizes] == ["rounded", "gptq", "int8"]
    assert "between the two: KL " in printed
    assert len(list((tmp_path / ".dscompress" / "stages").glob("*.lock"))) == 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_its_docstring_says_how_to_run_it(name: str) -> None:
    assert f"python examples/{name} " in (ROOT / "examples" / name).read_text()
