"""Runs on models in unusual folders: base, result and figures are those of stock transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored as forms
import torch
from command import Result, invoke
from random_models import load_stock
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from compress.data.calibration import load_windows

RECIPE = """\
name: forms
model: model
evaluate: {text: text.txt, sequence_length: 32, windows: 2, prompts: []}
output: out
stages:
  - {kind: quantize, method: rtn, group_size: 32}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("The library stood at the corner of two quiet streets.\n" * 60)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def run() -> Result:
    return invoke("run", "recipe.yaml", "--device", "cpu")


def report(folder: Path) -> Any:
    return json.loads((folder / "out" / "report.json").read_text())


def stock(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return load_stock(folder, dtype)(tokens, use_cache=False).logits.float()


@pytest.mark.parametrize(
    "form",
    [
        forms.a_head_of_its_own,
        forms.a_head_of_its_own_in_a_family_that_ties,
        forms.untied_without_prefix,
        forms.inside_a_multimodal_model,
        forms.tied_by_the_heads_name,
        forms.a_file_that_the_config_names,
        forms.a_layer_beyond_the_depth,
        forms.biases_that_the_config_denies,
        forms.buffers_that_the_model_makes,
    ],
    ids=lambda form: form.__name__,
)
def test_figures_are_those_of_stock_transformers(form: Callable[[Path], None], folder: Path) -> None:
    form(folder / "model")
    result = run()
    assert result.exit_code == 0, result.stderr
    found = report(folder)
    assert found["verified"]["passed"] and found["verified"]["max_logit_difference"] == 0.0
    _, info = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    dtype = getattr(torch, found["stages"][0]["dtype"])
    tokens = load_windows("text.txt", AutoTokenizer.from_pretrained("model"), sequence_length=32, windows=2).tokens
    base, compressed = (stock(folder / name, tokens, dtype)[:, :-1].flatten(0, 1) for name in ("model", "out"))
    perplexity, targets = found["quality"]["perplexity"], tokens[:, 1:].flatten()
    assert perplexity["base"] == pytest.approx(float(cross_entropy(base, targets).exp()), rel=1e-3)
    assert perplexity["compressed"] == pytest.approx(float(cross_entropy(compressed, targets).exp()), rel=1e-3)
    kl = kl_div(compressed.log_softmax(-1), base.log_softmax(-1), reduction="batchmean", log_target=True)
    assert found["quality"]["kl"]["mean"] == pytest.approx(float(kl), rel=1e-2, abs=1e-4)


def test_a_head_of_its_own_is_kept_and_said(folder: Path) -> None:
    forms.a_head_of_its_own(folder / "model")
    assert run().exit_code == 0
    assert json.loads((folder / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    head = forms.tensors_of(folder / "model")[forms.HEAD]
    assert torch.equal(forms.tensors_of(folder / "out")[forms.HEAD], head)
    said = (
        f"{folder / 'model'}: config.json means tie_word_embeddings: true, but lm_head.weight is stored with other "
        "values: it is kept, as transformers does, and the result says tie_word_embeddings: false"
    )
    assert said in report(folder)["warnings"]


def test_tensors_without_a_place_are_left_out_by_name(folder: Path) -> None:
    forms.biases_that_the_config_denies(folder / "model")
    assert run().exit_code == 0
    (said,) = report(folder)["warnings"]
    assert said == (
        f"{folder / 'model'}: LlamaForCausalLM has no place for 8 of its tensors, and transformers does not load "
        "model.layers.0.self_attn.k_proj.bias, model.layers.0.self_attn.o_proj.bias, "
        "model.layers.0.self_attn.q_proj.bias and 5 more (0.0 MB): left out of the result, and not counted in its sizes"
    )
    assert not [name for name in forms.tensors_of(folder / "out") if name.endswith(".bias")]


def test_a_tied_head_that_is_stored_twice_is_written_once(folder: Path) -> None:
    forms.tied_and_stored_twice(folder / "model")
    assert run().exit_code == 0
    assert report(folder)["warnings"] == []
    assert forms.HEAD not in forms.tensors_of(folder / "out")


def test_eval_reads_the_base_as_a_run_does(folder: Path) -> None:
    forms.untied_without_prefix(folder / "model")
    assert run().exit_code == 0
    asked = ["--text", "text.txt", "--sequence-length", 32, "--windows", 2, "--device", "cpu"]
    result = invoke("eval", "model", "out", *asked)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == report(folder)["quality"]
