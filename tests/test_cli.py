"""Every command as it is used, with what it prints and its exit code. What goes wrong is in test_bad_input.py."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command import invoke
from finished import FinishedRun
from random_models import two_wide_layers
from safetensors import deserialize, safe_open

from compress import __version__
from compress.evaluation import stock
from compress.recipe.load import list_recipes, recipe_text
from compress.recipe.schema import bundled_dir
from compress.records import Quality, Report, read_record
from compress.system.extras import torchao_problem

RECIPES = [name for name, _ in list_recipes()]
TRAINS = re.compile(r"^ +(heal:|- kind: (finetune|distill))", re.MULTILINE)
NEEDS = {"cpu_int8": pytest.mark.skipif(torchao_problem() is not None, reason="torchao is not installed")}
RUNNABLE = [pytest.param(name, marks=NEEDS.get(name, ())) for name in RECIPES]
# Run by test_recipes_that_train.py and test_recipes_that_sweep.py.
ELSEWHERE = {name for name in RECIPES if TRAINS.search(recipe_text(name)) or "\nsweep:" in recipe_text(name)}
RUN_HERE = [pytest.param(name, marks=NEEDS.get(name, ())) for name in RECIPES if name not in ELSEWHERE]
HEAVY = ("torch", "transformers", "datasets", "accelerate", "matplotlib")


def succeed(*arguments: object) -> str:
    """Run a command that works; returns its standard output."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


# Starting


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["validate", "recipe.yaml"],
        ["run", "recipe.yaml", "--dry-run"],
        ["recipes", "list"],
        ["recipes", "show", "quickstart"],
        ["schema"],
        ["cache", "ls", "work"],
    ],
    ids=" ".join,
)
def test_answers_without_torch(arguments: list[str], tmp_path: Path, tiny_model: Path) -> None:
    stages = "[{kind: quantize, group_size: 64}]"
    (tmp_path / "recipe.yaml").write_text(
        f"name: a\nmodel: {tiny_model}\noutput: out\nstages: {stages}\nevaluate: false\ncalibration: general_en_small\n"
    )
    (tmp_path / "work" / "stages").mkdir(parents=True)
    code = f"""
import sys
from compress.cli import main
sys.argv[1:] = {arguments}
try:
    main()
finally:
    print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_help_names_every_command() -> None:
    printed = succeed("--help")
    for name in ("run", "validate", "schema", "eval", "verify", "inspect", "recipes", "cache"):
        assert re.search(rf"\b{name}\b", printed)
    assert succeed("--version") == f"dscompress {__version__}\n"


@pytest.mark.parametrize("arguments", [["rum"], ["run"], ["run", "quickstart", "--bits", "3"], ["eval", "a"]])
def test_a_command_line_that_is_wrong_ends_with_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


# run


def test_a_loader_that_does_not_start_early_fails_no_run(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr("compress.evaluation.stock.loader_ahead", full)
    found = invoke(*finished_run.arguments)
    assert found.exit_code == 0 and "out of memory" not in found.stderr


def test_run_prints_results_to_stdout_and_progress_to_stderr(finished_run: FinishedRun) -> None:
    report = Report.model_validate(finished_run.report)
    lines = finished_run.stdout.splitlines()
    assert lines[-2:] == [
        f"checkpoint  {finished_run.output}",
        f"report      {finished_run.output / 'report.html'}",
    ]
    assert any(re.fullmatch(r"Size on disk +11\.5 MB .* smaller", line) for line in lines)
    assert any(line.startswith("Perplexity (wikitext2, 128 tokens)") for line in lines)
    assert report.quality is not None and report.quality.perplexity.windows == 4
    progress = finished_run.stderr
    assert re.search(r"^gptq 4-bit: 6/6 layers, [\d.]+ (layers/s|s/layer)$", progress, re.MULTILINE)
    assert re.search(r"^evaluating the base: 6/6 layers", progress, re.MULTILINE)
    assert "\x1b" not in progress + finished_run.stdout and "\r" not in progress  # plain lines, for logs


def test_options_of_run_replace_what_the_recipe_says(finished_run: FinishedRun, tiny_model: Path) -> None:
    report = finished_run.report
    assert report["base"]["model"] == str(tiny_model)
    assert report["compressed"]["path"] == str(finished_run.output)
    bits = {module["name"]: module["bits"] for layer in report["stages"][0]["layers"] for module in layer["modules"]}
    assert len(bits) == 42
    assert {bits.pop(f"model.layers.{layer}.mlp.down_proj") for layer in range(6)} == {8}
    assert set(bits.values()) == {4}
    assert {path.name for path in finished_run.work.iterdir()} == {"stages", "evaluations", "digests.json"}


def test_the_report_counts_what_is_on_disk(finished_run: FinishedRun, tiny_model: Path) -> None:
    base, made = ((folder / "model.safetensors").stat().st_size for folder in (tiny_model, finished_run.output))
    report = finished_run.report
    assert (report["base"]["bytes"], report["compressed"]["bytes"]) == (base, made)
    assert report["size_ratio"] == pytest.approx(base / made)
    assert report["verified"]["passed"] is True
    (generation,) = report["generations"]
    assert generation["prompt"] == "The library" and generation["base"] and generation["compressed"]
    names = {"README.md", "config.json", "dscompress.json", "model.safetensors", "tokenizer.json"}
    assert names | {"report.json", "report.md", "report.html"} <= {file.name for file in finished_run.output.iterdir()}


def test_quiet_prints_results_alone(finished_run: FinishedRun) -> None:
    result = invoke(*finished_run.arguments, "-q")
    warnings = "".join(f"warning: {line}\n" for line in finished_run.report["warnings"])
    assert (result.exit_code, result.stderr) == (0, warnings)
    assert result.stdout == finished_run.stdout


def test_dry_run_writes_nothing(finished_run: FinishedRun, tmp_path: Path) -> None:
    output, work = tmp_path / "out", tmp_path / "work"
    printed = succeed(*finished_run.arguments, "--output", output, "--work-dir", work, "--dry-run")
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(lines) == ["model", "stage", "result", "memory", "disk", "time", "output"]
    assert lines["stage"] == "quantize gptq: 42 matrices, 4 bits g64, 8 bits g64, format compressed-tensors"
    assert lines["result"].startswith(f"{finished_run.report['compressed']['bytes']:,} bytes (")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model."""
    folder = tmp_path_factory.mktemp("small")
    two_wide_layers(folder / "model")
    return folder


@pytest.mark.parametrize("name", RUN_HERE)
def test_bundled_recipes_run(name: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.evaluation.speed._ROUNDS", 1)
    if name == "quickstart":  # asks the stock loader in its process
        monkeypatch.setattr("compress.evaluation.verify.asked", stock.asked)
    smaller = ["calibration.samples=4", "calibration.sequence_length=128"]
    smaller += ["evaluate.sequence_length=128", "evaluate.windows=2", "evaluate.prompts=[]"]
    smaller += ["export=[]"]  # tests/clients has the programs
    options = [option for value in smaller for option in ("--set", value)]
    model, work = small / "model", small / "work"
    with stock.kept_ready() if name == "cpu_int8" else nullcontext():  # measures two models
        succeed("run", name, "--model", model, "--work-dir", work, *options)  # shares the base's figures
    recipe = yaml.safe_load((bundled_dir("recipes") / f"{name}.yaml").read_text())
    report = Report.model_validate_json((tmp_path / recipe["output"] / "report.json").read_text())
    assert report.verified is not None and report.verified.passed
    assert report.quality is not None and report.generations == []
    for asked, done in zip(recipe["stages"], report.stages, strict=True):
        target = asked.pop("target", None)  # which became a shape
        assert asked.items() <= done.spec.items()
        if target is not None:
            assert done.pruned is not None and done.pruned.share == pytest.approx(target["sparsity"], abs=0.02)
    assert (report.speed is not None) == (asked.get("format") == "torchao" and done.device == "cpu")


# validate, schema, recipes


@pytest.mark.parametrize("name", RUNNABLE)
def test_validate(name: str, tiny_model: Path) -> None:
    shorter = ["--set", "evaluate.sequence_length=128", "--set", "calibration.sequence_length=128"]
    assert succeed("validate", name) == f"{name}: valid\n"
    if not TRAINS.search(recipe_text(name)):  # whose shapes and lengths are for larger models
        assert succeed("validate", name, "--model", tiny_model, "--output", "x", *shorter) == f"{name}: valid\n"


def alternatives(rule: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """A rule of a JSON schema as the plain ones of which a value must fit one."""
    if "$ref" in rule:
        return alternatives(schema["$defs"][rule["$ref"].rpartition("/")[2]], schema)
    inner = rule.get("anyOf", rule.get("oneOf"))
    return [rule] if inner is None else [plain for option in inner for plain in alternatives(option, schema)]


def fits(value: Any, rule: Any, schema: dict[str, Any]) -> bool:
    """Whether a value of a recipe fits a rule: keys and types, enough for what recipes hold."""
    if rule is True or rule == {}:
        return True
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "integer", float: "number"}
    for option in alternatives(rule, schema):
        if "enum" in option or "const" in option:
            found = value in option.get("enum", [option.get("const")])
        elif option["type"] != names[type(value)]:
            found = False
        elif isinstance(value, dict):
            known = option.get("properties") or dict.fromkeys(value, option["additionalProperties"])
            found = value.keys() <= known.keys() and all(fits(value[key], known[key], schema) for key in value)
        else:
            found = not isinstance(value, list) or all(fits(item, option["items"], schema) for item in value)
        if found:
            return True
    return False


@pytest.mark.parametrize("name", RECIPES)
def test_schema_accepts_bundled_recipes(name: str) -> None:
    schema = json.loads(succeed("schema"))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    recipe = yaml.safe_load((bundled_dir("recipes") / f"{name}.yaml").read_text())
    assert fits(recipe, schema, schema)
    assert not fits({**recipe, "outptu": "x"}, schema, schema)
    assert not fits({**recipe, "stages": [{"kind": "quantize", "bits": 5}]}, schema, schema)


def test_recipes_list_and_show() -> None:
    rows = [line.split(maxsplit=1) for line in succeed("recipes", "list").splitlines()]
    assert [name for name, _ in rows] == RECIPES == sorted(path.stem for path in bundled_dir("recipes").iterdir())
    for name, summary in rows:
        text = (bundled_dir("recipes") / f"{name}.yaml").read_text()
        assert text.startswith(f"# {summary}\n")
        assert succeed("recipes", "show", name) == text


def test_recipes_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert succeed("recipes", "copy", "quickstart") == "quickstart.yaml\n"
    assert succeed("recipes", "copy", "quickstart.yaml", "mine.yaml") == "mine.yaml\n"
    for name in ("quickstart.yaml", "mine.yaml"):
        assert Path(name).read_text() == succeed("recipes", "show", "quickstart")
        assert succeed("validate", name) == f"{name}: valid\n"


# eval, verify, inspect, cache


def test_eval_gives_the_figures_of_the_run(finished_run: FinishedRun, tiny_model: Path, tmp_path: Path) -> None:
    options = ["--sequence-length", 128, "--windows", 4, "--device", "cpu", "--work-dir", tmp_path, "-q"]
    result = invoke("eval", tiny_model, finished_run.output, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    found, expected = Quality.model_validate_json(result.stdout), Quality.model_validate(finished_run.report["quality"])
    assert found.perplexity == expected.perplexity
    assert found.kl == expected.kl
    assert "evaluations" in succeed("cache", "ls", tmp_path)


def test_verify_passes_what_a_run_wrote(finished_run: FinishedRun) -> None:
    lines = succeed("verify", finished_run.output, "--device", "cpu").splitlines()
    assert [line.partition(":")[0] for line in lines] == ["ok   files", "ok   record", "ok   stock loader", "PASS"]


def test_verify_fails_a_checkpoint_that_was_changed(finished_run: FinishedRun, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(finished_run.output, changed)
    file = changed / "model.safetensors"
    raw = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name, tensor in header.items():
        if name.endswith("down_proj.weight_packed"):
            begin, end = (start + offset for offset in tensor["data_offsets"])
            raw[begin:end] = np.frombuffer(raw[begin:end], np.uint8)[::-1].tobytes()
    file.write_bytes(raw)
    result = invoke("verify", changed, "--device", "cpu")
    assert result.exit_code == 1
    assert re.search(r"^FAIL record: .*largest difference of a logit [\d.]+, allowed", result.stdout, re.MULTILINE)
    assert result.stdout.endswith("\nFAIL\n")


def test_inspect_counts_tensors(finished_run: FinishedRun) -> None:
    lines = succeed("inspect", finished_run.output).splitlines()
    file = finished_run.output / "model.safetensors"
    count = len(deserialize(file.read_bytes()))
    assert lines[:3] == [
        str(finished_run.output),
        "model      llama, 6 layers, hidden 256, vocabulary 4096",
        f"files      1 safetensors, {file.stat().st_size:,} bytes, {count} tensors",
    ]
    kinds = {re.sub(" +", " ", line.strip()) for line in lines[3:-1]}
    assert {"down_proj 6 x 8 bits, group 64", "q_proj 6 x 4 bits, group 64", "embed_tokens 1 x BF16"} <= kinds
    record = read_record(finished_run.output)
    assert record is not None and lines[-1].startswith(f"made       {record.created} by quantize gptq in ")


def test_inspect_reads_a_dense_model(tiny_model: Path) -> None:
    with safe_open(tiny_model / "model.safetensors", framework="np") as opened:
        count = len(list(opened.keys()))
    lines = succeed("inspect", tiny_model).splitlines()
    assert lines[2].endswith(f" {count} tensors")
    assert sum(int(re.search(r"(\d+) x BF16$", line)[1]) for line in lines[3:]) == count  # type: ignore[index]


def test_cache_ls_and_clean(finished_run: FinishedRun, tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished_run.work, work)
    files = [
        file
        for kind in ("stages", "scores", "evaluations", "gguf")
        for file in (work / kind).rglob("*")
        if file.is_file()
    ]
    size = sum(file.stat().st_size for file in files)
    rows = [line.split() for line in succeed("cache", "ls", work).splitlines()]
    assert {(kind, name) for _, _, kind, name in rows} == {
        (kind, path.name)
        for kind in ("stages", "scores", "evaluations", "gguf")
        for path in (work / kind).glob("*")
        if path.suffix != ".lock"
    }
    assert sum(float(row[0]) for row in rows) == pytest.approx(size / 1e6, abs=0.06 * len(rows))
    assert succeed("cache", "clean", work) == f"freed {size / 1e6:,.1f} MB\n"
    assert succeed("cache", "ls", work) == ""
    assert (finished_run.output / "model.safetensors").is_file()
