"""From values to points: grids, lists, names, and every mistake of every point at once."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import RecipeError
from compress.recipe.load import load_recipe
from compress.sweeps.points import Job, load_sweep

STAGES = [
    {"kind": "prune", "axes": ["ffn"], "target": {"sparsity": 0.1}},
    {"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 32},
]


def write(folder: Path, tiny_model: Path, **more: object) -> str:
    recipe = {"name": "tiny", "model": str(tiny_model), "stages": STAGES, "output": "out"} | more
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "r.yaml")


def problems(*arguments: object, **more: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_sweep(*arguments, **more)  # type: ignore[arg-type]
    return caught.value.problems


def settings(job: Job) -> list[dict[str, object]]:
    return [dict(point.settings) for point in job.points]


def test_several_options_make_a_grid(tmp_path: Path, tiny_model: Path) -> None:
    job = load_sweep(
        write(tmp_path, tiny_model), over=["stages.0.target.sparsity=0.1,0.2", "stages.1.bits=3,4"],
        overrides=["evaluate.windows=2"],
    )  # fmt: skip
    assert settings(job) == [
        {"stages.0.target.sparsity": sparsity, "stages.1.bits": bits} for sparsity in (0.1, 0.2) for bits in (3, 4)
    ]
    assert [point.name for point in job.points][:2] == ["sparsity=0.1,bits=3", "sparsity=0.1,bits=4"]
    assert job.axes == ["stages.0.target.sparsity", "stages.1.bits"]
    last = job.points[-1]
    assert last.recipe.stages[0].target.sparsity == 0.2 and last.recipe.stages[1].bits == 4  # type: ignore[attr-defined]
    assert last.recipe.evaluate is not None and last.recipe.evaluate.windows == 2
    assert last.recipe.output == str(tmp_path / "out" / "points" / "sparsity=0.2,bits=4")
    assert last.recipe.name == "tiny sparsity=0.2,bits=4" and job.recipe.output == str(tmp_path / "out")


def test_options_replace_what_the_recipe_says(tmp_path: Path, tiny_model: Path) -> None:
    file = write(tmp_path, tiny_model, sweep={"grid": {"stages.1.bits": [3, 4, 8]}})
    assert settings(load_sweep(file)) == [{"stages.1.bits": bits} for bits in (3, 4, 8)]
    assert settings(load_sweep(file, over=["stages.1.group_size=64"])) == [{"stages.1.group_size": 64}]


def test_a_point_of_a_list_can_replace_whole_stages_and_have_a_name(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"name": "three bits", "stages": [STAGES[1] | {"bits": 3}]}, {"stages.1.bits": 8}]
    job = load_sweep(write(tmp_path, tiny_model, sweep={"list": rows}))
    assert [point.name for point in job.points] == ["three-bits", "bits=8"]
    assert len(job.points[0].recipe.stages) == 1 and job.points[0].recipe.name == "three bits"
    assert job.points[1].recipe.stages[1].bits == 8  # type: ignore[attr-defined]


def test_names_tell_alike_paths_apart(tmp_path: Path, tiny_model: Path) -> None:
    stages = [{"kind": "finetune", "tokens": "1k"}, {"kind": "finetune", "tokens": "1k"}]
    job = load_sweep(write(tmp_path, tiny_model, stages=stages), over=["stages.0.seed=1,2", "stages.1.seed=3"])
    assert [point.name for point in job.points] == ["0.seed=1,1.seed=3", "0.seed=2,1.seed=3"]
    job = load_sweep(write(tmp_path, tiny_model, stages=stages), over=["stages.0.seed=1,2", "stages.1.tokens=2k"])
    assert job.points[0].name == "seed=1,tokens=2k"


@given(st.lists(st.floats(0.01, 0.5), min_size=1, max_size=4, unique=True))
def test_values_reach_the_recipe_as_they_are(values: list[float]) -> None:
    model = str(Path(__file__).parent.parent / "models" / "tiny-wiki-llama")
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        file = write(Path(folder), Path(model))
        job = load_sweep(file, over=[f"stages.0.target.sparsity={','.join(map(repr, values))}"])
        assert [point.recipe.stages[0].target.sparsity for point in job.points] == values  # type: ignore[attr-defined]


def test_names_do_not_hang_on_the_other_points(tmp_path: Path, tiny_model: Path) -> None:
    file = write(tmp_path, tiny_model)
    few = load_sweep(file, over=["stages.1.bits=3,4"])
    more = load_sweep(file, over=["stages.1.bits=2,3,4,8"])
    assert {point.name for point in few.points} < {point.name for point in more.points}


def test_a_point_that_is_added_to_a_list_renames_none(tmp_path: Path, tiny_model: Path) -> None:
    rows = [{"stages.1.bits": 4, "stages.1.group_size": size} for size in (64, 128)]
    few = load_sweep(write(tmp_path, tiny_model, sweep={"list": rows}))
    more = load_sweep(write(tmp_path, tiny_model, sweep={"list": [*rows, {"stages.1.bits": 3}]}))
    assert [point.name for point in few.points] == [point.name for point in more.points][:2]


def test_paths_in_the_recipe_start_at_its_folder_and_typed_ones_here(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("there", "here"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    calibration = {"source": "a.txt"}
    grid = {"sweep": {"grid": {"calibration.source": ["a.txt"]}}}
    file = write(tmp_path / "there", tiny_model, calibration=calibration, **grid)
    monkeypatch.chdir(tmp_path / "here")
    sources = [
        load_sweep(file, over=over).points[0].recipe.calibration.source  # type: ignore[union-attr]
        for over in ([], ["calibration.source=a.txt"])
    ]
    assert sources == [str(tmp_path / "there" / "a.txt"), str(tmp_path / "here" / "a.txt")]


def test_a_pattern_is_no_number_of_base_60(tmp_path: Path, tiny_model: Path) -> None:
    stages = [{"kind": "prune", "pattern": "2:4"}]
    job = load_sweep(write(tmp_path, tiny_model, stages=stages), over=["stages.0.pattern=2:4,4:8"])
    assert [point.recipe.stages[0].pattern for point in job.points] == ["2:4", "4:8"]  # type: ignore[attr-defined]


def test_all_mistakes_of_all_points_are_said_at_once(tmp_path: Path, tiny_model: Path) -> None:
    found = problems(write(tmp_path, tiny_model), over=["stages.0.target.sparsty=0.1,0.2", "stages.1.bits=4,9"])
    assert len(found) == 3 and len(set(found)) == 3
    assert sum("unknown key; did you mean sparsity?" in line for line in found) == 2
    assert sum(line.startswith("sweep stages.1.bits=9: stages.1.bits: 9 is not allowed") for line in found) == 1


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("bits", "is not path=value,value"),
        ("stages.7.bits=3,4", "has no item 7; use stages.0 to stages.1"),
        ("stage.0.bits=3,4", "did you mean stages"),
        ("stages.1.bits=", "has no values"),
        ("stages.1.bits=4,4", "is there twice; keep one"),
        ("output=a,b", "can't be varied"),
        ("stages.1.bits=[3", "--over stages.1.bits=[3"),
    ],
)
def test_an_option_that_means_nothing(over: str, words: str, tmp_path: Path, tiny_model: Path) -> None:
    found = problems(write(tmp_path, tiny_model), over=[over])
    assert any(words in line for line in found), found


def test_a_setting_is_varied_by_one_option(tmp_path: Path, tiny_model: Path) -> None:
    found = problems(write(tmp_path, tiny_model), over=["stages.1.bits=3", "stages.1.bits=4"])
    assert found == ["--over stages.1.bits=4: stages.1.bits is varied twice; write all its values in one option"]


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ({}, "needs one of grid, list and search"),
        ({"grid": {"stages.1.bits": []}}, "sweep.grid"),
        ({"grid": {"stages.1.bits": [3]}, "list": [{"stages.1.bits": 3}]}, "needs one of grid, list and search"),
        ({"gird": {"stages.1.bits": [3]}}, "did you mean grid?"),
        ({"list": [{"name": "a"}, {"name": "a", "stages.1.bits": 3}]}, "two points are called a"),
        (
            {"search": {"maximize": "sparsty", "over": "stages.0.target.sparsity", "range": [0.1, 0.2],
             "subject_to": {"kl": 0.1}}}, "goal sparsty is no figure of a report; did you mean sparsity?",
        ),
        (
            {"search": {"maximize": "sparsity", "over": "stages.0.target.sparsity", "range": [0.3, 0.2],
             "subject_to": {"kl": 0.1}}}, "the first value must be less than the second",
        ),
        (
            {"search": {"maximize": "sparsity", "minimize": "bytes", "over": "stages.0.target.sparsity",
             "range": [0.1, 0.2], "subject_to": {"kl": 0.1}}}, "needs one of maximize and minimize",
        ),
    ],
)  # fmt: skip
def test_a_sweep_that_means_nothing(sweep: object, words: str, tmp_path: Path, tiny_model: Path) -> None:
    found = problems(write(tmp_path, tiny_model, sweep=sweep))
    assert any(words in line for line in found), found


def test_without_anything_to_vary(tmp_path: Path, tiny_model: Path) -> None:
    (line,) = problems(write(tmp_path, tiny_model))
    assert "says nothing of a sweep; add --over" in line


def test_a_point_is_the_recipe_that_a_run_would_have(tmp_path: Path, tiny_model: Path) -> None:
    """But for its name and its folder."""
    file = write(tmp_path, tiny_model, sweep={"grid": {"stages.1.bits": [3]}})
    (point,) = load_sweep(file).points
    wanted = load_recipe(file, overrides=["stages.1.bits=3"]).shown()
    wanted.pop("sweep")
    assert json.loads(json.dumps(point.recipe.shown())) == wanted | {
        "name": "tiny bits=3", "output": str(tmp_path / "out" / "points" / "bits=3"),
    }  # fmt: skip
