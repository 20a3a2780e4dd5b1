"""A stage's artefact: made by one process, waited for and used by others, continued where nothing has changed."""

import threading
import time
from pathlib import Path

import pytest
import torch
from small_model import TRAINED, write_model

from compress.records import Probe, Stage
from compress.runs import artefact as artefact_module
from compress.runs.artefact import StageArtefact
from compress.runs.cache import cache_entries, clean_cache
from compress.stages.contract import Result

BASE = TRAINED  # what the stage starts from
PROBE = Probe(tokens=[1], best=[2], logit=[0.5], dtype="float32")
RESULT = Result(Stage(kind="quantize", seconds=1, peak_memory_bytes=None, cached=False), torch.ones(1, 4))


def artefact(work: Path, said: list[str] | None = None, key: str = "abc") -> StageArtefact:
    return StageArtefact(work, key, "quantize stage", [].append if said is None else said.append)


def make(made: StageArtefact) -> None:
    write_model(made.part / "checkpoint")
    made.commit(RESULT, parent="p", base="b", probe=PROBE)


def test_the_second_waits_for_the_first_and_uses_what_it_made(tmp_path: Path) -> None:
    said: list[str] = []
    found = []
    with artefact(tmp_path) as first, artefact(tmp_path, said) as second:
        assert first.find(False, "cpu", BASE) is None
        other = threading.Thread(target=lambda: found.append(second.find(False, "cpu", BASE)))
        other.start()
        while not said:
            time.sleep(0.01)
        assert not found and said[0].startswith("quantize stage: waiting for process ")
        make(first)
        other.join(10)
    assert [record.fingerprint for record in found] == ["abc"]
    assert torch.equal(second.logits(), torch.ones(1, 4))


def test_different_artefacts_are_made_at_once(tmp_path: Path) -> None:
    with artefact(tmp_path, key="abc") as one, artefact(tmp_path, key="def") as other:
        assert one.find(False, "cpu", BASE) is None and other.find(False, "cpu", BASE) is None


def test_the_second_goes_on_where_the_first_has_ended(tmp_path: Path) -> None:
    with artefact(tmp_path) as first:
        assert first.find(False, "cpu", BASE) is None
        (first.part / "layer-00000.safetensors").touch()
    with artefact(tmp_path) as second:
        assert second.find(False, "cpu", BASE) is None
        assert (second.part / "layer-00000.safetensors").exists()


@pytest.mark.parametrize(
    ("device", "version", "line"),
    [
        ("cpu", "9.9", "quantize stage: was begun with torch 1.0, now 9.9; starting it again"),
        ("cuda", "1.0", "quantize stage: was begun with device cpu, now cuda; starting it again"),
    ],
)
def test_half_done_work_is_continued_by_the_same_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, version: str, line: str
) -> None:
    there = {"torch": "1.0", "transformers": "5.0"}
    monkeypatch.setattr(artefact_module, "versions", lambda: there)
    with artefact(tmp_path) as first:
        first.find(False, "cpu", BASE)
        (first.part / "layer-00000.safetensors").touch()
    there["torch"] = version
    said: list[str] = []
    with artefact(tmp_path, said) as second:
        assert second.find(False, device, BASE) is None
        assert said == [line] and not (second.part / "layer-00000.safetensors").exists()


def test_fresh_makes_it_anew(tmp_path: Path) -> None:
    with artefact(tmp_path) as first:
        first.find(False, "cpu", BASE)
        make(first)
    with artefact(tmp_path) as second:
        assert second.find(True, "cpu", BASE) is None and not second.folder.exists()


def test_what_a_run_uses_is_not_cleaned_away(tmp_path: Path) -> None:
    for key in ("abc", "def"):
        with artefact(tmp_path, key=key) as each:
            each.find(False, "cpu", BASE)
            make(each)
    with artefact(tmp_path) as used:
        assert used.find(False, "cpu", BASE) is not None
        assert clean_cache(tmp_path) > 0
        assert {entry.path.name.partition(".")[0] for entry in cache_entries(tmp_path)} == {"abc"}
    assert clean_cache(tmp_path) > 0 and not any(tmp_path.iterdir())
