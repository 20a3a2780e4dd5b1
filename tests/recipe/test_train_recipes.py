"""Recipes that train: what `data`, `teacher` and `student` mean, and the line that each mistake gets."""

from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.recipe.load import load_recipe, load_training_texts
from compress.recipe.text import CalibrationSpec, TrainingText

BASE = "name: a\nmodel: org/m\noutput: out\nstages:\n  - kind: {kind}\n"
BUNDLED = "chat_en, general_en, general_en_small, wikitext2"
CALIBRATION = CalibrationSpec(source="/c.txt", samples=7, sequence_length=64, seed=3, licence="MIT")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a text, a folder of texts and a spec in `sub`, and a recipe beside none of them."""
    (tmp_path / "sub" / "texts").mkdir(parents=True)
    (tmp_path / "sub" / "texts" / "a.txt").write_text("A fox.")
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "A fox."}\n')
    (tmp_path / "sub" / "s.yaml").write_text("source: c.jsonl\nsamples: 12\nsequence_length: 32\nweight: 2\n")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    return tmp_path


def stage(*lines: str, kind: str = "finetune", overrides: tuple[str, ...] = ()) -> Any:
    """The stage of these lines, from line 6 of the recipe in `sub` on."""
    Path("../sub/r.yaml").write_text(BASE.format(kind=kind) + "".join(f"    {line}\n" for line in lines))
    return load_recipe("../sub/r.yaml", overrides=overrides).stages[0]


def problems(*lines: str, kind: str = "finetune", overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        stage(*lines, kind=kind, overrides=overrides)
    return caught.value.problems


def label(here: Path, line: int) -> str:
    return f"{here / 'sub' / 'r.yaml'}:{line}: stages.0"


# What data means


def test_a_bundled_name_and_a_path_and_inline_sources(here: Path) -> None:
    assert stage("data: general_en").data == stage("data: general_en.yaml").data == "general_en"
    assert stage("data: s.yaml").data == str(here / "sub/s.yaml")
    for source in ("c.jsonl", "./texts", "texts", str(here / "sub/texts")):
        found = stage(f"data: {{source: {source}, weight: 0.5}}").data
        assert found == TrainingText(source=str(here / "sub" / source), weight=0.5)
    assert stage("data: {source: allenai/c4, subset: en}").data.source == "allenai/c4"


def test_a_list_in_the_order_in_which_it_is_written(here: Path) -> None:
    found = stage("data:", "  - general_en", "  - {source: texts, samples: 20}", "  - ./s.yaml").data
    assert found == ["general_en", TrainingText(source=str(here / "sub/texts"), samples=20), str(here / "sub/s.yaml")]


def test_what_is_set_starts_at_the_current_folder(here: Path) -> None:
    for value, meant in (("../sub/s.yaml", "sub/s.yaml"), ("general_en", None)):
        found = stage("data: {source: c.jsonl}", overrides=(f"stages.0.data={value}",)).data
        assert found == (str(here / meant) if meant else value)
    found = stage("data: [{source: c.jsonl}]", overrides=("stages.0.data.0.source=../sub/texts",)).data
    assert found[0].source == str(here / "sub/texts")
    for place in (("{source: texts}", ""), ("[{source: texts}]", ".0")):
        changed = stage(f"data: {place[0]}", overrides=(f"stages.0.data{place[1]}.seed=4",)).data
        assert (changed if isinstance(changed, TrainingText) else changed[0]) == TrainingText(
            source=str(here / "sub/texts"), seed=4
        )


def test_texts_that_data_means(here: Path) -> None:
    general, inline, named = load_training_texts(
        stage("data: [general_en, {source: texts, samples: 20}, s.yaml]").data, CALIBRATION
    )
    assert (general.name, general.samples, general.weight) == ("general_en", None, 1.0)
    assert Path(general.source).is_file() and general.sha256 is not None
    assert inline == TrainingText(source=str(here / "sub/texts"), samples=20)
    assert named == TrainingText(name="s", source=str(here / "sub/c.jsonl"), sequence_length=32, weight=2)
    assert load_training_texts(stage("data: s.yaml").data, CALIBRATION) == [named]


def test_null_means_the_calibration_text_without_its_samples() -> None:
    meant = TrainingText(source="/c.txt", sequence_length=64, seed=3, licence="MIT")
    assert load_training_texts(stage().data, CALIBRATION) == [meant]


@pytest.mark.parametrize(
    ("data", "where", "problem"),
    [
        ("general_eng", "data", f"general_eng: no such spec; did you mean general_en? (bundled: {BUNDLED})"),
        ("t.yaml", "data", f"t.yaml: no such spec; did you mean {{sub}}/s.yaml? (bundled: {BUNDLED})"),
        ("./c.jsonl", "data", "./c.jsonl: is not a .yaml spec; to use a text file, write {{source: ./c.jsonl}}"),
        ("./texts", "data", "./texts: is a folder; to train on its files, write {{source: ./texts}}"),
        ("texts", "data", "texts: is a folder; to train on its files, write {{source: texts}}"),
        (
            "allenai/c4",
            "data",
            f"allenai/c4: no such spec (bundled: {BUNDLED}); for a dataset of the hub write {{{{source: allenai/c4}}}}",
        ),
        ("[general_en, wikitext]", "data.1", f"wikitext: no such spec; did you mean wikitext2? (bundled: {BUNDLED})"),
        ("{source: ./d.jsonl}", "data.source", "./d.jsonl: no such file; did you mean {sub}/c.jsonl?"),
        (
            "[{source: c.jsonl}, {source: ./text}]",
            "data.1.source",
            "./text: no such file; did you mean {sub}/texts?",
        ),
        (
            f"{{source: texts, sha256: {'a' * 64}}}",
            "data.sha256",
            "is of one file, and source is a folder; remove it",
        ),
        ("[]", "data", "is empty; add at least one item"),
        ("{source: c.jsonl, weights: 1}", "data.weights", "unknown key; did you mean weight?"),
        ("[{source: c.jsonl, weight: 0}]", "data.0.weight", "0 is not allowed; use a number above 0"),
    ],
)  # fmt: skip
def test_mistakes_in_data(here: Path, data: str, where: str, problem: str) -> None:
    expected = f"{label(here, 6)}.{where}: " + problem.format(sub=here / "sub")
    assert problems(f"data: {data}") == [expected]


def test_a_mistake_in_what_is_set() -> None:
    option = "--set stages.0.data=[{source: ./texts}]"
    assert problems(overrides=(option.removeprefix("--set "),)) == [
        f"{option}: stages.0.data.0.source: ./texts: no such file"
    ]


def test_mistakes_in_a_spec_that_data_names(here: Path) -> None:
    (here / "sub" / "bad.yaml").write_text("source: c.jsonl\nsamples: 0\nsequence_length: 1\nweight: x\n")
    name = here / "sub" / "bad.yaml"
    assert problems("data: bad.yaml") == [
        f"{name}:2: samples: 0 is not allowed; use 1 or more",
        f"{name}:3: sequence_length: 1 is not allowed; use 2 or more",
        f"{name}:4: weight: 'x' is not a number; write one such as 0.01",
    ]


def test_calibration_is_no_folder_still(here: Path) -> None:
    Path("../sub/r.yaml").write_text(BASE.format(kind="finetune") + "calibration: {source: ./texts}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("../sub/r.yaml")
    assert caught.value.problems == [
        f"{here / 'sub' / 'r.yaml'}:6: calibration.source: ./texts: is a folder; name one file in it"
    ]


def test_healing_reads_what_training_does(here: Path) -> None:
    (here / "sub" / "teacher").mkdir()
    lines = "target: {sparsity: 0.3}", "heal:", "  data: [s.yaml, {source: ./texts}]", "  teacher: ./teacher"
    heal = stage(*lines, kind="prune").heal
    assert heal.data == [str(here / "sub/s.yaml"), TrainingText(source=str(here / "sub/texts"))]
    assert heal.teacher == str(here / "sub/teacher")
    heal = stage(*lines, kind="prune", overrides=("stages.0.heal.data=../sub/s.yaml",)).heal
    assert heal.data == str(here / "sub/s.yaml")
    assert problems(*lines[:2], "  data: general_eng", "  teacher: ./teach", kind="prune") == [
        f"{label(here, 8)}.heal.data: general_eng: no such spec; did you mean general_en? (bundled: {BUNDLED})",
        f"{label(here, 9)}.heal.teacher: ./teach: no such file or folder; did you mean {here / 'sub' / 'teacher'}?",
    ]


# Teachers and students


def test_models_that_stages_name(here: Path) -> None:
    (here / "sub" / "teacher").mkdir()
    (here / "sub" / "base").mkdir()  # base is the recipe's model, whatever lies here
    for written, meant in (
        ("./teacher", str(here / "sub/teacher")), ("teacher", str(here / "sub/teacher")), ("base", "base"),
        ("org/model", "org/model"), ("package:p/f.gguf", "package:p/f.gguf"), ("./base", str(here / "sub/base")),
    ):  # fmt: skip
        found = stage("loss: kl", f"teacher: {written}")
        assert found.teacher == meant
        found = stage(f"teacher: {written}", "student: ./teacher", kind="distill")
        assert (found.teacher, found.student) == (meant, str(here / "sub/teacher"))
    (Path("own")).mkdir()
    assert stage("loss: kl", overrides=("stages.0.teacher=own",)).teacher == str(here / "run/own")


def test_mistakes_in_models_that_stages_name(here: Path) -> None:
    (here / "sub" / "teacher").mkdir()
    missing = f"no such file or folder; did you mean {here / 'sub' / 'teacher'}?"
    assert problems("teacher: ./teecher", "student: ./taecher", kind="distill") == [
        f"{label(here, 6)}.teacher: ./teecher: {missing}",
        f"{label(here, 7)}.student: ./taecher: {missing}",
    ]
    allowed = "is not a model; write a hub id (org/name), a folder, a .gguf file or package:NAME/FILE.gguf"
    assert problems("teacher: a/b/c", kind="distill") == [f"{label(here, 6)}.teacher: 'a/b/c' {allowed}"]


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("./teacher", "is the teacher folder; name another folder"),
        ("./teacher/x", "lies inside the teacher folder; name another folder"),
        (".", "holds the teacher {sub}/teacher; name another folder"),
    ],
)
def test_the_output_never_takes_a_teachers_place(here: Path, output: str, problem: str) -> None:
    (here / "sub" / "teacher").mkdir()
    text = BASE.format(kind="distill").replace("output: out", f"output: {output}") + "    teacher: ./teacher\n"
    (here / "sub" / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("../sub/r.yaml")
    said = problem.format(sub=here / "sub")
    assert caught.value.problems == [f"{here / 'sub' / 'r.yaml'}:3: output: {output}: {said}"]
