"""8-bit stages on models with something unusual: other dtypes, layers left alone, linears elsewhere, dead ones."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import PROBE, quantize
from random_models import make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from compress.data.calibration import TokenSet
from compress.errors import CalibrationError
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.quant.activations import static_fake_quantize
from compress.recipe.quantize import WeightActivationStage
from compress.system.progress import Reporter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(6, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def spec(method: str, **settings: Any) -> WeightActivationStage:
    return WeightActivationStage(kind="quantize", method=method, **settings)


def opens_as_simulated(work: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The checkpoint in stock transformers, which must find all that it looks for, and say what was computed."""
    stock, info = AutoModelForCausalLM.from_pretrained(work / "checkpoint", dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    said = stock.eval()(random_tokens(1, 24, 2), use_cache=False).logits[0].float()
    assert torch.equal(said, load_file(work / PROBE)["logits"])
    return stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("method", ["static", "auto"])
def test_models_stored_in_other_dtypes(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", dtype=dtype)
    quantize(spec(method, budget=10.0), Checkpoint(source), tmp_path, context(torch.float32))
    opens_as_simulated(tmp_path, torch.float32)
    scales = load_file(tmp_path / "checkpoint" / "model.safetensors")
    stored = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert scales["model.layers.0.mlp.up_proj.input_scale"].dtype == stored


@pytest.mark.parametrize("kv_cache", ["fp8", "fp8_per_head"])
def test_a_layer_that_is_left_alone_has_a_cache_too(kv_cache: str, tmp_path: Path) -> None:
    stage = spec("static", dtype="fp8", kv_cache=kv_cache, ignore=["model.layers.0.*"])
    quantize(stage, Checkpoint(make_model(tmp_path / "model")), tmp_path, context())
    stock = opens_as_simulated(tmp_path)
    assert all((layer.self_attn.k_scale > 0).all() for layer in stock.model.layers)


@pytest.mark.parametrize("stage", [spec("dynamic"), spec("static", dtype="fp8", weight_rounding="rtn")])
def test_linears_outside_the_layers_are_left_to_be(stage: WeightActivationStage, tmp_path: Path) -> None:
    """OPT-350m has one behind its embeddings and one in front of its head."""
    source = make_model(tmp_path / "model", "opt", ffn_dim=96, word_embed_proj_dim=32)
    quantize(stage, Checkpoint(source), tmp_path, context())
    opens_as_simulated(tmp_path)


def with_dead_up_proj(folder: Path) -> Path:
    """A model in which the first layer's down_proj gets zeros."""
    source = make_model(folder)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


def test_auto_takes_dynamic_where_inputs_are_all_zero(tmp_path: Path) -> None:
    source = Checkpoint(with_dead_up_proj(tmp_path / "model"))
    record = quantize(spec("auto", budget=10.0), source, tmp_path, context())
    chosen = {module.name: module.inputs for layer in record.layers for module in layer.modules}
    assert chosen.pop("model.layers.0.mlp.down_proj") == "dynamic" and set(chosen.values()) == {"static"}
    opens_as_simulated(tmp_path)
    with pytest.raises(CalibrationError, match=r"^model\.layers\.0\.mlp\.down_proj: all inputs are zero"):
        quantize(spec("static"), source, tmp_path / "static", context())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_inputs_too_small_for_a_scales_dtype_are_not_zero(dtype: torch.dtype) -> None:
    """The smallest scale that is safe to divide by takes their place: processors may flush other dtypes' subnormals."""
    smallest = torch.tensor(1, dtype=torch.int16 if dtype.itemsize == 2 else torch.int32).view(dtype)
    batch = (torch.arange(8) * float(smallest)).to(dtype).view(1, 1, 8)

    def scale(values: Tensor) -> Tensor | None:
        found = static_fake_quantize([values], "minmax", False, dtype)
        return None if found is None else found.scale

    stored = float(smallest) if dtype == torch.float16 else torch.finfo(dtype).tiny
    assert scale(batch) == stored and scale(torch.zeros(1, 1, 8)) is None
