"""The checkpoint formats against Python integers, the compressed-tensors library and stock loaders."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils import match_named_modules
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from compress.errors import ModelError
from compress.formats import gptq
from compress.formats import pack_quantized as compressed_tensors
from compress.formats.packing import pack_rows, unpack_rows
from compress.formats.patterns import select
from compress.quant.grid import Grid, Quantized

GridOf = Callable[[str], Grid | None]


def random_matrix(rows: int, columns: int, grid: Grid, seed: int = 0) -> Quantized:
    """Codes, signed scales and zero points drawn at random, every value that the grid allows among them."""
    generator = torch.Generator().manual_seed(seed)
    groups = columns // grid.columns_per_group(columns)
    scale = (torch.rand((rows, groups), generator=generator) + 0.5) * 0.1 / grid.largest_code
    if grid.symmetric:
        scale *= torch.randint(0, 2, (rows, groups), generator=generator) * 2 - 1
        zero = torch.full((rows, groups), grid.middle)
    else:
        zero = torch.randint(grid.zero_minimum, grid.largest_code + 1, (rows, groups), generator=generator)
    codes = torch.randint(0, grid.largest_code + 1, (rows, columns), generator=generator)
    return Quantized(codes.to(torch.uint8), scale.to(grid.scale_dtype), zero.to(torch.uint8), grid)


def assert_equal(a: Quantized, b: Quantized) -> None:
    assert a.grid == b.grid
    for name in ("codes", "scale", "zero"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and torch.equal(left, right), name


def codes_by_hand(words: Iterable[int], bits: int, count: int) -> list[int]:
    """Reads codes off one long Python integer, lowest bits first."""
    number = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return [(number >> (bits * i)) % 2**bits for i in range(count)]


def needs(embeddings: bool = False) -> None:
    """Skips what the installed transformers is known not to open (the limit that compressed_tensors.py states)."""
    if embeddings and Version(metadata.version("transformers")) < Version("5.23"):
        pytest.skip("quantized embeddings need transformers 5.23")


bits_values = st.sampled_from([2, 3, 4, 8])


@given(bits=bits_values, rows=st.integers(1, 5), columns=st.integers(1, 100), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_words_hold_the_codes_that_python_integers_read(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-columns * bits // 32))
    assert [codes_by_hand(row, bits, columns) for row in words.tolist()] == codes.tolist()
    assert torch.equal(unpack_rows(words, bits, columns), codes)


@given(
    bits=bits_values,
    group_size=st.sampled_from([-1, 32, 64, 128]),
    symmetric=st.booleans(),
    rows=st.integers(1, 70),
    multiple=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_compressed_tensors_round_trip(bits: int, group_size: int, symmetric: bool, rows: int, multiple: int) -> None:
    grid = Grid(bits, group_size, symmetric)
    matrix = random_matrix(rows, multiple * (group_size if group_size > 0 else 37), grid, seed=rows)
    assert_equal(compressed_tensors.unpack(compressed_tensors.pack(matrix), grid), matrix)


@given(
    bits=bits_values,
    group_size=st.sampled_from([-1, 32, 64, 128]),
    symmetric=st.booleans(),
    rows=st.sampled_from([32, 96]),
    multiple=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_gptq_round_trip(bits: int, group_size: int, symmetric: bool, rows: int, multiple: int) -> None:
    grid = Grid(bits, group_size, symmetric, scale_dtype=torch.float16, zero_minimum=1)
    matrix = random_matrix(rows, multiple * (group_size if group_size > 0 else 32), grid, seed=multiple)
    tensors = gptq.pack(matrix)
    assert_equal(gptq.unpack(tensors, grid), matrix)
    assert torch.equal(gptq.dequantize(tensors, grid), matrix.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_v1_layout_by_hand(bits: int, symmetric: bool) -> None:
    rows, columns, group_size = 32, 64, 32
    grid = Grid(bits, group_size, symmetric, scale_dtype=torch.float16, zero_minimum=1)
    matrix = random_matrix(rows, columns, grid)
    tensors = gptq.pack(matrix)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "qweight": ((columns * bits // 32, rows), torch.int32),
        "qzeros": ((columns // group_size, rows * bits // 32), torch.int32),
        "scales": ((columns // group_size, rows), torch.float16),
        "g_idx": ((columns,), torch.int32),
    }
    expected = matrix.dequantize()
    zeros = [codes_by_hand(words, bits, rows) for words in tensors["qzeros"].tolist()]
    for o in range(rows):
        codes = codes_by_hand(tensors["qweight"][:, o].tolist(), bits, columns)
        for i in range(columns):
            g = int(tensors["g_idx"][i])
            assert (codes[i] - (zeros[g][o] + 1)) * float(tensors["scales"][g, o]) == float(expected[o, i])


def test_gptq_dequantize_follows_a_permuted_group_index_and_unpack_refuses_it() -> None:
    grid = Grid(4, 32, True, scale_dtype=torch.float16, zero_minimum=1)
    matrix = random_matrix(32, 96, grid)
    tensors = gptq.pack(matrix)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    permuted = Quantized(matrix.codes[:, order], matrix.scale, matrix.zero, grid)
    shuffled = {**gptq.pack(permuted), "g_idx": tensors["g_idx"][order]}
    assert torch.equal(gptq.dequantize(shuffled, grid), matrix.dequantize()[:, order])
    with pytest.raises(ModelError, match="activation order"):
        gptq.unpack(shuffled, grid)


@pytest.mark.parametrize(
    ("shape", "group_size", "problem"),
    [
        ((64, 96), 32, None),
        ((64, 96), -1, None),
        ((49, 96), 32, "outputs divisible by 32, this matrix has 49"),
        ((64, 100), -1, "inputs divisible by 32, this matrix has 100"),
        ((64, 96), 64, "group_size 64 does not divide the 96 inputs"),
    ],
)
def test_gptq_check_names_what_does_not_fit(shape: tuple[int, int], group_size: int, problem: str | None) -> None:
    found = gptq.check(shape, Grid(4, group_size, True))
    assert found is None if problem is None else problem in str(found)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_layout_by_hand(bits: int, symmetric: bool) -> None:
    rows, columns, group_size = 37, 64, 32
    matrix = random_matrix(rows, columns, Grid(bits, group_size, symmetric))
    tensors = compressed_tensors.pack(matrix)
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        "weight_packed": ((rows, columns * bits // 32), torch.int32),
        "weight_scale": ((rows, 2), torch.bfloat16),
        "weight_shape": ((2,), torch.int64),
    } | ({} if symmetric else {"weight_zero_point": ((-(-rows * bits // 32), 2), torch.int32)})
    assert tensors["weight_shape"].tolist() == [rows, columns]
    zeros = [[matrix.grid.middle] * rows] * 2
    if not symmetric:
        zeros = [codes_by_hand(words, bits, rows) for words in tensors["weight_zero_point"].t().tolist()]
    expected = matrix.dequantize()
    for o in range(rows):
        codes = codes_by_hand(tensors["weight_packed"][o].tolist(), bits, columns)
        for i in range(columns):
            g = i // group_size
            assert (codes[i] - zeros[g][o]) * float(tensors["weight_scale"][o, g]) == float(expected[o, i])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_pack_writes_what_the_library_writes(bits: int, symmetric: bool, group_size: int) -> None:
    """The library rounds float weights; given ours, dequantized exactly, it must come to the same tensors."""
    matrix = random_matrix(33, 96, Grid(bits, group_size, symmetric, scale_dtype=torch.float32))
    config = compressed_tensors.quantization_config({"m": matrix.grid}, [])
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    state = {"weight": matrix.dequantize(), "weight_scale": matrix.scale}
    if not symmetric:
        state["weight_zero_point"] = (matrix.zero.short() - matrix.grid.middle).to(torch.int8)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    theirs, ours = compressor.compress(state, scheme), compressed_tensors.pack(matrix)
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert tensor.dtype == ours[name].dtype and torch.equal(tensor, ours[name]), name
        assert ours[name].is_contiguous(), name
    assert torch.equal(compressor.decompress(ours, scheme)["weight"], matrix.dequantize())


names_of_a_model = st.lists(
    st.builds(
        "model.layers.{}.{}".format,
        st.integers(0, 12),
        st.sampled_from(["up_proj", "down_proj", "experts.0.w1", "experts.1.w1", "experts.10.w1"]),
    ),
    unique=True,
    min_size=1,
)


@given(everything=names_of_a_model, data=st.data())
def test_patterns_select_exactly(everything: list[str], data: st.DataObject) -> None:
    everything = [*everything, "lm_head"]
    names = data.draw(st.lists(st.sampled_from(everything), unique=True))
    patterns = select(names, everything)
    assert {name for name in everything if any(re.match(p, name) for p in patterns)} == set(names)


def test_patterns_are_short() -> None:
    everything = [f"model.layers.{i}.mlp.{part}" for i in range(12) for part in ("up_proj", "down_proj")]
    assert select([n for n in everything if "up" in n], everything) == [r"^model\.layers\.\d+\.mlp\.up_proj$"]
    assert select([n for n in everything if ".up" in n][9:11], everything) == [r"^model\.layers\.(9|10)\.mlp\.up_proj$"]


# ---- checkpoints, opened by the stock loader


def tiny_llama(tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=160,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie,
        attention_bias=True,
        dtype="bfloat16",
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def linears(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def write(model: PreTrainedModel, folder: Path, grid_of: GridOf, format: ModuleType) -> dict[str, Tensor]:
    """Writes `model` by hand, random codes in the modules that `grid_of` gives a grid; returns the plain weights."""
    plain = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del plain["lm_head.weight"]
    written, grids, embeddings = {}, {}, []
    for name, tensor in plain.items():
        module, _, parameter = name.rpartition(".")
        grid = grid_of(module) if parameter == "weight" and "norm" not in module else None
        if grid is None:
            written[name] = tensor
            continue
        matrix = random_matrix(*tensor.shape, grid, seed=len(grids))
        grids[module] = grid
        written |= {f"{module}.{local}": t for local, t in format.pack(matrix).items()}
        plain[name] = matrix.dequantize(torch.bfloat16)
        if "embed" in module:
            embeddings.append(module)
    unquantized = [name for name in linears(model) if name not in grids]
    arguments = (grids, unquantized) if format is gptq else (grids, unquantized, embeddings)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    config["quantization_config"] = format.quantization_config(*arguments)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, default=str))
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    return plain


def assert_opens(folder: Path, model: PreTrainedModel, plain: dict[str, Tensor]) -> None:
    """Stock transformers, without any option, computes exactly what the plain weights compute."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    model.load_state_dict(plain, strict=False)
    ids = torch.randint(0, 160, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, actual = model(ids).logits, loaded.eval()(ids).logits
    assert expected.float().std() > 0.01
    assert torch.equal(actual, expected)


def in_layers(grid: Grid) -> GridOf:
    return lambda name: grid if "layers" in name else None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (3, -1), (4, 128), (4, -1), (8, 32)])
def test_stock_transformers_opens_it(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    model = tiny_llama(tie=False)
    plain = write(model, tmp_path, in_layers(Grid(bits, group_size, symmetric)), compressed_tensors)
    assert_opens(tmp_path, model, plain)


def test_stock_transformers_opens_mixed_schemes(tmp_path: Path) -> None:

    def grid_of(name: str) -> Grid | None:
        if "layers" not in name or name == "model.layers.1.self_attn.o_proj":
            return None
        if name.endswith("down_proj"):
            return Grid(8, 32, True)
        return Grid(3, -1, True) if "layers.0" in name else Grid(4, 64, True)

    model = tiny_llama(tie=False)
    plain = write(model, tmp_path, grid_of, compressed_tensors)
    groups = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]
    assert len(groups) == 3
    assert_opens(tmp_path, model, plain)


@pytest.mark.parametrize(
    ("tie", "quantized"),
    [
        (True, ["layers"]),
        (True, ["layers", "embed_tokens"]),
        (False, ["layers", "lm_head"]),
        (False, ["layers", "embed_tokens"]),
        (False, ["embed_tokens", "lm_head"]),
    ],
)
def test_stock_transformers_opens_heads_and_embeddings(tie: bool, quantized: list[str], tmp_path: Path) -> None:
    needs(embeddings="embed_tokens" in quantized)
    grid = Grid(4, 64, True)
    model = tiny_llama(tie)
    plain = write(
        model, tmp_path, lambda name: grid if any(part in name for part in quantized) else None, compressed_tensors
    )
    assert_opens(tmp_path, model, plain)


def test_check_tells_which_mixtures_transformers_cannot_open() -> None:
    a, b, c = Grid(4, 64, True), Grid(8, 64, True), Grid(4, 64, False)
    assert compressed_tensors.check({"x": a, "y": b}) is None
    assert compressed_tensors.check({"x": c, "y": c}) is None
    assert compressed_tensors.check({"x": a, "e": a}, ["e"]) is None
    assert "asymmetric" in str(compressed_tensors.check({"x": a, "y": c}))
    assert "embeddings" in str(compressed_tensors.check({"x": a, "e": b}, ["e"]))


def test_targets_select_each_module_once() -> None:
    model = tiny_llama(tie=False)
    grids = {n: Grid(8 if "down" in n else 4, 32, True) for n in linears(model) if "layers" in n}
    config = QuantizationConfig.model_validate(compressed_tensors.quantization_config(grids, ["lm_head"]))
    found = {
        name: group.weights.num_bits
        for group in config.config_groups.values()
        for name, _ in match_named_modules(model, group.targets, config.ignore)
    }
    assert found == {name: grid.bits for name, grid in grids.items()}


def test_a_quantized_head_is_among_the_targets_by_its_name() -> None:
    """vLLM's head is no Linear; transformers finds it once all the same."""
    model = tiny_llama(tie=False)
    grids = {n: Grid(4, 32, True) for n in linears(model)}
    config = compressed_tensors.quantization_config(grids, [])
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear", "re:^lm_head$"]
    matched = [name for name, _ in match_named_modules(model, group["targets"], config["ignore"])]
    assert sorted(matched) == sorted(grids)
    mixed = compressed_tensors.quantization_config(grids | {"lm_head": Grid(8, 32, True)}, [])
    assert "re:^lm_head$" in mixed["config_groups"]["group_1"]["targets"]
    without = compressed_tensors.quantization_config({n: g for n, g in grids.items() if n != "lm_head"}, ["lm_head"])
    assert without["config_groups"]["group_0"]["targets"] == ["Linear"]


# ---- gptq, opened by GPTQModel in this environment or in that of $GPTQMODEL_PYTHON


def test_gptq_config_of_one_scheme_and_of_several() -> None:
    a, b = Grid(4, 64, True), Grid(8, 32, False)
    layers = [f"model.layers.{i}.mlp.{part}" for i in range(3) for part in ("up_proj", "down_proj")]
    plain = gptq.quantization_config(dict.fromkeys(layers, a), ["lm_head"])
    assert (plain["bits"], plain["group_size"], plain["sym"], plain["desc_act"]) == (4, 64, True, False)
    assert plain["lm_head"] is False and "dynamic" not in plain and "modules_in_block_to_quantize" not in plain
    grids = {name: a for name in layers if "up" in name} | {"lm_head": b}
    mixed = gptq.quantization_config(grids, [name for name in layers if "down" in name])
    assert mixed["lm_head"] is True
    assert mixed["modules_in_block_to_quantize"] == [["mlp.up_proj", "lm_head"]]
    assert mixed["dynamic"] == {
        "+:^lm_head": {"bits": 8, "group_size": 32, "sym": False},
        r"-:^model\.layers\.\d+\.mlp\.down_proj": {},
    }
    uneven = gptq.quantization_config(dict.fromkeys(layers[1:], a), [layers[0]])
    assert uneven["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj": {}}
    assert "modules_in_block_to_quantize" not in uneven


def test_gptq_rules_for_the_modules_that_vllm_joins() -> None:
    """It asks the rules for `qkv_proj` and `gate_up_proj`, and opens them where all parts have one scheme."""
    a, b = Grid(4, 64, True), Grid(8, 32, True)
    attention, mlp = ([f"model.layers.{i}.{part}" for i in range(2) for part in parts] for parts in (
        [f"self_attn.{x}_proj" for x in "qkvo"], [f"mlp.{x}_proj" for x in ("gate", "up", "down")],
    ))  # fmt: skip
    change = {"bits": 8, "group_size": 32, "sym": True}

    def rules(grids: dict[str, Grid], unquantized: list[str]) -> dict[str, object]:
        return gptq.quantization_config(grids, unquantized)["dynamic"]

    grids = dict.fromkeys([*attention, *mlp], a) | {n: b for n in mlp if "down" not in n}
    assert rules(grids, ["lm_head"]) == {
        rf"+:^model\.layers\.\d+\.mlp\.{part}_proj": change for part in ("gate", "up", "gate_up")
    }
    grids = dict.fromkeys([*attention, *mlp], a) | {n: b for n in attention if "v_proj" in n}  # vLLM can't have it
    assert rules(grids, ["lm_head"]) == {r"+:^model\.layers\.\d+\.self_attn\.v_proj": change}
    kept = [name for name in attention if ".1." in name]
    assert rules({n: a for n in [*attention, *mlp] if n not in kept}, [*kept, "lm_head"]) == {
        rf"-:^model\.layers\.1\.self_attn\.{part}_proj": {} for part in ("q", "k", "v", "o", "qkv")
    }


def test_gptq_patterns_are_open_at_their_end_where_that_matches_no_more() -> None:
    """ONNX Runtime GenAI matches them against the names of tensors."""
    a, b = Grid(4, 64, True), Grid(8, 32, True)
    grids = {"model.layers.0.w1": a, "model.layers.0.w10": b, "model.layers.0.w1_gate": b, "model.layers.0.w2": b}
    config = gptq.quantization_config(grids | {"model.layers.1.w1": b}, [])
    selected = {n for n in [*grids, "model.layers.1.w1"] if any(re.match(r[2:], n) for r in config["dynamic"])}
    assert config["bits"] == 8 and selected == {"model.layers.0.w1"}
    assert list(config["dynamic"]) == [r"+:^model\.layers\.0\.w1$"]
    config = gptq.quantization_config(grids | {"model.layers.0.w10": a, "model.layers.0.w3": a}, [])
    assert [rule for rule in config["dynamic"] if "w2" in rule] == [r"+:^model\.layers\.0\.w2"]


def gptqmodel_python() -> str | None:
    here = sys.executable if importlib.util.find_spec("gptqmodel") else None
    return os.environ.get("GPTQMODEL_PYTHON", here)


@pytest.mark.skipif(gptqmodel_python() is None, reason="gptqmodel is not installed: pip install 'dscompress[gptq]'")
@pytest.mark.parametrize("kind", ["mixed", "asymmetric"])
def test_gptqmodel_computes_what_the_dequantized_weights_compute(kind: str, tmp_path: Path) -> None:
    def grid_of(name: str) -> Grid | None:
        def grid(bits: int, group_size: int, symmetric: bool) -> Grid:
            return Grid(bits, group_size, symmetric, scale_dtype=torch.float16, zero_minimum=1)

        if kind == "asymmetric":
            return grid(4, 128, False) if "layers" in name else None
        if name == "lm_head":
            return grid(8, 64, True)
        if "layers" not in name or name == "model.layers.1.self_attn.o_proj":
            return None
        if "down_proj" in name:
            return grid(3, 32, False)
        return grid(2, 64, True) if "layers.0.mlp" in name else grid(4, -1, True)

    python = gptqmodel_python()
    assert python is not None
    model = tiny_llama(tie=False).half()
    write(model, tmp_path, grid_of, gptq)
    tokenizer = Tokenizer(WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))  # GPTQModel insists on one
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<unk>").save_pretrained(tmp_path)
    script = Path(__file__).with_name("gptqmodel_loads.py")
    ran = subprocess.run([python, script, tmp_path], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["quantized_modules"] == 14
    assert found["max_logit_difference"] < 0.01 * found["largest_logit"]
