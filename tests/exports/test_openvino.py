"""Checkpoints as folders for OpenVINO: what is given to its environment, and what is refused before.

tests/clients has the real optimum-intel and OpenVINO; here a stand-in keeps what it was given.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import invoke
from hypothesis import given
from hypothesis import strategies as st
from onnx_files import quantized
from openvino_files import environment
from random_models import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import DscompressError, ModelError, OutputError
from compress.exports.openvino.build import Written, export_openvino
from compress.exports.openvino.codes import Digests, carried_grids, laid_out, shape_of
from compress.exports.plan import disk_bytes, export_bytes
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint
from compress.quant.grid import Grid, Quantized
from compress.recipe.export import ExportSpec
from compress.recipe.schema import Recipe
from compress.runs.exporters import exporter_of
from compress.runs.foreseen import foreseen_result
from compress.runs.plan import plan_run
from compress.system.progress import Reporter

Made = Callable[..., Path]
W4 = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "model", intermediate_size=128, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def made(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The model quantized; made once for each spec."""
    found: dict[str, Path] = {}

    def make(**spec: Any) -> Path:
        if str(spec) not in found:
            found[str(spec)] = quantized(dense, tmp_path_factory.mktemp("quantized"), **spec)
        return found[str(spec)]

    return make


def exported(folder: Path, tmp_path: Path, **options: Any) -> Written:
    engine = environment(tmp_path / "python")
    return export_openvino(folder, tmp_path / "out", engine, reporter=Reporter(quiet=True), **options)


def read(written: Written) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and tensors that are traced."""
    folder = written.folder / "read"
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= load_file(file)
    return json.loads((folder / "config.json").read_text()), tensors


def request(written: Written) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written.folder / "request").read_text())
    return found


def numbers(shape: dict[str, Any], tensors: dict[str, Tensor]) -> np.ndarray[Any, Any]:
    """The matrix [O, I] that OpenVINO's types say these mean, in float32 by float64: i4 and i8 are two's complement."""
    rows, columns, groups, bits = (shape[name] for name in ("rows", "columns", "groups", "bits"))

    def whole(raw: Tensor, count: int) -> np.ndarray[Any, Any]:
        spread = np.unpackbits(raw.numpy(), bitorder="little").reshape(-1, bits)[:count].astype(np.int64)
        places = 2 ** np.arange(bits)
        places[-1] *= -1 if shape["signed"] else 1
        return spread @ places

    codes = whole(tensors["codes"], rows * columns).reshape(rows, groups, -1)
    zeros = whole(tensors["zeros"], rows * groups).reshape(rows, groups, 1) if "zeros" in tensors else 0
    scales = tensors["scales"].numpy().astype(np.float64)[..., None]
    return ((codes - zeros) * scales).reshape(rows, columns).astype(np.float32)


@given(
    data=st.data(), bits=st.sampled_from((2, 3, 4, 5, 8)), width=st.sampled_from((6, 32, 64)), symmetric=st.booleans()
)
def test_constants_mean_the_numbers_of_the_checkpoint(
    data: st.DataObject, bits: int, width: int, symmetric: bool
) -> None:
    rows, groups = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    grid = Grid(bits, width, symmetric)
    middle = torch.full((rows, groups), grid.middle, dtype=torch.uint8)
    matrix = Quantized(
        codes=torch.randint(0, 2**bits, (rows, groups * width), generator=generator, dtype=torch.uint8),
        scale=torch.randn(rows, groups, generator=generator).to(torch.bfloat16),
        zero=middle if symmetric else torch.randint(0, 2**bits, (rows, groups), generator=generator, dtype=torch.uint8),
        grid=grid,
    )
    shape, parts = shape_of(matrix), laid_out(matrix)
    assert shape["signed"] is symmetric and ("zeros" in parts) is not symmetric
    assert parts["codes"].numel() == -(-rows * groups * width * (4 if bits <= 4 else 8) // 8)
    assert np.array_equal(numbers(shape, parts), matrix.dequantize().numpy())


@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.0123, torch.float16), (6e-8, torch.float32), (1e5, torch.float32), (-8.0, torch.float16)]
)
def test_scales_are_float16_where_it_holds_them(scale: float, dtype: torch.dtype) -> None:
    stored = torch.tensor([[scale]]).to(torch.bfloat16)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    found = laid_out(Quantized(codes, stored, codes[:, :1] + 8, Grid(4, 32, True)))["scales"]
    assert found.dtype == dtype and torch.equal(found.float(), stored.float())


@pytest.mark.parametrize(
    "spec",
    [W4, W4 | {"format": "gptq"}, W4 | {"symmetric": False}, W4 | {"bits": 3, "group_size": -1},
     W4 | {"overrides": {"*.down_proj": {"bits": 8, "group_size": 64}}}, W4 | {"lm_head": True},
     W4 | {"ignore": ["*.down_proj"]}, {"method": "dynamic"}],
    ids=["compressed-tensors", "gptq", "asymmetric", "3 bits, whole rows", "mixed", "head", "ignored", "inputs too"],
)  # fmt: skip
def test_the_codes_are_those_of_the_checkpoint(made: Made, tmp_path: Path, spec: dict[str, Any]) -> None:
    folder = made(**spec)
    written = exported(folder, tmp_path)
    config, tensors = read(written)
    view = DequantizedCheckpoint(Checkpoint(folder)).unrounded()
    codes = load_file(written.folder / "read" / "codes.safetensors")
    rows = request(written)["modules"]
    assert {row["module"] for row in rows} == set(view.grids) and len(written.codes) == written.carried == len(rows)
    wanted = view.load(view.tensors)
    for row in rows:
        assert row["codes"] == row["module"]
        parts = {
            name.rpartition(".")[2]: codes.pop(name) for name in list(codes) if name.startswith(row["codes"] + ".")
        }
        assert np.array_equal(numbers(row, parts), wanted.pop(f"{row['module']}.weight").numpy()), row["module"]
        placeholder = tensors.pop(f"{row['module']}.weight")
        assert placeholder.dtype == torch.bfloat16 and list(placeholder.shape) == [row["rows"], row["columns"]]
    assert not codes and "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


def test_a_head_reads_the_codes_of_embeddings_that_it_is_tied_to(made: Made, tmp_path: Path) -> None:
    written = exported(made(**W4, embeddings=True), tmp_path)
    rows = {row["module"]: row for row in request(written)["modules"]}
    assert rows["lm_head"] == rows["model.embed_tokens"] | {"module": "lm_head"}
    assert rows["lm_head"]["codes"] == "model.embed_tokens" and read(written)[0]["tie_word_embeddings"] is True
    assert len(written.codes) == 15
    assert read(exported(made(**W4, lm_head=True), tmp_path))[0]["tie_word_embeddings"] is False


def test_inputs_are_rounded_on_request_alone(made: Made, tmp_path: Path) -> None:
    folder = made(**W4)
    assert request(exported(folder, tmp_path))["options"] == {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    assert request(exported(folder, tmp_path, int8_inputs=True))["options"] == {}


def test_a_dense_checkpoint_is_traced_as_it_is(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    config, tensors = read(written)
    stored = load_file(dense / "model.safetensors")
    assert tensors.keys() == stored.keys() and all(torch.equal(tensors[name], stored[name]) for name in stored)
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert (request(written)["dtype"], request(written)["modules"], len(written.codes)) == (None, [], 0)
    assert (written.folder / "read" / "tokenizer.json").read_bytes() == (dense / "tokenizer.json").read_bytes()
    wide = exported(dense, tmp_path, kind="f32")
    assert (request(wide)["dtype"], read(wide)[0]["dtype"]) == ("fp32", "float32")


@pytest.mark.parametrize("change", ["a norm in float32", "a head of its own"])
def test_what_transformers_would_round_or_tie_is_not(dense: Path, tmp_path: Path, change: str) -> None:
    """One dtype is loaded for all tensors, and config.json says tied."""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((dense / name).read_bytes())
    tensors = load_file(dense / "model.safetensors")
    if change == "a norm in float32":
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-6
    else:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, other / "model.safetensors")
    written = exported(other, tmp_path)
    config = read(written)[0]
    wanted = ("float32", True, "fp32") if change == "a norm in float32" else ("bfloat16", False, None)
    assert (config["dtype"], config["tie_word_embeddings"], request(written)["dtype"]) == wanted


def test_codes_become_weights_on_request(made: Made, tmp_path: Path) -> None:
    folder = made(**W4)
    written = exported(folder, tmp_path, kind="f32")
    config, tensors = read(written)
    view = DequantizedCheckpoint(Checkpoint(folder)).unrounded()
    wanted = view.load(view.tensors)
    assert config["dtype"] == "float32" and (len(written.codes), request(written)["modules"]) == (0, [])
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name].float()) for name in wanted)
    assert written.remarks == ["14 quantized matrices are written as float32"]


REMARKS: dict[str, tuple[dict[str, Any], str]] = {
    "3 bits": (W4 | {"bits": 3}, "3-bit codes of 14 matrices take the next of (4, 8) bits each; none changes"),
    "rounded inputs": (
        {"method": "dynamic"},
        "the checkpoint rounds the inputs of linears to 8 bits by its own scales;",
    ),
}


@pytest.mark.parametrize("case", REMARKS)
def test_what_is_not_as_in_the_checkpoint_is_said(made: Made, tmp_path: Path, case: str) -> None:
    spec, line = REMARKS[case]
    written = exported(made(**spec), tmp_path)
    assert len(written.remarks) == 1 and written.remarks[0].startswith(line)
    assert exported(made(**W4), tmp_path).remarks == []


def test_wide_scales_are_said(dense: Path, tmp_path: Path) -> None:
    """bfloat16 holds scales that float16 does not."""
    tensors = load_file(dense / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 2.0**-20
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((dense / name).read_bytes())
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    written = exported(quantized(other, tmp_path / "work", **W4), tmp_path)
    assert written.remarks == ["scales of 1 matrices are float32: float16 does not hold each of them"]
    kept = load_file(written.folder / "read" / "codes.safetensors")
    wide = [name for name, values in kept.items() if values.dtype == torch.float32]
    assert wide == ["model.layers.1.mlp.up_proj.scales"]


ROPE = {"rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", **ROPE, "factor": 4.0}
LONG = {
    "rope_type": "longrope", **ROPE, "long_factor": [1.5] * 8, "short_factor": [1.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LAYERS = {"sliding_attention": {"rope_type": "default", **ROPE}, "full_attention": DYNAMIC}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "family": ("stablelm", {}, "optimum-intel does not make 'stablelm' models rightly, or was not tried; supported:"),
    "dynamic": ("llama", {"rope_parameters": DYNAMIC}, "rope_type dynamic: optimum-intel fixes such positions at one"),
    "long": (
        "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, "rope_type longrope: optimum-intel"
    ),
    "of one layer": ("gemma3_text", {"rope_parameters": LAYERS}, "rope_type dynamic: optimum-intel fixes such"),
    "bounds": ("gemma2", {}, "optimum-intel does not make 'gemma2' models rightly, or was not tried; supported:"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_traced_otherwise_is_refused_by_name(tmp_path: Path, case: str) -> None:
    family, config, message = REFUSED[case]
    folder = make_model(tmp_path / "model", family, **config)
    with pytest.raises(ModelError) as caught:
        exported(folder, tmp_path)
    assert message in str(caught.value) and not (tmp_path / "out").exists()


def test_codes_that_it_can_not_have_are_refused_by_name(made: Made, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has float8 weights; use --type f32, or quantize it to whole numbers"):
        exported(made(method="dynamic", dtype="fp8"), tmp_path)
    assert len(exported(made(method="dynamic", dtype="fp8"), tmp_path, kind="f32").codes) == 0
    with pytest.raises(ModelError, match="has no codes here, and OpenVINO rounds inputs only of linears that do"):
        exported(dense, tmp_path, int8_inputs=True)
    with pytest.raises(ModelError, match="here: a.b has groups of an odd number of columns; use --type f32"):
        carried_grids("here", {"a.b": Grid(3, -1, True)}, lambda module: 33, "auto", False)
    assert carried_grids("here", {"a.b": Grid(8, -1, True)}, lambda module: 33, "auto", False)


FAILURES = {
    "echo tracing; echo 'ValueError: 1' >&2; exit 1": (
        DscompressError,
        "optimum-intel with OpenVINO 2026.4.1 ended without an answer (ValueError: 1)",
    ),
    "exit 0": (DscompressError, "optimum-intel with OpenVINO 2026.4.1 ended without a model"),
    "kill -9 $$": (DscompressError, "OpenVINO 2026.4.1 stopped by signal 9"),
    "echo 'OSError: [Errno 28] No space left on device'; exit 1": (OutputError, "out: no space left on the disk"),
}


@pytest.mark.parametrize("more", FAILURES)
def test_where_it_fails_nothing_is_left_and_what_was_there_stays(dense: Path, tmp_path: Path, more: str) -> None:
    exported(dense, tmp_path)
    (tmp_path / "out" / "old").touch()
    kind, message = FAILURES[more]
    with pytest.raises(kind) as caught:
        export_openvino(dense, tmp_path / "out", environment(tmp_path / "python", more), reporter=Reporter(quiet=True))
    assert type(caught.value) is kind and message in str(caught.value)
    assert (tmp_path / "out" / "old").exists() and {path.name for path in tmp_path.iterdir()} == {"out", "python"}


def test_it_replaces_what_is_ours_and_nothing_else(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    mark = written.folder / "dscompress-export.json"
    assert json.loads(mark.read_text())["openvino"] == "2026.4.1"
    (written.folder / "old").touch()
    assert not (exported(dense, tmp_path).folder / "old").exists()
    mark.unlink()
    with pytest.raises(OutputError, match="out: exists, and was not written by dscompress; name another folder"):
        exported(dense, tmp_path)


def test_sizes_are_measured(dense: Path, tmp_path: Path) -> None:
    written = exported(dense, tmp_path)
    sizes = [file.stat().st_size for file in written.folder.rglob("*") if file.is_file()]
    mark = (written.folder / "dscompress-export.json").stat().st_size
    assert (written.bytes, written.weights) == (sum(sizes) - mark, 5)
    facts = dict(written.facts())
    assert facts["folder"] == str(tmp_path / "out")
    assert facts["size"].endswith("5 of them openvino_model.xml and its data)")


def test_other_constants_are_found() -> None:
    parts = {"codes": torch.arange(4, dtype=torch.uint8), "scales": torch.ones(2, 1), "zeros": torch.zeros(1)}
    digests = Digests()
    digests.add("a", parts)
    digests.add("b", {name: parts[name] for name in ("codes", "scales")})
    kept = {name: list(each) for name, each in digests.modules.items()}
    assert kept["a"][0] == "054edec1d0211f624fed0cbca9d4f9400b0e491c43742af2c5b0abebf0c990d8" and kept["b"][2] == ""
    assert digests.other(kept) == [] and digests.other({"a": kept["a"]}) == ["b"]
    for place in range(3):
        changed = [("x" if at == place else each) for at, each in enumerate(kept["a"])]
        assert digests.other(kept | {"a": changed}) == ["a"]


@pytest.mark.parametrize(
    "spec",
    [None, W4, W4 | {"symmetric": False}, W4 | {"bits": 3, "group_size": -1}, W4 | {"lm_head": True},
     W4 | {"embeddings": True}, {"method": "dynamic"}],
    ids=["dense", "4 bits", "zero points", "3 bits, whole rows", "head", "embeddings", "8 bits"],
)  # fmt: skip
def test_planned_bytes_are_those_of_the_constants(
    dense: Path, made: Made, tmp_path: Path, spec: dict[str, Any] | None
) -> None:
    stage = {"kind": "quantize", **spec} if spec else {"kind": "prune", "shape": {"intermediate_size": 128}}
    recipe = Recipe.model_validate({"name": "a", "model": str(dense), "output": "o", "stages": [stage]})
    planned = foreseen_result(plan_run(recipe, dense))
    written = exported(made(**spec) if spec else dense, tmp_path)
    tensors = read(written)[1]
    codes = load_file(written.folder / "read" / "codes.safetensors") if spec else {}
    kept = [values for name, values in tensors.items() if f"{name.removesuffix('.weight')}.codes" not in codes]
    bytes_of_dense = sum(values.numel() * (4 if values.dim() == 1 else 2) for values in kept)  # norms are widened
    to_openvino, stored = ExportSpec(to="openvino"), bytes_of_dense + sum(each.nbytes for each in codes.values())
    assert export_bytes(to_openvino, planned) == stored
    # Beside it: what is traced, unless those are links, and the model before its codes are put in.
    whole = sum(info.bytes if len(info.shape) == 2 else 2 * info.bytes for info in Checkpoint(dense).tensors.values())
    assert disk_bytes(to_openvino, planned) == stored + (2 * whole if spec else whole)


# The command


def test_without_the_program(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("compress.system.programs.CLONE", tmp_path)
    monkeypatch.setattr("compress.system.programs.find_spec", lambda name: None)
    done = invoke("export", dense, "--to", "openvino")
    assert done.exit_code == 2 and done.stderr == (
        f"error: --to openvino: OpenVINO is not installed here and there is no .venv-openvino in {tmp_path}; "
        "pip install 'dscompress[openvino]' in an environment of its own, or name the Python of an environment that "
        "has it\n"
    )


def test_the_command_says_what_it_wrote(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    python, options = environment(tmp_path / "python").python, ("--no-check", "-q", "-o", "here")
    done = invoke("export", made(**W4), "--to", "openvino", "--python", python, *options)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"folder      {tmp_path / 'here'}"
    assert lines[1].endswith(" bytes, 5 of them openvino_model.xml and its data)")
    assert lines[2] == "codes       14 matrices have the checkpoint's own codes, unchanged"
    assert lines[3].startswith("run         python -c 'import openvino_genai as og; ")
    assert len(lines) == 4
    again = ExportSpec(to="openvino", python=str(python), int8_inputs=True)
    written = exporter_of(again).write(made(**W4), tmp_path / "again", Reporter(quiet=True))
    assert isinstance(written, Written) and request(written)["options"] == {}


def test_what_is_kept_of_it_is_read_again(made: Made, tmp_path: Path) -> None:
    """As a run that was stopped does, from JSON."""
    written = exported(made(**W4 | {"bits": 3}), tmp_path)
    exporter = exporter_of(ExportSpec(to="openvino", python=str(tmp_path / "python")))
    assert exporter.load(json.loads(json.dumps(exporter.dump(written))), written.folder) == written
    assert exporter.version == "2026.4.1" and exporter.made_by("a") == [1, "2026.4.1"]
