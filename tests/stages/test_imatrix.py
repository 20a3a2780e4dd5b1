"""`imatrix: true`: sums of squared inputs beside those in stock transformers, and the file that llama.cpp reads."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import invoke
from gguf import GGUFReader
from llama_imatrix import read_by_llama
from quantized import Stops
from random_models import load_stock, make_model, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.loop.context import Context
from compress.loop.stream import LayerStream
from compress.model.checkpoint import Checkpoint
from compress.model.source import gguf_of
from compress.recipe.gguf import GgufStage
from compress.stages.quantize.input_squares import FILE
from compress.stages.quantize.run import run
from compress.system.fingerprint import sha256
from compress.system.progress import Reporter

SEQUENCES, LENGTH = 5, 24
TOKENS = random_tokens(SEQUENCES, LENGTH, 1)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, widths 64 and 96, of grouped heads."""
    return make_model(tmp_path_factory.mktemp("imatrix") / "model", dtype=torch.float32)


def stage(**settings: Any) -> GgufStage:
    return GgufStage(kind="quantize", format="gguf", **{"type": "q4_0", "imatrix": True, **settings})


def context() -> Context:
    tokens = TokenSet(TOKENS, "random", "random", None)
    return Context(torch.device("cpu"), torch.float32, tokens, random_tokens(1, 8, 2), Reporter(quiet=True), False)


def sums_of(model: Path) -> dict[str, Tensor]:
    """Sums of squared inputs over all tokens, of each linear in the layers, by stock transformers."""
    stock = load_stock(model, torch.float32)
    found: dict[str, Tensor] = {}

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        squares = inputs[0].double().pow(2).sum((0, 1))
        found[name] = found.get(name, torch.zeros_like(squares)) + squares

    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.register_forward_pre_hook(partial(hook, name))
    for sequence in TOKENS:
        stock(sequence[None])
    return found


@pytest.mark.parametrize("kept", [True, False])
def test_sums_are_those_of_the_inputs_in_the_original_model(
    kept: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of matrices that stay as they are, and where batches are not kept inside a layer."""
    monkeypatch.setattr(LayerStream, "_keeps_batches", lambda *_: kept)
    run(stage(ignore=["*.o_proj"]), Checkpoint(model), tmp_path, context())
    expected, found = sums_of(model), load_file(tmp_path / "checkpoint" / FILE)
    assert found.keys() == expected.keys() and len(found) == 14
    for name, sums in expected.items():
        assert torch.allclose(found[name].double(), sums, rtol=1e-4), name
    with safe_open(tmp_path / "checkpoint" / FILE, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "text": "random", "sequences": "5", "length": "24"}


def test_what_is_quantized_is_the_same_with_it_and_without(model: Path, tmp_path: Path) -> None:
    """Also after a stop behind the first layer, which loses none of the sums."""
    run(stage(imatrix=False), Checkpoint(model), tmp_path / "without", context())
    run(stage(), Checkpoint(model), tmp_path / "whole", context())
    with pytest.raises(KeyboardInterrupt):
        run(stage(), Checkpoint(model), tmp_path / "stopped", replace(context(), reporter=Stops(1)))
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    run(stage(), Checkpoint(model), tmp_path / "stopped", context())
    without, whole, stopped = (tmp_path / name / "checkpoint" for name in ("without", "whole", "stopped"))
    assert sha256(without / "model.safetensors") == sha256(whole / "model.safetensors")
    assert sha256(stopped / "model.safetensors") == sha256(whole / "model.safetensors")
    sums, again = load_file(whole / FILE), load_file(stopped / FILE)
    assert again.keys() == sums.keys() and all(torch.equal(again[name], sums[name]) for name in sums)
    assert not (without / FILE).exists()


def test_stages_without_it_have_the_identity_that_they_had() -> None:
    assert "imatrix" not in stage(imatrix=False).identity()
    assert stage().identity() == stage(imatrix=False).identity() | {"imatrix": True}


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by the command, once and again into another output."""
    folder = tmp_path_factory.mktemp("run")
    recipe = {
        "name": "small", "model": str(model), "evaluate": False, "output": str(folder / "out"),
        "calibration": {"source": str(folder / "text.txt"), "samples": 4, "sequence_length": 32},
        "stages": [stage().model_dump(include={"kind", "format", "type", "imatrix"})],
    }  # fmt: skip
    (folder / "text.txt").write_text("The river runs past the old mill and the new bridge. " * 60)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    for name in ("out", "again"):
        done = invoke("run", folder / "recipe.json", "--device", "cpu", "--output", folder / name)
        assert done.exit_code == 0, done.stderr
        assert ("finished before" in done.stderr) == (name == "again")
    return folder


def test_the_file_beside_is_recorded_and_is_no_model(finished: Path) -> None:
    output = finished / "out"
    file = output / "small.imatrix.gguf"
    recorded = json.loads((output / "dscompress.json").read_text())["files"]
    assert recorded[file.name] == sha256(file) and FILE not in recorded and not (output / FILE).exists()
    model = gguf_of(output)
    assert model is not None and model.name == "small-Q4_0.gguf"
    widths = {each.name: int(each.shape[0]) for each in GGUFReader(model).tensors if each.name.startswith("blk.")}
    widths = {name: width for name, width in widths.items() if "norm" not in name}
    sums = {each.name: each for each in GGUFReader(file).tensors}
    assert sums.keys() == {name + end for name in widths for end in (".in_sum2", ".counts")}
    assert {name: len(sums[f"{name}.in_sum2"].data) for name in widths} == widths
    assert (finished / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["small-imatrix.gguf"], "small-imatrix.gguf"),  # quantized with one, as some hub models say
        (["small-imatrix.gguf", "small.imatrix.gguf"], "small-imatrix.gguf"),
        (["small.gguf", "imatrix.gguf"], "small.gguf"),
        (["small.imatrix.gguf"], None),
        (["small.gguf", "other.gguf"], None),
    ],
)
def test_only_what_is_called_as_an_importance_matrix_is_no_model(
    names: list[str], found: str | None, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"GGUF")
    assert gguf_of(tmp_path) == (None if found is None else tmp_path / found)


def test_a_dry_run_says_that_there_will_be_one(finished: Path) -> None:
    planned = invoke("run", finished / "recipe.json", "--dry-run")
    assert "importance matrix of the calibration text" in planned.stdout
    planned = invoke("run", finished / "recipe.json", "--dry-run", "--set", "stages.0.imatrix=false")
    assert "importance matrix" not in planned.stdout


def test_llama_cpp_reads_mean_squares_in_it(finished: Path) -> None:
    pytest.importorskip("xllamacpp")
    read = read_by_llama(finished / "out" / "small.imatrix.gguf")
    assert read[:3] == (["text.txt"], 4, 32)
    artefact = next((finished / ".dscompress" / "stages").glob(f"*/{FILE}"))
    ours = {"attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    sums = load_file(artefact)
    assert len(read.means) == len(sums) == 14
    for part, name in ours.items():
        expected = sums[f"model.layers.1.{name}"].numpy() / np.float32(4 * 32)
        assert np.array_equal(read.means[f"blk.1.{part}.weight"], expected)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"method": "rtn"}, "needs the inputs, which rtn never sees; use method: gptq"),
        ({"drift_correction": 0}, "is summed in the pass of the original model that drift_correction: 0 saves"),
        ({"reference": "base"}, "is of the model that this stage gets, and reference: base runs another one"),
    ],
)
def test_what_leaves_no_sums_is_refused(settings: dict[str, Any], said: str, model: Path, tmp_path: Path) -> None:
    recipe = {"name": "x", "model": str(model), "output": str(tmp_path / "out")}
    recipe["stages"] = [{"kind": "quantize", "format": "gguf", "imatrix": True, **settings}]  # type: ignore[assignment]
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = invoke("validate", str(tmp_path / "recipe.json"))
    assert done.exit_code == 2 and f"stages.0.imatrix: {said}" in done.stderr
