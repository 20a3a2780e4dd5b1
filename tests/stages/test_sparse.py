"""Single weights that become zero, from a checkpoint to a checkpoint, alone and while they are quantized."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from quantized import Stops, opens
from quantized import quantize as run_quantize
from random_models import make_model, random_tokens
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.errors import ModelError, NumericalError, RecipeError
from compress.evaluation import verify
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.prune.patterns import has_pattern, magnitude
from compress.recipe.prune import PatternStage
from compress.recipe.quantize import QuantizeStage, WeightOnlyStage
from compress.recipe.text import CalibrationSpec
from compress.records import SparseModule
from compress.stages.contract import Result, Setting
from compress.stages.prune.plan import plan
from compress.stages.prune.run import run
from compress.stages.prune.sparse import check_not_sparse
from compress.stages.quantize import solve as solve_module
from compress.system.progress import Reporter

CPU = torch.device("cpu")
SETTING = Setting("stages.0", CalibrationSpec(source="x.txt", samples=8, sequence_length=24))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers of widths 64 and 128, with biases."""
    sizes = {"intermediate_size": 128, "num_hidden_layers": 3, "attention_bias": True}
    return make_model(tmp_path_factory.mktemp("model") / "dense", **sizes)


def context(dtype: torch.dtype = torch.bfloat16, sequences: int = 48) -> Context:
    tokens = TokenSet(random_tokens(sequences, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def stage(**settings: Any) -> PatternStage:
    return PatternStage(kind="prune", **{"pattern": "2:4", **settings})


def sparsify(parent: Path, output: Path, around: Context | None = None, **settings: Any) -> Result:
    return run(stage(**settings), Checkpoint(parent), output, around or context())


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def linears(folder: Path) -> list[str]:
    return [name for name in Checkpoint(folder).tensors if name.endswith("_proj.weight")]


METHODS = [(m, p) for m in ("sparsegpt", "wanda", "magnitude") for p in ("2:4", "4:8", "unstructured")]


@pytest.mark.parametrize(("method", "pattern"), METHODS)
def test_every_linear_of_the_layers_has_the_pattern(model: Path, tmp_path: Path, method: str, pattern: str) -> None:
    result = sparsify(model, tmp_path, method=method, pattern=pattern)
    written, source, found = tmp_path / "checkpoint", tensors_of(model), tensors_of(tmp_path / "checkpoint")
    stock = opens(written)
    assert torch.equal(stock(context().probe).logits[0].float(), result.logits)
    own = verify.own_logits(Checkpoint(written), context().probe[0], CPU, torch.bfloat16, False)
    assert torch.equal(own, result.logits) and float(own.std()) > 0.1
    modules = {n: m for n, m in stock.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    assert {f"{name}.weight" for name in modules} == set(linears(model))
    for name, module in modules.items():
        weight = module.weight
        if pattern != "unstructured":
            assert has_pattern(weight, pattern), name
        assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01), name
        kept = weight[weight != 0] == source[f"{name}.weight"][weight != 0]
        assert bool(kept.all()) == (method != "sparsegpt"), name
    assert set(found) == set(source) and Checkpoint(written).config == Checkpoint(model).config
    for name, tensor in source.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        if name not in linears(model):
            assert torch.equal(found[name], tensor), name


def test_the_record_has_zeros_and_errors(model: Path, tmp_path: Path) -> None:
    errors = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        record = sparsify(model, tmp_path / method, method=method, pattern="unstructured", sparsity=0.3).record
        assert [layer.layer for layer in record.layers] == [0, 1, 2]
        rows = [row for layer in record.layers for row in layer.modules]
        assert all(isinstance(row, SparseModule) for row in rows)
        assert {f"{row.name}.weight": list(row.shape) for row in rows} == {
            name: list(Checkpoint(model).tensors[name].shape) for name in linears(model)
        }
        assert all(isinstance(row, SparseModule) and row.zeros == pytest.approx(0.3, abs=0.01) for row in rows)
        errors[method] = [row.error for row in rows]
    assert errors["magnitude"] == [None] * 21
    assert all(0 < one < other < 0.2 for one, other in zip(errors["sparsegpt"], errors["wanda"], strict=True))


def test_magnitude_needs_no_text_and_is_what_it_says(model: Path, tmp_path: Path) -> None:
    assert not stage(method="magnitude").calibrates and stage(method="wanda").calibrates
    sparsify(model, tmp_path, replace(context(), tokens=None), method="magnitude")
    source, found = tensors_of(model), tensors_of(tmp_path / "checkpoint")
    for name in linears(model):
        assert torch.equal(found[name], magnitude(source[name], "2:4"))


@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_a_stopped_run_continues_to_the_same_files(model: Path, tmp_path: Path, method: str) -> None:
    whole = sparsify(model, tmp_path / "whole", method=method)
    with pytest.raises(KeyboardInterrupt):
        sparsify(model, tmp_path / "stopped", replace(context(), reporter=Stops(1)), method=method)
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    continued = sparsify(model, tmp_path / "stopped", method=method)
    assert continued.record.resumed_layers >= 1 and torch.equal(continued.logits, whole.logits)
    files = sorted(path.name for path in (tmp_path / "whole" / "checkpoint").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "stopped" / "checkpoint").iterdir())
    for name in files:
        one, other = (tmp_path / part / "checkpoint" / name for part in ("whole", "stopped"))
        assert one.read_bytes() == other.read_bytes(), name


def test_solving_for_the_original_model_helps(model: Path, tmp_path: Path) -> None:
    """The last layer's states are nearer to the original's than wanda's and magnitude's, on other text too."""
    probe = random_tokens(8, 24, 5)
    wanted = opens(model, torch.float32)(probe).logits
    distances = []
    for method in ("sparsegpt", "wanda", "magnitude"):
        sparsify(model, tmp_path / method, context(torch.float32, 256), method=method)
        found = opens(tmp_path / method / "checkpoint", torch.float32)(probe).logits
        distances.append(float((found - wanted).square().mean()))
    assert distances[0] < 0.9 * min(distances[1:])


# ---- what is refused


def test_what_is_sparse_already_is_refused(model: Path, tmp_path: Path) -> None:
    for pattern in ("2:4", "4:8"):
        sparsify(model, tmp_path / pattern, method="magnitude", pattern=pattern)
        for method in ("magnitude", "sparsegpt"):
            with pytest.raises(
                ModelError, match="is sparse already: . of every . weights are kept; start from"
            ) as error:
                sparsify(tmp_path / pattern / "checkpoint", tmp_path / "again" / pattern / method, method=method)
            assert "model.layers.0." in str(error.value) and "\n" not in str(error.value)
    tensors = tensors_of(model)
    check_not_sparse(tensors)
    check_not_sparse({"bias": torch.zeros(8), "a.weight": torch.zeros(8, 8), "table": torch.eye(8)})
    with pytest.raises(ModelError, match="^a.weight is sparse already"):
        check_not_sparse({"a.weight": magnitude(next(iter(tensors.values())), "2:4")})


def test_widths_that_neighbours_do_not_divide_are_refused(tmp_path: Path) -> None:
    odd = make_model(tmp_path / "odd", intermediate_size=90)
    found = plan(stage(), Checkpoint(odd), SETTING)
    assert found.problems == [
        "stages.0.pattern: 2:4 needs widths that 4 divides, and model.layers.0.mlp.down_proj has 90; use unstructured"
    ]
    assert len(plan(stage(pattern="4:8"), Checkpoint(odd), SETTING).problems) == 1
    found = plan(stage(pattern="unstructured"), Checkpoint(odd), SETTING)
    assert not found.problems and found.shapes is not None
    sparsify(odd, tmp_path / "work", pattern="unstructured")
    layers = WeightOnlyStage(kind="quantize", pattern="2:4", group_size=-1)
    with pytest.raises(RecipeError, match="2:4 needs widths that 4 divides, and model.layers.0.mlp.down_proj has 90"):
        run_quantize(layers, Checkpoint(odd), tmp_path / "quantized", context())


def test_models_without_linears_are_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    sizes |= dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"))
    gpt2 = make_model(tmp_path / "gpt2", "gpt2", **sizes, num_key_value_heads=None, head_dim=None)
    with pytest.raises(ModelError, match="model_type 'gpt2' is not supported: its layers have no nn.Linear"):
        sparsify(gpt2, tmp_path / "work")


def test_plan_keeps_the_shapes(model: Path) -> None:
    source = Checkpoint(model)
    for method in ("sparsegpt", "magnitude"):
        found = plan(stage(method=method), source, SETTING)
        assert not found.problems and found.shapes is not None and found.shapes.bytes == source.bytes
        assert dict(found.shapes.tensors) == dict(source.tensors) and found.shapes.config == source.config
        assert found.lines[0] == ("stage", f"{method} 2:4: 21 matrices; the zeros are stored, so the size stays")


# ---- zeros and codes in one pass


def dense_of(written: Path) -> dict[str, Tensor]:
    view = DequantizedCheckpoint(Checkpoint(written))
    return view.load([name for name in view.tensors if name.endswith("_proj.weight")])


@pytest.mark.parametrize(
    ("pattern", "settings"),
    [
        ("2:4", {}),
        ("4:8", {"bits": 3, "symmetric": False, "lm_head": True, "embeddings": True}),
        ("2:4", {"bits": 2, "symmetric": False, "format": "gptq", "group_size": -1}),
        ("4:8", {"bits": 8, "format": "gptq", "drift_correction": 0.0, "clip": "none"}),
    ],
)
def test_quantized_matrices_have_the_pattern(
    model: Path, tmp_path: Path, pattern: str, settings: dict[str, Any]
) -> None:
    spec = WeightOnlyStage(kind="quantize", **{"group_size": 32, "pattern": pattern, **settings})
    record = run_quantize(spec, Checkpoint(model), tmp_path, context())
    dense = dense_of(tmp_path / "checkpoint")
    assert set(dense) == set(linears(model)) and all(has_pattern(weight, pattern) for weight in dense.values())
    assert not any(module.fallback for layer in record.layers for module in layer.modules)
    view = DequantizedCheckpoint(Checkpoint(tmp_path / "checkpoint"))
    head = view.load(["lm_head.weight"])["lm_head.weight"] if settings.get("lm_head") else torch.ones(1)
    assert float((head == 0).float().mean()) < 0.4  # as rounding leaves it


def test_zeros_of_a_prune_stage_stay(model: Path, tmp_path: Path) -> None:
    sparsify(model, tmp_path / "sparse")
    parent = tensors_of(tmp_path / "sparse" / "checkpoint")
    for pattern in (None, "2:4"):
        spec = WeightOnlyStage(kind="quantize", group_size=32, bits=4, pattern=pattern)
        output = tmp_path / str(pattern)
        run_quantize(spec, Checkpoint(tmp_path / "sparse" / "checkpoint"), output, context())
        kept = [
            bool((weight[parent[name] == 0] == 0).all()) for name, weight in dense_of(output / "checkpoint").items()
        ]
        assert all(kept) == (pattern is not None)


def test_a_fallback_has_the_pattern_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise NumericalError("the Hessian is not positive definite")

    monkeypatch.setattr(solve_module, "factorize", fails)
    spec = WeightOnlyStage(kind="quantize", group_size=32, bits=4, symmetric=False, pattern="2:4")
    record = run_quantize(spec, Checkpoint(model), tmp_path, context())
    assert all(module.fallback for layer in record.layers for module in layer.modules)
    assert all(has_pattern(weight, "2:4") for weight in dense_of(tmp_path / "checkpoint").values())


def test_a_pattern_needs_a_solver_that_sees_the_inputs() -> None:
    stages: TypeAdapter[Any] = TypeAdapter(QuantizeStage)
    with pytest.raises(ValidationError, match="needs the inputs, which rtn never sees; remove it or use method: gptq"):
        stages.validate_python({"kind": "quantize", "method": "rtn", "pattern": "2:4"})
    with pytest.raises(ValidationError):
        stages.validate_python({"kind": "quantize", "pattern": "unstructured"})
    assert stages.validate_python({"kind": "quantize", "method": "rtn", "pattern": None}).pattern is None
    assert stages.validate_python({"kind": "quantize", "pattern": "2:4"}).title == "gptq 4-bit 2:4"
