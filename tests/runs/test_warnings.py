"""What a user hears before a run though nothing is wrong: by validate, by run, and in the report."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import invoke
from desk import TEXT
from small_model import random_weights, write_model

from compress.recipe.load import load_recipe
from compress.runs.plan import plan_run

FLATTERED = "are the same text"
HEAD = "quantized head"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model/, text.txt, a copy of it, the same text packed, another text of the same size."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "copy.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT.replace("quiet", "noisy"))
    (tmp_path / "text.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    return tmp_path


def written(folder: Path, calibration: Any, evaluate: Any, **stage: Any) -> Path:
    """A recipe."""
    file = folder / "recipe.yaml"
    file.write_text(
        json.dumps(
            {
                "name": "small", "model": "model", "output": "out", "calibration": calibration, "evaluate": evaluate,
                "stages": [{"kind": "quantize"} | stage],
            }
        )
    )  # fmt: skip
    return file


def found(folder: Path, calibration: Any, evaluate: Any, **stage: Any) -> list[str]:
    return list(plan_run(load_recipe(str(written(folder, calibration, evaluate, **stage))), None).warnings)


def found_in_model(folder: Path, **stage: Any) -> list[str]:
    text = {"source": "text.txt", "samples": 64, "sequence_length": 32}
    recipe = load_recipe(str(written(folder, text, False, **stage)))
    return list(plan_run(recipe, folder / "model").warnings)


@pytest.mark.parametrize(
    ("calibration", "text", "same"),
    [
        ("wikitext2", "wikitext2", True),
        ({"source": "text.txt"}, "text.txt", True),
        ({"source": "copy.txt"}, "text.txt", True),  # by its bytes
        ({"source": "other.txt"}, "text.txt", False),
        ({"source": "text.txt.gz"}, "text.txt", False),
        ("general_en", "wikitext2", False),
        ("general_en", "general_en_small", True),  # other samples of one file
        ({"source": "org/texts", "split": "test"}, "hub.yaml", True),
        ({"source": "org/texts", "split": "train"}, "hub.yaml", False),
        ({"source": "org/texts", "split": "test", "subset": "en"}, "hub.yaml", False),
    ],
)
def test_calibrating_on_the_text_of_the_evaluation(folder: Path, calibration: Any, text: str, same: bool) -> None:
    (folder / "hub.yaml").write_text("source: org/texts\nsplit: test\n")
    lines = found(folder, calibration, {"text": text})
    assert len(lines) == same
    assert all(FLATTERED in line and "\n" not in line for line in lines)


@pytest.mark.parametrize(
    ("evaluate", "stage"),
    [
        (False, {}),
        ({"text": "text.txt"}, {"method": "rtn"}),
        ({"text": "text.txt"}, {"method": "dynamic", "weight_rounding": "rtn"}),
    ],
)
def test_nothing_is_flattered_without_evaluation_or_calibration(folder: Path, evaluate: Any, stage: Any) -> None:
    assert found(folder, {"source": "text.txt"}, evaluate, **stage) == []


def test_a_quantized_head_in_the_gptq_format(folder: Path) -> None:
    (line,) = found(folder, "general_en", False, format="gptq", lm_head=True)
    assert line.startswith("stages.0.lm_head: ") and HEAD in line and "GPTQModel" in line and "optimum" in line
    assert found(folder, "general_en", False, format="gptq") == []
    assert found(folder, "general_en", False, lm_head=True) == []


def joined(folder: Path, **stage: Any) -> list[str]:
    return [line for line in found_in_model(folder, **stage) if "joins" in line]


def test_other_programs_that_do_not_open_the_result(folder: Path) -> None:
    """compress/formats/openers.py has the rest of them."""
    assert found_in_model(folder, group_size=32) == []
    (line,) = found_in_model(folder, format="gptq", group_size=-1)
    assert line.startswith("stages.0.group_size: format gptq with group_size -1 is opened by GPTQModel and vLLM; ")
    for command in (["validate"], ["run", "--device", "cpu", "--dry-run"]):
        result = invoke(command[0], folder / "recipe.yaml", *command[1:])
        assert (result.exit_code, result.stderr) == (0, f"warning: {line}\n")


def test_a_cache_that_vllm_may_read_otherwise(folder: Path) -> None:
    (line,) = found_in_model(folder, method="dynamic", dtype="fp8", kv_cache="fp8_per_head")
    assert line.startswith(
        "stages.0.kv_cache: vLLM's CPU build opens a checkpoint with fp8_per_head and is further off"
    )
    assert found_in_model(folder, method="dynamic", dtype="fp8", kv_cache="fp8") == []


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_linears_that_vllm_joins_in_two_schemes(folder: Path, format: str) -> None:
    (line,) = joined(folder, format=format, overrides={"*.v_proj": {"bits": 8}}, group_size=32)
    assert line.startswith("stages.0: model.layers.*.self_attn: q_proj and k_proj and v_proj are quantized differently")
    assert "vLLM" in line and "transformers" in line
    (line,) = joined(folder, format=format, ignore=["lm_head", "*.1.mlp.up_proj"], group_size=32)
    assert line.startswith("stages.0: model.layers.*.mlp: gate_proj and up_proj are")


def test_linears_that_nobody_joins_may_differ(folder: Path) -> None:
    overrides = {"*.down_proj": {"bits": 8}, "*.o_proj": {"bits": 3}}
    assert joined(folder, overrides=overrides, group_size=32) == []
    assert joined(folder, ignore=["lm_head", "model.layers.0.*"], group_size=32) == []


def test_torchao_checkpoints_are_not_for_vllm_anyway(folder: Path) -> None:
    pytest.importorskip("torchao")
    mixed = {"method": "dynamic", "bits": 4, "format": "torchao", "group_size": 32}
    assert found_in_model(folder, **mixed, ignore=["*.v_proj"]) == []


@pytest.mark.parametrize(("rows", "said"), [(192, 2), (256, 0)])
def test_joined_rows_that_fill_no_block(folder: Path, rows: int, said: int) -> None:
    weights = {name: np.resize(values, (rows, 128)[: values.ndim]) for name, values in random_weights().items()}
    shutil.rmtree(folder / "model")
    write_model(folder / "model", weights)
    lines = found_in_model(folder, method="dynamic", dtype="fp8", granularity="block")
    joined = ["model.layers.*.mlp: gate_proj and up_proj", "model.layers.*.self_attn: q_proj and k_proj and v_proj"]
    assert [line.partition(" ")[2].partition(" have")[0] for line in lines] == joined[:said]
    assert all("granularity: channel" in line for line in lines)


def test_validate_run_and_report_say_it(folder: Path) -> None:
    spec = {"source": "copy.txt", "samples": 32, "sequence_length": 32}
    evaluate = {"text": "text.txt", "sequence_length": 32, "windows": 1}
    recipe = written(folder, spec, evaluate, group_size=32, format="gptq", lm_head=True)
    for command in (["validate", recipe], ["run", recipe, "--device", "cpu", "--dry-run"]):
        result = invoke(*command)
        assert result.exit_code == 0
        assert [line.partition(": ")[0] for line in result.stderr.splitlines()] == ["warning", "warning"]
        assert HEAD in result.stderr and FLATTERED in result.stderr
    ran = invoke("run", recipe, "--device", "cpu", "-q")
    assert ran.exit_code == 0 and HEAD in ran.stderr and FLATTERED in ran.stderr
    warnings = json.loads((folder / "out" / "report.json").read_text())["warnings"]
    assert sum(HEAD in line for line in warnings) == sum(FLATTERED in line for line in warnings) == 1
    for name in ("config.json", "quantize_config.json"):  # GPTQModel opens the head where both say so
        content = json.loads((folder / "out" / name).read_text())
        assert content.get("quantization_config", content)["lm_head"] is True
    shutil.rmtree(folder / "model")  # without the model, the recipe alone is looked at
    assert FLATTERED in invoke("validate", recipe, "--model", "org/model").stderr
