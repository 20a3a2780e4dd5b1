"""Quantized checkpoints read as dense ones: our own, those of other writers, and those that must be refused."""

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle import fake_quantize
from packaging.version import Version
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import ModelError
from compress.evaluation.verify import own_logits
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint

Scheme = tuple[int, int, bool]  # bits, group_size, symmetric
LAYERS = "model.layers.0."


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "model", intermediate_size=128, attention_bias=True)


def weights_of(scheme: Scheme) -> dict[str, Any]:
    bits, group_size, symmetric = scheme
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}


def quantized_by_the_library(weight: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a module as compressed-tensors itself computes and packs them, and what it makes of them again."""
    bits, group_size, symmetric = scheme
    whole = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights_of(scheme)})
    grouped = weight.float().unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    extreme = torch.maximum(high, -low)
    scale = (extreme * 2 / (2**bits - 1) if symmetric else (high - low) / (2**bits - 1)).to(weight.dtype)
    zero = torch.zeros_like(scale) if symmetric else torch.round(-(2 ** (bits - 1)) - low / scale)
    zero = zero.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    state = {"weight": weight, "weight_scale": scale} | ({} if symmetric else {"weight_zero_point": zero})
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(dict(state), whole)
    again = compressor.decompress(dict(packed), whole)["weight"]
    assert torch.allclose(again, fake_quantize(weight, scale, zero, whole.weights), rtol=2e-2, atol=1e-6)
    return packed, again


def foreign(dense: Path, to: Path, schemes: dict[str, Scheme], **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """A copy of a model in which modules (by a part of their name) are quantized by compressed-tensors itself.

    Returns:
        The folder, and the weights that the library reads from it.
    """
    to.mkdir()
    tensors, expected = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        scheme = next((s for part, s in schemes.items() if part in module and name.endswith("proj.weight")), None)
        if scheme is None:
            tensors[name] = expected[name] = tensor
        else:
            packed, expected[name] = quantized_by_the_library(tensor, scheme)
            tensors |= {f"{module}.{local}": t.contiguous() for local, t in packed.items()}
    groups = {
        f"group_{index}": {
            "targets": [f"re:.*{part}.*proj$"],
            "weights": weights_of(scheme),
            "format": "pack-quantized",
        }
        for index, (part, scheme) in enumerate(schemes.items())
    }
    quantization = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": ["lm_head"], **config,
    }  # fmt: skip
    written = json.loads((dense / "config.json").read_text()) | {"quantization_config": quantization}
    (to / "config.json").write_text(json.dumps(written))
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to, expected


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (3, -1), (4, 32), (4, -1), (8, 64)])
def test_what_the_library_writes(dense: Path, tmp_path: Path, bits: int, group_size: int, symmetric: bool) -> None:
    if bits == 3 and Version(metadata.version("compressed-tensors")) < Version("0.18"):
        pytest.skip("older ones leave gaps between 3-bit codes")
    folder, expected = foreign(dense, tmp_path / "model", {"layers": (bits, group_size, symmetric)})
    view = DequantizedCheckpoint(Checkpoint(folder))
    assert set(view.tensors) == set(expected) and view.folder == folder
    assert len(view.grids) == 14
    for module, grid in view.grids.items():
        width = expected[f"{module}.weight"].shape[1]
        wanted = width if group_size == -1 else group_size
        assert (grid.bits, grid.columns_per_group(width), grid.symmetric) == (bits, wanted, symmetric)
    loaded = view.load(expected)
    for name, tensor in expected.items():
        quantized = name.removesuffix(".weight") in view.grids
        assert loaded[name].dtype == (torch.float32 if quantized else torch.bfloat16)
        assert torch.equal(loaded[name].to(torch.bfloat16), tensor), name


def test_mixed_schemes_of_another_writer_give_the_stock_loaders_logits(dense: Path, tmp_path: Path) -> None:
    schemes = {
        "down": (8, -1, True),
        "self_attn": (4, 64, True),
        "1.mlp.gate": (4, 32, True),
        "1.mlp.up": (2, 32, True),
    }
    folder, expected = foreign(dense, tmp_path / "model", schemes)
    view = DequantizedCheckpoint(Checkpoint(folder))
    assert len(view.grids) == 12 and f"{LAYERS}mlp.up_proj" not in view.grids
    tokens = random_tokens(1, 24)
    with torch.no_grad():
        stock = load_stock(folder, torch.bfloat16)(tokens, use_cache=False).logits[0].float()
        own = own_logits(Checkpoint(folder), tokens[0], torch.device("cpu"), torch.bfloat16, False)
    assert torch.equal(own, stock)
    assert set(expected) == set(view.tensors)


def test_a_dense_checkpoint_is_passed_through(dense: Path) -> None:
    checkpoint = Checkpoint(dense)
    view = DequantizedCheckpoint(checkpoint)
    assert view.grids == {} and view.tensors == checkpoint.tensors
    for name, tensor in view.load(list(view.tensors)).items():
        stored = checkpoint.load([name])[name]
        assert tensor.dtype == stored.dtype and torch.equal(tensor, stored)


def gptq_by_hand(codes: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor) -> dict[str, Tensor]:
    """The auto-gptq v1 tensors of 4-bit codes [I, O], zero points and scales [G, O]."""
    shifts = torch.arange(8) * 4
    qweight = (codes.long().view(-1, 8, codes.shape[1]) << shifts[:, None]).sum(1)
    qzeros = ((zero.long() - 1).view(zero.shape[0], -1, 8) << shifts).sum(2)
    words = {"qweight": qweight, "qzeros": qzeros}
    return {n: w.to(torch.int32) for n, w in words.items()} | {"scales": scale.half(), "g_idx": g_idx.int()}


def gptq_folder(dense: Path, to: Path, order: bool, **config: Any) -> tuple[Path, str, Tensor]:
    """A copy of the model with one matrix in the auto-gptq format; its name and its weights."""
    to.mkdir()
    module, generator = f"{LAYERS}self_attn.q_proj", torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (64, 64), generator=generator)
    zero, scale = torch.randint(1, 16, (2, 64), generator=generator), torch.rand(2, 64, generator=generator).half()
    g_idx = torch.arange(64) // 32
    g_idx = g_idx[torch.randperm(64, generator=generator)] if order else g_idx
    tensors = {n: t for n, t in load_file(dense / "model.safetensors").items() if n != f"{module}.weight"}
    tensors |= {f"{module}.{n}": t for n, t in gptq_by_hand(codes, zero, scale, g_idx).items()}
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": order, **config}
    quantization["dynamic"] = {rf"-:(?!{re.escape(module)}$)": {}}
    written = json.loads((dense / "config.json").read_text()) | {"quantization_config": quantization}
    (to / "config.json").write_text(json.dumps(written))
    return to, f"{module}.weight", ((codes - zero[g_idx]).float() * scale.float()[g_idx]).t()


@pytest.mark.parametrize("order", [True, False])
def test_gptq_of_another_writer_also_with_an_activation_order(dense: Path, tmp_path: Path, order: bool) -> None:
    folder, name, expected = gptq_folder(dense, tmp_path / "model", order)
    view = DequantizedCheckpoint(Checkpoint(folder))
    assert list(view.grids) == [name.removesuffix(".weight")] and view.grids[name.removesuffix(".weight")].bits == 4
    assert torch.equal(view.load([name])[name], expected)
    assert set(view.tensors) == set(Checkpoint(dense).tensors)
    assert f"{LAYERS}self_attn.q_proj.bias" in view.tensors


@pytest.mark.parametrize("desc_act", [False, True])
def test_gptq_without_a_group_index(dense: Path, tmp_path: Path, desc_act: bool) -> None:
    """Some writers leave it out where groups lie in order; a lost order can't be guessed."""
    folder, name, expected = gptq_folder(dense, tmp_path / "whole", order=False, desc_act=desc_act)
    module = name.removesuffix(".weight")
    without = changed(folder, tmp_path / "without", {f"{module}.g_idx": None})
    if desc_act:
        with pytest.raises(ModelError) as caught:
            DequantizedCheckpoint(Checkpoint(without))
        assert str(caught.value) == (
            f"{without}: {module} has no g_idx, without which its activation order (desc_act) is lost; get the files "
            "again"
        )
        return
    view = DequantizedCheckpoint(Checkpoint(without))
    assert torch.equal(view.load([name])[name], expected)


@pytest.mark.parametrize(("key", "value"), [("bits", 8), ("group_size", 64), ("group_size", -1)])
def test_gptq_tensors_that_are_not_what_the_config_says(dense: Path, tmp_path: Path, key: str, value: int) -> None:
    folder, name, _ = gptq_folder(dense, tmp_path / "model", order=False, **{key: value})
    said = {"bits": 4, "group_size": 32} | {key: value}
    with pytest.raises(ModelError) as caught:
        DequantizedCheckpoint(Checkpoint(folder))
    assert str(caught.value) == (
        f"{folder}: {name.removesuffix('.weight')} holds 4 bits in 2 groups of 64 inputs, config.json says "
        f"{said['bits']} bits, group_size {said['group_size']}; get both from the same place"
    )


# ---- what is refused


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "awq"}, "quantized as awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized as bitsandbytes"),
        ({"quant_method": "fp8"}, "quantized as fp8"),
        ({"quant_method": "compressed-tensors", "format": "naive-quantized"}, "naive-quantized"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
        ({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}, "checkpoint_format gptq_v2"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format marlin"),
    ],
)
def test_other_quantizations_are_refused_by_name(
    dense: Path, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    written = json.loads((dense / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "model.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match=said) as caught:
        DequantizedCheckpoint(Checkpoint(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def changed(folder: Path, to: Path, change: dict[str, Tensor | None]) -> Path:
    """A copy of a folder with some tensors replaced, added or (None) left out."""
    to.mkdir()
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors") | change
    save_file({n: t for n, t in tensors.items() if t is not None}, to / "model.safetensors", {"format": "pt"})
    return to


MODULE = f"{LAYERS}mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_g_idx": torch.arange(64).flip(0) // 32}, "activation order"),
        ({"weight_packed": torch.zeros(128, 7, dtype=torch.int32)}, "weight_packed"),  # older 3-bit files leave gaps
        ({"weight_scale": torch.zeros(128, 3, dtype=torch.bfloat16)}, "weight_scale"),
        ({"weight_scale": None}, "weight_scale"),
        ({"weight_shape": None}, "weight_shape"),
    ],
)
def test_tensors_that_would_be_misread_are_refused(
    dense: Path, tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    folder, _ = foreign(dense, tmp_path / "whole", {"layers": (4, 32, True)})
    damaged = changed(folder, tmp_path / "damaged", {f"{MODULE}.{name}": tensor for name, tensor in change.items()})
    with pytest.raises(ModelError, match=said) as caught:
        DequantizedCheckpoint(Checkpoint(damaged)).load([f"{MODULE}.weight"])
    assert MODULE in str(caught.value) and "\n" not in str(caught.value)
