"""format: torchao. What is computed while quantizing is what stock transformers and torchao compute, bit for bit."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from quantized import PROBE, opens, quantize, stop_after
from random_models import make_model, random_tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, TorchAoConfig

from compress.data.calibration import TokenSet
from compress.errors import ModelError
from compress.evaluation import verify
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, read_part
from compress.quant.grid import FakeQuantize
from compress.recipe.quantize import WeightActivationStage
from compress.runs.tools import inspect
from compress.stages import layerwise as stage_module
from compress.stages.quantize.solve import Solver
from compress.system import extras
from compress.system.progress import Reporter

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(extras.torchao_problem() is not None, reason="torchao is not installed")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models, one of a kind."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(family: str = "llama", dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
        key = f"{family}-{dtype}-{len(config)}"
        if key not in made:
            made[key] = make_model(folder / key, family, dtype=dtype, **({"intermediate_size": 128} | config))
        return made[key]

    return model


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(6, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def spec(bits: int = 8, **settings: Any) -> WeightActivationStage:
    return WeightActivationStage(kind="quantize", method="dynamic", bits=bits, format="torchao", **settings)


def check_logits(work: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The finished model in memory, our reader and the stock loader compute the same."""
    computed = read_part(work / PROBE)[0]["logits"]
    own = verify.own_logits(Checkpoint(work / "checkpoint"), context().probe[0], CPU, dtype, False)
    assert torch.equal(own, computed) and float(own.std()) > 0.1
    stock = opens(work / "checkpoint", dtype)
    assert torch.equal(stock(context().probe, use_cache=False).logits[0].float(), computed)
    return stock


@needs_torchao
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt_neox", "opt"])
@pytest.mark.parametrize("bits", [8, 4])
def test_stock_loaders_compute_what_was_computed(
    models: Callable[..., Path], tmp_path: Path, family: str, bits: int
) -> None:
    config = {"ffn_dim": 128, "word_embed_proj_dim": 64} if family == "opt" else {}
    rounding = "rtn" if family == "qwen2" else "gptq"
    settings = spec(bits, weight_rounding=rounding, smooth=0.5 if family == "llama" else None)
    quantize(settings, Checkpoint(models(family, **config)), tmp_path, context())
    stock = check_logits(tmp_path)
    linears = {module: type(module.weight).__name__ for module in stock.modules() if isinstance(module, nn.Linear)}
    assert linears.pop(stock.get_output_embeddings()) == "Parameter" and len(linears) > 7
    assert set(linears.values()) == {"Int8Tensor" if bits == 8 else "IntxUnpackedToInt8Tensor"}


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("run_in", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(
    models: Callable[..., Path], tmp_path: Path, stored: torch.dtype, run_in: torch.dtype, bits: int
) -> None:
    """8-bit weights run in any dtype; 4-bit ones in their own, and the stock loader is not asked otherwise."""
    quantize(spec(bits), Checkpoint(models("llama", stored)), tmp_path, context(run_in))
    if bits == 8 or run_in == stored:
        check_logits(tmp_path, run_in)
        return
    expected, tokens = read_part(tmp_path / PROBE)[0]["logits"], context().probe[0]
    with verify.opening(tmp_path / "checkpoint", tokens, CPU, run_in, False) as opened:
        verified = opened(expected).verified
    assert (verified.loader, verified.max_logit_difference, verified.passed) == (verify.OWN, 0, True)
    assert (
        verified.note == f"torchao's 4-bit weights run in {stored} only, and this was computed in {run_in}; not asked"
    )


@needs_torchao
@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (4, -1), (4, 32), (4, 64)])
def test_files_are_laid_out_as_transformers_writes_them(
    models: Callable[..., Path], tmp_path: Path, bits: int, group_size: int
) -> None:
    asked = spec(bits, group_size=None if bits == 8 else group_size, ignore=["*.1.*.o_proj"])
    quantize(asked, Checkpoint(models()), tmp_path, context())
    stock = check_logits(tmp_path)
    assert type(stock.model.layers[1].self_attn.o_proj.weight) is nn.Parameter
    config = TorchAoConfig.from_dict(
        json.loads((tmp_path / "checkpoint" / "config.json").read_text())["quantization_config"]
    )
    theirs = AutoModelForCausalLM.from_pretrained(models(), dtype=torch.bfloat16, quantization_config=config)
    theirs.save_pretrained(tmp_path / "theirs")
    files = [tmp_path / folder / "model.safetensors" for folder in ("checkpoint", "theirs")]
    tensors = [load_file(file) for file in files]
    optional = {name for name in tensors[1] if bits == 8 and name.endswith("_zero_point")}  # zeros, which say nothing
    assert tensors[0].keys() == tensors[1].keys() - optional
    assert all(tensor.shape == tensors[1][name].shape for name, tensor in tensors[0].items())
    headers = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            header = {key: json.loads(value) for key, value in opened.metadata().items() if key != "format"}
        names = sorted(header.pop("tensor_names"))
        headers.append((names, {name: (row["_type"], row.get("_data")) for name, row in header.items()}))
    assert headers[0] == headers[1]
    configs = [json.loads((file.parent / "config.json").read_text())["quantization_config"] for file in files]
    assert configs[0].items() <= configs[1].items()
    assert configs[0]["modules_to_not_convert"] == ["model.layers.1.self_attn.o_proj", "lm_head"]


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_solver(
    models: Callable[..., Path], tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = {}

    def note(usual: Any, self: Any, *arguments: Any) -> Any:
        found = usual(self, *arguments)
        solved.update({name: each.quantized for name, each in found.items()})
        return found

    usual = Solver.solve
    monkeypatch.setattr(Solver, "solve", lambda *arguments: note(usual, *arguments))
    quantize(spec(bits), Checkpoint(models()), tmp_path, context())
    stock = opens(tmp_path / "checkpoint")
    assert len(solved) == 14
    for name, matrix in solved.items():
        weight = stock.get_submodule(name).weight
        assert torch.equal(weight.qdata.int() + matrix.grid.middle, matrix.codes.int())
        assert torch.equal(weight.scale, matrix.scale.to(torch.bfloat16))
        assert torch.equal(weight.dequantize(), matrix.dequantize(torch.bfloat16))
        assert int(matrix.codes.max()) - int(matrix.codes.min()) > (200 if bits == 8 else 10)


@needs_torchao
def test_linears_multiply_whole_numbers(models: Callable[..., Path], tmp_path: Path) -> None:
    quantize(spec(), Checkpoint(models()), tmp_path, context())
    stock = opens(tmp_path / "checkpoint")
    called: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        stock(context().probe, use_cache=False)
    assert called["aten._int_mm.default"] == 14
    assert called["aten.mm.default"] + called["aten.linear.default"] == 1  # the head


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 300.0])
def test_inputs_are_rounded_as_torchao_does(dtype: torch.dtype, size: float) -> None:
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as library

    x = (torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    x[0, 0], x[0, 1], x[0, 2] = 0, x[0, 1].abs(), -x[0, 2].abs()
    wanted = library._apply_int8_act_asym_per_token_quant_dequant(x)
    assert torch.equal(FakeQuantize(False, asymmetric=True)(x), wanted)


@needs_torchao
def test_shards_know_the_whole_model(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "merge_parts", partial(stage_module.merge_parts, max_shard_bytes=1))
    quantize(spec(), Checkpoint(models()), tmp_path, context())
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) == 3
    check_logits(tmp_path)


@needs_torchao
@pytest.mark.parametrize("bits", [8, 4])
def test_a_stopped_run_continues_to_the_same_bytes(models: Callable[..., Path], tmp_path: Path, bits: int) -> None:
    parent = Checkpoint(models(num_hidden_layers=3))
    quantize(spec(bits, smooth=0.5), parent, tmp_path / "whole", context())
    stop_after(2, spec(bits, smooth=0.5), parent, tmp_path / "stopped", context())
    assert quantize(spec(bits, smooth=0.5), parent, tmp_path / "stopped", context()).resumed_layers == 2
    for name in ("checkpoint/model.safetensors", "checkpoint/config.json", PROBE):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@needs_torchao
def test_reading(models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (8, 4):
        quantize(spec(bits), Checkpoint(models()), tmp_path / str(bits), context())
    lines = ["\n".join(inspect(tmp_path / bits / "checkpoint")) for bits in "84"]
    assert "8 bits, a scale per row, dynamic inputs" in lines[0] and "4 bits, group 32, dynamic inputs" in lines[1]
    folder = tmp_path / "8" / "checkpoint"
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(
        ModelError, match=r"quantized as torchao; torchao is not installed; pip install 'dscompress\[torchao\]'$"
    ):
        DequantizedCheckpoint(Checkpoint(folder))
    monkeypatch.undo()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["quant_type"]["default"]["_type"] = "Int8WeightOnlyConfig"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="readable are dynamic int8 with a scale per row and symmetric 4 bits$"):
        DequantizedCheckpoint(Checkpoint(folder))


# ---- recipes


def problems(**settings: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        WeightActivationStage.model_validate({"kind": "quantize", "method": "dynamic"} | settings)
    return "; ".join(f"{each['loc'][0]}: {each['msg']}" for each in caught.value.errors())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "static"}, "torchao holds method: dynamic only; change method, or use compressed-tensors"),
        ({"overrides": {"*": {"method": "static"}}}, "torchao holds method: dynamic only; change method, or use"),
        ({"dtype": "fp8"}, "torchao holds dtype: int8 only"),
        ({"granularity": "tensor"}, "torchao holds granularity: channel only"),
        ({"kv_cache": "fp8"}, "torchao holds kv_cache: null only"),
    ],
)
def test_what_torchao_has_no_room_for(settings: dict[str, Any], message: str) -> None:
    assert problems(**settings, format="torchao").startswith(f"format: {message}")


def test_4_bits_are_for_torchao() -> None:
    assert problems(bits=4) == "format: bits: 4 with 8-bit inputs needs format: torchao"
    assert problems(group_size=32).startswith("group_size: is for bits: 4;")


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        (None, "torchao is not installed; pip install 'dscompress[torchao]'"),
        ("0.17.1", "torchao 0.17.1 is too old; pip install 'torchao>=0.18'"),
    ],
)
def test_without_torchao(monkeypatch: pytest.MonkeyPatch, installed: str | None, message: str) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda name: installed)
    monkeypatch.setattr(extras, "version", lambda name: installed)
    assert problems(format="torchao") == f"format: {message}"
