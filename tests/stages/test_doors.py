"""How far it is from the command to the mathematics."""

import traceback
from pathlib import Path

import pytest
from command import invoke
from desk import RECIPE, TEXT
from small_model import write_model

import compress
from compress.stages.quantize import solve

HOUSE = str(Path(compress.__file__).parent)


@pytest.mark.parametrize("correction", [0.5, 0])
def test_from_the_command_to_the_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, correction: float) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "recipe.yaml").write_text(RECIPE + f"    drift_correction: {correction}\n")
    doors: list[list[str]] = []
    usual = solve.gptq

    def gptq(*arguments: object) -> object:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(HOUSE)]
        names = [f"{Path(frame.filename).stem}.{frame.name}" for frame in frames]
        doors.append(names[names.index("cli.run") :])
        return usual(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(solve, "gptq", gptq)
    assert invoke("run", "recipe.yaml", "--device", "cpu", "-q").exit_code == 0
    assert len(doors) >= 2 * 4
    assert all(len(names) <= 7 for names in doors), doors[0]  # and gptq itself is the eighth
