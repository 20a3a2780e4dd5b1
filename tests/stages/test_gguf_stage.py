"""`format: gguf`: what is solved, kept and written, and what llama.cpp and gguf read in it."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from random_models import make_model

from compress.errors import RecipeError
from compress.formats.dequantized import DequantizedCheckpoint
from compress.formats.ggml_mixes import MIXES
from compress.model.checkpoint import Checkpoint
from compress.model.gguf.block_types import BLOCK_TYPES
from compress.recipe.gguf import Block, GgufStage, Mixture
from compress.recipe.load import load_recipe
from compress.records import Report
from compress.stages.quantize.plan import plan_matrices


def recipe(model: Path, output: Path, **stage: Any) -> dict[str, Any]:
    return {
        "name": "tiny", "model": str(model), "calibration": "general_en_small",
        "stages": [{"kind": "quantize", "format": "gguf", **stage}],
        "evaluate": {"sequence_length": 128, "windows": 4, "prompts": []}, "output": str(output),
    }  # fmt: skip


def run(folder: Path, document: dict[str, Any], *more: str) -> Any:
    file = folder / "recipe.json"
    file.write_text(json.dumps(document))
    return invoke("run", str(file), *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    done = run(folder, recipe(tiny_model, folder / "out", type="q3_k_m"))
    assert done.exit_code == 0, done.stderr
    return folder


def test_a_corrected_chat_template_reaches_the_file_of_a_finished_stage(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    document = recipe(model, tmp_path / "out", type="q8_0", method="rtn") | {"evaluate": False}
    for template in ("{{ messages[0].content }}", "{{ messages[-1].content }}"):
        (model / "chat_template.jinja").write_text(template)
        done = run(tmp_path, document)
        assert done.exit_code == 0, done.stderr
        (file,) = (tmp_path / "out").glob("*.gguf")
        fields = GGUFReader(file).fields
        assert fields["tokenizer.chat_template"].contents() == template
        assert fields["general.name"].contents() == "tiny"
    assert "quantize: finished before" in done.stderr


def test_the_file_is_there_whatever_the_question_raises_and_written_again_where_it_has_changed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("of 7 GB")

    monkeypatch.setattr("compress.runs.gguf_file.served_in_llama_cpp", fail)
    document = recipe(tiny_model, tmp_path / "out", type="q8_0", method="rtn") | {"evaluate": False}
    done = run(tmp_path, document)
    assert done.exit_code == 0 and "llama.cpp could not be asked about the file: MemoryError: of 7 GB" in done.stderr
    report = Report.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert report.served is not None and not report.served.opened and not report.served.passed
    assert report.served.note == "could not be asked: MemoryError: of 7 GB"
    (file,) = (tmp_path / "out").glob("*.gguf")
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))  # which is the one in the work folder too
    done = run(tmp_path, document)
    assert "since it was written; writing it again" in done.stderr
    assert file.read_bytes() == whole
    record = json.loads((tmp_path / "out" / "dscompress.json").read_text())
    assert record["files"][file.name] == hashlib.sha256(whole).hexdigest()
    assert "writing it again" not in run(tmp_path, document).stderr


def test_mixes_and_types_of_recipes_are_those_that_are_known() -> None:
    assert set(Mixture.__args__) == MIXES.keys() and set(Block.__args__) == BLOCK_TYPES.keys()  # type: ignore[attr-defined]


def test_the_output_is_one_file_that_counts_and_is_as_small_as_planned(finished: Path) -> None:
    output = finished / "out"
    (file,) = output.glob("*.gguf")
    assert file.name == "tiny-Q3_K_M.gguf" and not list(output.glob("*.safetensors*"))
    report = Report.model_validate_json((output / "report.json").read_bytes())
    assert report.compressed.bytes == file.stat().st_size and report.compressed.file == file.name
    assert report.size_ratio == pytest.approx(report.base.bytes / file.stat().st_size)
    assert report.quality is not None and report.quality.kl.mean < 0.5
    assert {module.dtype for layer in report.stages[0].layers for module in layer.modules} == {
        "q3_k",
        "q4_k",
        "q5_k",
        "q6_k",
    }
    record = json.loads((output / "dscompress.json").read_text())
    assert file.name in record["files"] and "model.safetensors" not in record["files"]
    card = (output / "README.md").read_text()
    assert f"llama-server -m path/to/out/{file.name}" in card and "from_pretrained" not in card


def test_the_files_weights_are_those_that_were_evaluated(finished: Path, tiny_model: Path) -> None:
    (artefact,) = (path.parent for path in (finished / ".dscompress" / "stages").glob("*/dscompress.json"))
    view = DequantizedCheckpoint(Checkpoint(artefact))
    reader = GGUFReader(next((finished / "out").glob("*.gguf")))
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    heads = {"q": 4, "k": 2}
    config = json.loads((tiny_model / "config.json").read_text())
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    for part, other in (("attn_q", "self_attn.q_proj"), ("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj")):
        stored = tensors[f"blk.1.{part}.weight"]
        theirs = torch.from_numpy(dequantize(stored.data, GGMLQuantizationType(stored.tensor_type)).copy())
        ours = view.load([f"model.layers.1.{other}.weight"])[f"model.layers.1.{other}.weight"]
        if part[-1] in heads:
            ours = ours.view(heads[part[-1]], 2, -1, ours.shape[1]).transpose(1, 2).reshape(ours.shape)
        assert torch.equal(theirs, ours.float())
    assert int(reader.fields["general.file_type"].contents()) == MIXES["q3_k_m"].number


def test_verify_and_eval_read_the_folder_and_the_file(finished: Path, tiny_model: Path) -> None:
    pytest.importorskip("xllamacpp")
    (file,) = (finished / "out").glob("*.gguf")
    done = invoke("verify", str(finished / "out"))
    assert done.exit_code == 0 and "as it was written" in done.stdout and "log-probabilities of" in done.stdout
    done = invoke(
        "eval",
        str(tiny_model),
        str(file),
        "--windows",
        "4",
        "--sequence-length",
        "128",
        "--work-dir",
        str(finished / "w"),
    )
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)["kl"]["mean"]
    report = json.loads((finished / "out" / "report.json").read_text())
    assert found == pytest.approx(report["quality"]["kl"]["mean"], rel=0.02)


def test_llama_cpp_says_what_our_reader_says(finished: Path) -> None:
    pytest.importorskip("xllamacpp")
    served = Report.model_validate_json((finished / "out" / "report.json").read_bytes()).served
    assert served is not None and served.engine == "llama.cpp" and served.opened and served.passed, served


def test_solved_codes_are_nearer_than_rounded_ones(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, recipe(tiny_model, tmp_path / "out", type="q3_k_m", method="rtn"))
    assert done.exit_code == 0, done.stderr
    rounded, solved = (json.loads((folder / "out" / "report.json").read_text()) for folder in (tmp_path, finished))
    assert rounded["compressed"]["bytes"] == solved["compressed"]["bytes"]
    assert solved["quality"]["kl"]["mean"] < rounded["quality"]["kl"]["mean"]


def test_another_type_replaces_the_file_and_keeps_what_is_not_ours(finished: Path, tiny_model: Path) -> None:
    (finished / "out" / "notes.txt").write_text("mine")
    done = run(finished, recipe(tiny_model, finished / "out", type="q8_0", method="rtn"))
    assert done.exit_code == 0, done.stderr
    assert [file.name for file in (finished / "out").glob("*.gguf")] == ["tiny-Q8_0.gguf"]
    assert (finished / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"type": "q4_k_x"}, "q4_k_m"),
        ({"bits": 4}, "bits"),
        ({"clip": "none"}, "no grid without a search"),
        ({"method": "dynamic"}, "gptq"),
        ({"overrides": {"*.down": {"type": "q6_k"}}}, "matches no linear layer"),
        ({"overrides": {"*.down_proj": {"type": "q6"}}}, "q6_k"),
    ],
)
def test_bad_input_is_refused_by_name(stage: dict[str, Any], words: str, tiny_model: Path, tmp_path: Path) -> None:
    done = run(tmp_path, recipe(tiny_model, tmp_path / "out", **stage))
    assert done.exit_code == 2 and words in done.stderr and not (tmp_path / "out").exists()


def test_a_family_without_a_place_in_llama_cpp_is_refused_before_any_work(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "opt")
    done = run(tmp_path, recipe(model, tmp_path / "out"))
    assert done.exit_code == 2 and "gguf can't hold model_type 'opt'" in done.stderr
    assert not (tmp_path / ".dscompress").exists()


def test_widths_that_blocks_do_not_divide_get_other_types(tmp_path: Path) -> None:
    model = Checkpoint(make_model(tmp_path / "model", hidden_size=96, intermediate_size=512))
    found = {
        matrix.name: matrix.block for matrix in plan_matrices(GgufStage(kind="quantize", format="gguf"), model, "")
    }
    assert found["model.layers.0.self_attn.q_proj"] == "q5_0" and found["model.layers.0.mlp.down_proj"] in (
        "q4_k",
        "q6_k",
    )
    ignored = GgufStage(
        kind="quantize", format="gguf", ignore=["*.down_proj"], overrides={"*.q_proj": {"type": "q8_0"}}
    )
    found = {matrix.name: matrix.block for matrix in plan_matrices(ignored, model, "")}
    assert found["model.layers.0.self_attn.q_proj"] == "q8_0" and "model.layers.0.mlp.down_proj" not in found


def test_a_recipe_of_five_lines_is_enough(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("name: x\nmodel: y/z\nstages: [{kind: quantize, format: gguf}]\noutput: o\n")
    stage = load_recipe(str(file)).stages[0]
    assert isinstance(stage, GgufStage) and stage.type == "q4_k_m" and stage.calibrates
    with pytest.raises(RecipeError, match="gguf"):
        file.write_text("name: x\nmodel: y/z\nstages: [{kind: quantize, format: ggml}]\noutput: o\n")
        load_recipe(str(file))
