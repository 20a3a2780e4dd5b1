"""The README's table of what vLLM opens is what vLLM said, and it leaves out no format."""

import json

from vllm_table import CASES, FILE, MARKS, README, TIMED, placed, table

from compress.formats.table import FORMATS
from compress.recipe.schema import Recipe


def test_the_readme_says_what_vllm_said() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    readme = README.read_text(encoding="utf-8")
    assert readme == placed(readme, table(found)), "run make clients, or python tests/support/vllm_table.py"
    assert all(readme.count(mark) == 1 for mark in MARKS)


def test_its_rows_are_those_that_are_tested() -> None:
    found = json.loads(FILE.read_text(encoding="utf-8"))
    assert list(found["formats"]) == list(CASES) and list(found["timed"]) == list(TIMED)
    for name, case in CASES.items():
        row = found["formats"][name]
        assert (row["opened"], row["passed"]) == (case.opens, case.opens and case.same)
        assert row["opened"] or row["note"]


def test_every_format_that_is_written_is_asked_about() -> None:
    layouts = set()
    for case in CASES.values():
        recipe = Recipe.model_validate(
            {
                "name": "a",
                "model": "a/b",
                "output": "o",
                "stages": case.stages or [{"kind": "prune", "target": {"sparsity": 0.1}}],
            }
        )
        layouts |= {stage.layout for stage in recipe.stages if stage.kind == "quantize"}
    assert layouts == set(FORMATS) - {"gguf"}  # which is for llama.cpp
