"""Checkpoints of other writers: read so that they give the stock loader's logits, or refused by name."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import invoke
from random_models import load_stock, make_model, random_tokens
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.errors import ModelError
from compress.evaluation.verify import own_logits
from compress.formats.dequantized import DequantizedCheckpoint
from compress.model.checkpoint import Checkpoint

PROBE = random_tokens(1, 24, 3)
LAYER = "model.layers.0."
Tensors = dict[str, Tensor]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("dense") / "model", intermediate_size=128)


def arguments(num_bits: int = 8, kind: str = "int", **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": kind, "symmetric": True, "strategy": "channel", "dynamic": False, **others}


BY_TOKEN = arguments(strategy="token", dynamic=True)
STATIC = arguments(strategy="tensor")


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None, layout: str = "int-quantized") -> Any:
    return {
        "targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None,
        "format": layout,
    }  # fmt: skip


def int8(weight: Tensor, scale_dtype: torch.dtype = torch.bfloat16) -> Tensors:
    scale = (weight.float().abs().amax(1, keepdim=True) / 127).to(scale_dtype)
    return {"weight": (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8), "weight_scale": scale}


def int8_asymmetric(weight: Tensor) -> Tensors:
    """With zero points that matter: each row's range is moved to one side."""
    weight = weight.float() + weight.float().abs().amax(1, keepdim=True) / 2
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = ((high - low) / 255).bfloat16()
    zero = (-128 - low / scale.float()).round().clamp(-128, 127)
    codes = (weight / scale.float() + zero).round().clamp(-128, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}


def fp8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).to(scale_dtype)
    return {"weight": (weight.float() / scale.float()).to(torch.float8_e4m3fn), "weight_scale": scale}


def int4(weight: Tensor) -> Tensors:
    """Symmetric, packed, 32 columns share a scale."""
    grouped = weight.float().unflatten(1, (-1, 32))
    scale = (grouped.abs().amax(2) / 7).bfloat16()
    codes = (grouped / scale.float()[..., None]).round().clamp(-8, 7).flatten(1).long() + 8
    words = (codes.unflatten(1, (-1, 8)) << (torch.arange(8) * 4)).sum(2)
    return {"weight_packed": words.to(torch.int32), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}


PACKED = arguments(4, strategy="group", group_size=32)


def write(dense: Path, to: Path, config: dict[str, Any], parts: Any, more: Tensors | None = None) -> Path:
    """A copy of the model whose linears are in other parts: `parts` makes them, of a module's name and weight."""
    to.mkdir()
    tensors: Tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        made = parts(name.removesuffix(".weight"), tensor) if name.endswith("proj.weight") else None
        tensors |= {name: tensor} if made is None else {name[:-6] + part: t for part, t in made.items()}
    save_file(tensors | (more or {}), to / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
    written = json.loads((dense / "config.json").read_text()) | {"quantization_config": quantization | config}
    (to / "config.json").write_text(json.dumps(written))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (to / name).write_bytes((dense / name).read_bytes())
    return to


def compressed(*groups: Any, **more: Any) -> dict[str, Any]:
    layouts = {each["format"] for each in groups}
    named = {f"group_{index}": each for index, each in enumerate(groups)}
    return {"format": layouts.pop() if len(layouts) == 1 else "mixed-precision", "config_groups": named, **more}


def caches(scale: float = 0.05, shape: tuple[int, ...] = (1,)) -> Tensors:
    return {
        f"model.layers.{layer}.self_attn.{part}_scale": torch.full(shape, scale * (1 + layer), dtype=torch.bfloat16)
        for layer in range(2)
        for part in "kv"
    }


def mixed(module: str, weight: Tensor) -> Tensors | None:
    return None if "o_proj" in module else int4(weight) if "mlp" in module else fp8(weight, torch.bfloat16)


MIXED = compressed(
    group(PACKED, layout="pack-quantized") | {"targets": ["re:.*mlp.*_proj$"]},
    group(arguments(kind="float"), arguments(kind="float", strategy="token", dynamic=True), "float-quantized")
    | {"targets": ["re:.*self_attn.*_proj$"]},
    ignore=["lm_head", "re:.*o_proj$"],
)
READ: dict[str, tuple[dict[str, Any], Any, Tensors]] = {
    "8-bit zero points": (
        compressed(group(arguments(symmetric=False), BY_TOKEN)), lambda n, w: int8_asymmetric(w), {},
    ),
    "int8 cache": (
        compressed(group(arguments(), BY_TOKEN), kv_cache_scheme=STATIC), lambda n, w: int8(w), caches(),
    ),
    "int8 cache by head": (
        compressed(group(arguments(), BY_TOKEN), kv_cache_scheme=arguments(strategy="attn_head")),
        lambda n, w: int8(w), caches(shape=(2, 1, 1)),
    ),
    "packed weights, int8 inputs": (
        compressed(group(PACKED, BY_TOKEN, "pack-quantized")), lambda n, w: int4(w), {},
    ),
    "packed weights, static inputs": (
        compressed(group(PACKED, STATIC, "pack-quantized")),
        lambda n, w: int4(w) | {"input_scale": torch.tensor([0.05]).bfloat16()}, {},
    ),
    "float32 scales": (
        compressed(group(arguments(kind="float"), arguments(kind="float", strategy="token", dynamic=True),
                         "float-quantized")),
        lambda n, w: fp8(w), {},
    ),
    "mixed formats": (MIXED, mixed, {}),
    "a scheme by its name": (
        {"format": "int-quantized", "config_groups": {"W8A8": ["Linear"]}}, lambda n, w: int8(w), {},
    ),
    "weights alone, dequantized by the loader": (
        compressed(group(PACKED, layout="pack-quantized"), dequantize=True), lambda n, w: int4(w), {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", READ)
def test_what_is_read_gives_the_stock_loaders_logits(
    dense: Path, tmp_path: Path, case: str, dtype: torch.dtype
) -> None:
    folder = write(dense, tmp_path / "model", *READ[case])
    stock = load_stock(folder, dtype)(PROBE, use_cache=False).logits[0].float()
    own = own_logits(Checkpoint(folder), PROBE[0], torch.device("cpu"), dtype, False)
    assert torch.equal(own, stock)
    assert float((own - load_stock(dense, dtype)(PROBE, use_cache=False).logits[0].float()).abs().max()) > 0.01


@pytest.mark.parametrize("part", ["input_scale", "k_scale", "weight_zero_point"])
def test_each_part_matters(dense: Path, tmp_path: Path, part: str) -> None:
    """Else the test above could pass with rounding that nobody does."""
    case = {
        "input_scale": "packed weights, static inputs",
        "k_scale": "int8 cache",
        "weight_zero_point": "8-bit zero points",
    }
    folder = write(dense, tmp_path / "model", *READ[case[part]])
    before = own_logits(Checkpoint(folder), PROBE[0], torch.device("cpu"), torch.float32, False)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t * 2 if n.endswith(part) else t for n, t in tensors.items()}, file, {"format": "pt"})
    after = own_logits(Checkpoint(folder), PROBE[0], torch.device("cpu"), torch.float32, False)
    assert float((after - before).abs().max()) > 0.01


# ---- what is refused

FP8 = arguments(kind="float", strategy="token", dynamic=True)
GROUP = "config_groups.group_0"


def plain(module: str, weight: Tensor) -> Tensors:
    return int8(weight)


def but(module: str, changed: Tensors | None) -> Any:
    """int8 weights, and one module that is something else (None: as it was)."""

    def parts(name: str, weight: Tensor) -> Tensors | None:
        if name != LAYER + module:
            return int8(weight)
        return changed if changed is None else int8(weight) | changed

    return parts


def refused(*groups: Any, parts: Any = plain, more: Tensors | None = None, said: str, **config: Any) -> Any:
    return compressed(*groups, **config), parts, more or {}, said


OURS = group(arguments(), BY_TOKEN)
REFUSED = {
    "asymmetric dynamic inputs": refused(
        group(arguments(), BY_TOKEN | {"symmetric": False}),
        said=f"{GROUP}.input_activations.symmetric: false, which is not simulated here (only true)",
    ),
    "asymmetric static inputs": refused(
        group(arguments(), STATIC | {"symmetric": False}),
        said=f"{GROUP}.input_activations.symmetric: false, which is not simulated here (only true)",
    ),
    "dynamic inputs with one scale": refused(
        group(arguments(), STATIC | {"dynamic": True}),
        said=f"{GROUP}.input_activations.strategy: tensor, which is not simulated here (only token or group)",
    ),
    "4-bit inputs": refused(
        group(PACKED, BY_TOKEN | {"num_bits": 4}, "pack-quantized"), parts=lambda n, w: int4(w),
        said=f"{GROUP}.input_activations.num_bits: 4, which is not simulated here (only 8)",
    ),
    "rounded outputs": refused(
        OURS | {"output_activations": STATIC},
        said=f"outputs are rounded ({GROUP}.output_activations), which is not simulated here",
    ),
    "attention": refused(
        OURS, {"targets": ["LlamaAttention"], "input_activations": STATIC, "format": "int-quantized"},
        said="quantized are LlamaAttention (config_groups.group_1.targets), which is not simulated here",
    ),
    "inputs alone": refused(
        OURS | {"weights": None}, said=f"activations are rounded and weights not ({GROUP}), which is not simulated here"
    ),
    "sparse": refused(
        OURS, sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]},
        said="a sparsity_config in its quantization_config, which is not simulated here",
    ),
    "rotated": refused(
        OURS, transform_config={"config_groups": {"u": {"type": "hadamard"}}},
        said="a transform_config in its quantization_config, which is not simulated here",
    ),
    "a cache without its scales": refused(
        OURS, kv_cache_scheme=STATIC,
        said="kv_cache_scheme without k_scale and v_scale in each layer; get all files",
    ),
    "an asymmetric cache": refused(
        OURS, kv_cache_scheme=STATIC | {"symmetric": False}, more=caches(),
        said="kv_cache_scheme.symmetric: false, which is not simulated here (only true)",
    ),
    "scales of a cache that the config does not have": refused(
        OURS, more=caches(),
        said=f"{LAYER}self_attn has k_scale, v_scale, which config.json does not account for",
    ),
    "loaders that leave inputs alone": refused(
        OURS, dequantize=True,
        said="quantization_config has dequantize beside quantized activations, which transformers then leaves alone "
        "and vLLM does not; remove one of them",
    ),
    "four bits of floats": refused(
        group(arguments(4, "float", strategy="tensor_group", group_size=16), None, "nvfp4-pack-quantized"),
        said="quantized as compressed-tensors, format nvfp4-pack-quantized, which can't be read here; readable are "
        "compressed-tensors pack-quantized, int-quantized, float-quantized, gptq and torchao",
    ),
    "groups of 8-bit weights": refused(
        group(arguments(strategy="group", group_size=32), BY_TOKEN),
        said=f"{GROUP}.weights.strategy: group, which is not simulated here (only channel or tensor or block)",
    ),
    "nothing quantized": refused(
        OURS, parts=lambda n, w: None, quantization_status="frozen",
        said="config.json says quantized, no tensor is; get both from the same place",
    ),
    "one layer dense": refused(
        OURS, parts=but("mlp.up_proj", None),
        said=f"{LAYER}mlp.up_proj is dense, config.json says quantized; get both from the same place",
    ),
    "one layer too many": refused(
        OURS, ignore=["lm_head", f"{LAYER}mlp.up_proj"],
        said=f"{LAYER}mlp.up_proj is stored as I8, which config.json does not account for; readable are "
        "compressed-tensors pack-quantized, int-quantized, float-quantized, gptq and torchao",
    ),
    "other bits": refused(
        group(PACKED | {"num_bits": 8}, None, "pack-quantized"), parts=lambda n, w: int4(w),
        said=f"{LAYER}mlp.down_proj holds 4 bits, group 32, symmetric, config.json says 8 bits, group 32, symmetric; "
        "get both from the same place",
    ),
    "other groups": refused(
        group(PACKED | {"group_size": 64}, None, "pack-quantized"), parts=lambda n, w: int4(w),
        said=f"{LAYER}mlp.down_proj holds 4 bits, group 32, symmetric, config.json says 4 bits, group 64, symmetric; "
        "get both from the same place",
    ),
    "zero points that the config does not have": refused(
        OURS, parts=lambda n, w: int8_asymmetric(w),
        said=f"{LAYER}mlp.down_proj has another weight_zero_point: config.json says strategy channel, symmetric; "
        "get both from the same place",
    ),
    "zero points that are missing": refused(
        group(arguments(symmetric=False), BY_TOKEN),
        said=f"{LAYER}mlp.down_proj has no weight_zero_point: config.json says strategy channel, "
        "asymmetric; get both from the same place",
    ),
    "another shape of scales": refused(
        group(arguments(strategy="tensor"), BY_TOKEN),
        said=f"{LAYER}mlp.down_proj weight_scale of shape [64, 1] does not fit [64, 128]: config.json says strategy "
        "tensor, symmetric; get both from the same place",
    ),
    "floats that the config calls whole numbers": refused(
        OURS, parts=lambda n, w: fp8(w),
        said=f"{LAYER}mlp.down_proj holds F8_E4M3, config.json says int; get both from the same place",
    ),
    "a static scale too many": refused(
        OURS, parts=but("mlp.up_proj", {"input_scale": torch.ones(1).bfloat16()}),
        said=f"{LAYER}mlp.up_proj has an input_scale, config.json says its inputs are dynamic; get both from the same "
        "place",
    ),
    "no static scale": refused(
        group(arguments(), STATIC),
        said=f"{LAYER}mlp.down_proj has no input_scale, config.json says its inputs are static, with one scale; get "
        "both from the same place",
    ),
    "a zero point of inputs": refused(
        OURS, parts=but("mlp.up_proj", {"input_zero_point": torch.ones(1, dtype=torch.int8)}),
        said=f"{LAYER}mlp.up_proj has input_zero_point, which config.json does not account for",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_simulated_is_refused_by_name(dense: Path, tmp_path: Path, case: str) -> None:
    config, parts, more, said = REFUSED[case]
    folder = write(dense, tmp_path / "model", config, parts, more)
    with pytest.raises(ModelError) as caught:
        DequantizedCheckpoint(Checkpoint(folder))
    assert str(caught.value) == f"{folder}: {said}"


MALFORMED: dict[str, tuple[Any, str]] = {
    "no object": (["int-quantized"], "quantization_config is no mapping (['int-quantized']); download the model again"),
    "groups": (
        {"config_groups": [OURS]}, "quantization_config.config_groups: Input should be a valid dictionary",
    ),
    "a width": (
        compressed(group(arguments(strategy="group", group_size=0), BY_TOKEN)),
        "quantization_config.config_groups.group_0.weights: strategy group requires group_size to be set to a ",
    ),
    "a pattern": (compressed(OURS | {"targets": ["re:(Linear"]}), "quantization_config: missing ), unterminated sub"),
    "gptq bits": (
        {"quant_method": "gptq", "format": "gptq", "bits": "4"},
        "quantization_config: bits '4', group_size -1, which can't be read here",
    ),
    "gptq rules": (
        {"quant_method": "gptq", "format": "gptq", "bits": 4, "dynamic": ["-:x"]},
        "quantization_config.dynamic: ['-:x'] is no object of objects; get config.json again",
    ),
    "a gptq pattern": (
        {"quant_method": "gptq", "format": "gptq", "bits": 4, "dynamic": {"-:(x": {}}},
        "quantization_config.dynamic: '-:(x' is no pattern (missing ), unterminated subpattern at position 0)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_config_is_one_line(dense: Path, tmp_path: Path, case: str) -> None:
    config, said = MALFORMED[case]
    folder = write(dense, tmp_path / "model", {"format": "int-quantized"}, plain)
    written = json.loads((folder / "config.json").read_text())
    usual = written["quantization_config"]
    written["quantization_config"] = (usual | config) if isinstance(config, dict) else config
    (folder / "config.json").write_text(json.dumps(written))
    with pytest.raises(ModelError) as caught:
        DequantizedCheckpoint(Checkpoint(folder))
    assert str(caught.value).startswith(f"{folder}: {said}") and "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["weight", "weight_scale"])
def test_tensors_of_impossible_shapes_are_one_line(dense: Path, tmp_path: Path, part: str) -> None:
    flat = {"weight": torch.zeros(64, dtype=torch.int8), "weight_scale": torch.zeros(0).bfloat16()}[part]
    folder = write(dense, tmp_path / "model", compressed(OURS), but("mlp.up_proj", {part: flat}))
    with pytest.raises(ModelError, match=rf"^{folder}: {LAYER}mlp.up_proj (has tensors of imposs|weight_scale of sha)"):
        DequantizedCheckpoint(Checkpoint(folder))


@pytest.mark.parametrize("parts", [int8, fp8, int4])
def test_quantized_tensors_without_a_config_are_refused(dense: Path, tmp_path: Path, parts: Any) -> None:
    """Old files have a `compression_config`, those of ModelOpt a file of their own beside config.json."""
    folder = write(dense, tmp_path / "model", {}, lambda name, weight: parts(weight))
    config = json.loads((folder / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    stored = {
        "int8": "is stored as I8",
        "fp8": "is stored as F8_E4M3",
        "int4": "has weight_packed, weight_scale, weight_shape",
    }
    with pytest.raises(ModelError) as caught:
        DequantizedCheckpoint(Checkpoint(folder))
    assert f"{LAYER}mlp.down_proj {stored[parts.__name__]}, which config.json does not account for" in str(caught.value)


@pytest.mark.parametrize("command", ["eval", "verify", "inspect"])
def test_commands_say_it_in_one_line(dense: Path, tmp_path: Path, command: str) -> None:
    config, parts, more, said = REFUSED["asymmetric dynamic inputs"]
    folder = write(dense, tmp_path / "model", config, parts, more)
    (tmp_path / "text.txt").write_text("The library stood at the corner of two quiet streets. " * 40)
    given = [dense, folder, "--text", tmp_path / "text.txt", "--sequence-length", 16, "--windows", 1]
    options = ["--device", "cpu", "--work-dir", tmp_path / "work"] if command == "eval" else ["--device", "cpu"]
    result = invoke(command, *(given if command == "eval" else [folder]), *(options if command != "inspect" else []))
    assert result.exit_code == 2
    assert result.stderr == f"error: {folder}: {said}\n"
