"""The quantize stage, from a checkpoint to a checkpoint: what was solved is what lies in the files and what loads."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from quantized import PROBE, opens, quantize
from random_models import load_stock, make_model, random_tokens
from safetensors import deserialize
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.data.calibration import TokenSet
from compress.errors import NumericalError, RecipeError
from compress.evaluation import verify
from compress.formats.dequantized import DequantizedCheckpoint
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint, read_part
from compress.quant.grid import Grid, Quantized
from compress.recipe.quantize import Override, WeightOnlyStage
from compress.stages import layerwise as quantize_module
from compress.stages.quantize import solve as solve_module
from compress.system.compute import pick_device
from compress.system.progress import Reporter

CPU = torch.device("cpu")
Solved = list[tuple[Tensor, Quantized]]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes models, one of a kind: widths 64 and 128, with biases, in shards."""
    folder, made = tmp_path_factory.mktemp("models"), {}

    def model(tie: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
        key = f"{tie}-{dtype}"
        if key not in made:
            sizes = {"intermediate_size": 128, "attention_bias": True}
            made[key] = make_model(folder / key, dtype=dtype, shard="200KB", tie_word_embeddings=tie, **sizes)
        return made[key]

    return model


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> Solved:
    """All that the solvers get and give, in order: weights [O, I] and what became of them."""
    seen: Solved = []

    def watch(name: str, matrix_of: Callable[[Any], Quantized]) -> None:
        usual = getattr(solve_module, name)

        def solver(weight: Tensor, *arguments: Any) -> Any:
            found = usual(weight, *arguments)
            seen.append((weight.clone(), matrix_of(found)))
            return found

        monkeypatch.setattr(solve_module, name, solver)

    watch("gptq", lambda found: found[0])
    watch("round_to_nearest", lambda found: found)
    return seen


def context(dtype: torch.dtype = torch.bfloat16) -> Context:
    tokens = TokenSet(random_tokens(6, 24, 1), "random", "random", None)
    return Context(CPU, dtype, tokens, random_tokens(1, 24, 2), Reporter(quiet=True), False)


def spec(**settings: Any) -> WeightOnlyStage:
    """Without the correction of drift, so that what is solved are the model's own weights."""
    return WeightOnlyStage(kind="quantize", **{"group_size": 32, "drift_correction": 0.0, **settings})


def solution(solved: Solved, weight: Tensor, module: str) -> Quantized:
    """What the solvers gave for a matrix, which may have been some rows of a taller one.

    A tied matrix is solved twice where embeddings and head are quantized, the head last.
    """
    wanted = weight.float()
    for tall, found in reversed(solved) if module == "lm_head" else solved:
        if tall.shape[1] == wanted.shape[1]:
            at = (tall == wanted[0]).all(1).nonzero().flatten().tolist()
            if at and torch.equal(tall[at[0] : at[0] + len(wanted)], wanted):
                rows = slice(at[0], at[0] + len(wanted))
                return Quantized(found.codes[rows], found.scale[rows], found.zero[rows], found.grid)
    raise AssertionError("this matrix was never solved")


def codes_in(words: Tensor, bits: int, count: int) -> np.ndarray:
    """Codes [R, count] of int32 words [R, W], read bit by bit."""
    bytes_RW = words.contiguous().numpy().astype("<i4").view(np.uint8).reshape(words.shape[0], -1)
    bits_RN = np.unpackbits(bytes_RW, axis=1, bitorder="little")[:, : bits * count]
    return (bits_RN.reshape(words.shape[0], count, bits) << np.arange(bits)).sum(2)


def in_file(tensors: dict[str, Tensor], module: str, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [O, I], scales [O, G] and zero points [O, G] of a module, from a file's tensors of either format."""
    local = {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.startswith(f"{module}.")}
    if "qweight" in local:
        rows, columns = local["scales"].shape[1], local["g_idx"].numel()
        codes = codes_in(local["qweight"].t(), grid.bits, columns)
        zero = codes_in(local["qzeros"], grid.bits, rows).T + 1
        group = np.arange(columns) // grid.columns_per_group(columns)
        assert np.array_equal(local["g_idx"].numpy(), group)
        return codes, local["scales"].t().float().numpy(), zero
    rows, columns = local["weight_shape"].tolist()
    codes = codes_in(local["weight_packed"], grid.bits, columns)
    scale = local["weight_scale"].float().numpy()
    if grid.symmetric:
        assert "weight_zero_point" not in local
        return codes, scale, np.full(scale.shape, 2 ** (grid.bits - 1))
    return codes, scale, codes_in(local["weight_zero_point"].t(), grid.bits, rows).T


def check_files(parent: Path, written: Path, solved: Solved, modules: dict[str, tuple[int, int, bool]]) -> None:
    """Every module holds its solution's integers, loads as their values, and the rest is the parent's, byte by byte."""
    tensors = {n: t for file in written.glob("*.safetensors") for n, t in load_file(file).items()}
    source, view = Checkpoint(parent), DequantizedCheckpoint(Checkpoint(written))
    assert set(view.grids) == set(modules)
    expected = {name for name in source.tensors if name.removesuffix(".weight") not in modules}
    dense = Checkpoint(written).config["quantization_config"].get("dequantize")  # in the scales' dtype
    for module, (bits, group_size, symmetric) in modules.items():
        stored = f"{module}.weight" if f"{module}.weight" in source.tensors else "model.embed_tokens.weight"
        wanted = solution(solved, source.load([stored])[stored], module)
        assert (wanted.grid.bits, wanted.grid.group_size, wanted.grid.symmetric) == (bits, group_size, symmetric)
        codes, scale, zero = in_file(tensors, module, wanted.grid)
        assert np.array_equal(codes, wanted.codes.numpy())
        assert np.array_equal(scale, wanted.scale.float().numpy())
        assert np.array_equal(zero, wanted.zero.numpy())
        width = wanted.grid.columns_per_group(codes.shape[1])
        values = (codes - zero.repeat(width, 1)).astype(np.float32) * scale.repeat(width, 1)
        if dense:
            values = torch.from_numpy(values).bfloat16().float().numpy()
        assert np.array_equal(view.load([f"{module}.weight"])[f"{module}.weight"].numpy(), values)
        expected |= {name for name in tensors if name.startswith(f"{module}.")} - {f"{module}.weight"}
        assert f"{module}.weight" not in tensors
    assert set(tensors) == expected
    kept = raw_tensors(written)
    for name, row in raw_tensors(parent).items():
        if name.removesuffix(".weight") not in modules:
            assert kept[name] == row, name


def raw_tensors(folder: Path) -> dict[str, Any]:
    """dtype, shape and bytes of every tensor of a folder."""
    return {n: row for file in folder.glob("*.safetensors") for n, row in deserialize(file.read_bytes())}


def check_logits(work: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    computed = read_part(work / PROBE)[0]["logits"]
    own = verify.own_logits(Checkpoint(work / "checkpoint"), context().probe[0], CPU, dtype, False)
    assert torch.equal(own, computed) and float(own.std()) > 0.1
    config = json.loads((work / "checkpoint" / "config.json").read_text())["quantization_config"]
    opened = config["quant_method"] == "compressed-tensors"  # the other one opens with packages that tests do without
    if Version(metadata.version("transformers")) < Version("5.23"):
        opened &= not any("embed_tokens.weight_packed" in name for name in Checkpoint(work / "checkpoint").tensors)
    if opened:
        assert torch.equal(opens(work / "checkpoint", dtype)(context().probe).logits[0].float(), computed)


def linears(parent: Path) -> list[str]:
    return [n.removesuffix(".weight") for n in Checkpoint(parent).tensors if n.endswith("_proj.weight")]


ALL = list(itertools.product((2, 3, 4, 8), (True, False), ("compressed-tensors", "gptq"), ("gptq", "rtn")))


@pytest.mark.parametrize(("bits", "symmetric", "format", "method"), ALL)
def test_files_hold_what_was_solved(
    models: Callable[..., Path], solved: Solved, tmp_path: Path, bits: int, symmetric: bool, format: str, method: str
) -> None:
    index = ALL.index((bits, symmetric, format, method))
    group_size, act_order, tie = (32, 64, -1)[index % 3], index % 2 == 0, index % 4 < 2
    settings = {"bits": bits, "symmetric": symmetric, "format": format, "method": method, "group_size": group_size}
    parent = models(tie)
    record = quantize(spec(act_order=act_order, **settings), Checkpoint(parent), tmp_path, context())
    modules = dict.fromkeys(linears(parent), (bits, group_size, symmetric))
    check_files(parent, tmp_path / "checkpoint", solved, modules)
    check_logits(tmp_path)
    assert {m.name: (m.bits, m.group_size, m.symmetric) for r in record.layers for m in r.modules} == modules
    assert not any(module.fallback for layer in record.layers for module in layer.modules)


def test_overrides_ignore_and_heads(models: Callable[..., Path], solved: Solved, tmp_path: Path) -> None:
    settings = spec(
        bits=4, group_size=64, lm_head=True, ignore=["model.layers.1.*.o_proj"],
        overrides={"*.mlp.*": Override(bits=3), "*.down_proj": Override(bits=8, group_size=-1),
                   "lm_head": Override(group_size=32)},
    )  # fmt: skip
    parent = models()
    quantize(settings, Checkpoint(parent), tmp_path, context())
    modules = {name: (4, 64, True) for name in linears(parent) if name != "model.layers.1.self_attn.o_proj"}
    modules |= {name: (3, 64, True) for name in modules if ".mlp." in name}
    modules |= {name: (8, -1, True) for name in modules if "down_proj" in name}
    check_files(parent, tmp_path / "checkpoint", solved, modules | {"lm_head": (4, 32, True)})
    check_logits(tmp_path)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("quantized", [("lm_head",), ("embeddings",), ("lm_head", "embeddings")])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_embeddings_and_head(
    models: Callable[..., Path], solved: Solved, tmp_path: Path, tie: bool, quantized: tuple[str, ...], method: str
) -> None:
    parent = models(tie)
    quantize(spec(method=method, **dict.fromkeys(quantized, True)), Checkpoint(parent), tmp_path, context())
    names = {"lm_head": "lm_head", "embeddings": "model.embed_tokens"}
    modules = [*linears(parent), *(names[part] for part in quantized)]
    check_files(parent, tmp_path / "checkpoint", solved, dict.fromkeys(modules, (4, 32, True)))
    check_logits(tmp_path)
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (tie and "lm_head" not in quantized)


@pytest.mark.parametrize("quantized", [{}, {"embeddings": True}])
def test_a_tied_matrix_is_stored_once(models: Callable[..., Path], tmp_path: Path, quantized: dict[str, bool]) -> None:
    parent = models(tie=True)
    copied = tmp_path / "both"  # a checkpoint that stores the tied matrix under both names, as some do
    copied.mkdir()
    for file in parent.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    tensors = {n: t for file in copied.glob("*.safetensors") for n, t in load_file(file).items()}
    for file in [*copied.glob("*.safetensors"), copied / "model.safetensors.index.json"]:
        file.unlink()
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, copied / "model.safetensors")
    sizes = []
    for index, folder in enumerate((parent, copied)):
        work = tmp_path / str(index)
        quantize(spec(**quantized), Checkpoint(folder), work, context())
        written = Checkpoint(work / "checkpoint")
        assert not [name for name in written.tensors if name.startswith("lm_head")]
        packed = {n: i.bytes for n, i in written.tensors.items() if n.startswith("model.embed_tokens.")}
        values, groups = 4096 * 64, 4096 * 2
        assert sum(packed.values()) == (values // 2 + groups * 2 + 16 if quantized else values * 2)
        check_logits(work)
        sizes.append({n: i.bytes for n, i in written.tensors.items()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("stored", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_parents_of_other_dtypes(
    models: Callable[..., Path], solved: Solved, tmp_path: Path, stored: torch.dtype, format: str
) -> None:
    parent = models(dtype=stored)
    quantize(spec(format=format), Checkpoint(parent), tmp_path, context(torch.float32))
    check_files(parent, tmp_path / "checkpoint", solved, dict.fromkeys(linears(parent), (4, 32, True)))
    check_logits(tmp_path, torch.float32)
    scale = torch.float16 if stored == torch.float16 or format == "gptq" else torch.bfloat16
    assert {q.grid.scale_dtype for _, q in solved} == {scale}


def test_a_large_checkpoint_is_its_parts_as_shards(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(spec(), Checkpoint(models()), tmp_path / "one", context())
    monkeypatch.setattr(quantize_module, "merge_parts", partial(quantize_module.merge_parts, max_shard_bytes=1))
    quantize(spec(), Checkpoint(models()), tmp_path / "many", context())
    one, many = tmp_path / "one" / "checkpoint", tmp_path / "many" / "checkpoint"
    assert len(list(many.glob("model-0000?-of-00003.safetensors"))) == 3
    whole, parts = load_file(one / "model.safetensors"), {}
    for shard in many.glob("*.safetensors"):
        parts |= load_file(shard)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in parts.values())
    check_logits(tmp_path / "many")


def test_the_record_says_what_each_matrix_lost(models: Callable[..., Path], tmp_path: Path) -> None:
    """Against the finished model in stock transformers: its own inputs, float64, every linear of every layer."""
    parent = models()
    record = quantize(spec(bits=3, lm_head=True), Checkpoint(parent), tmp_path, context(torch.float32))
    before, after = load_stock(parent, torch.float32), opens(tmp_path / "checkpoint", torch.float32)
    inputs: dict[str, list[Tensor]] = {}
    for name, module in after.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, i, n=name: inputs.setdefault(n, []).append(i[0].double()))
    tokens = context().tokens
    assert tokens is not None
    after(tokens.tokens, use_cache=False)
    assert len(record.layers) == 3 and record.layers[-1].layer is None and not record.cached
    for module in [module for layer in record.layers for module in layer.modules]:
        x = torch.cat(inputs[module.name]).flatten(0, 1)
        weight = before.get_submodule(module.name).weight.double()
        missed = weight - after.get_submodule(module.name).weight.double()
        assert module.shape == tuple(weight.shape) and module.fallback is None
        assert module.damp == pytest.approx(2 * weight.shape[1] / 144)  # what few tokens need
        assert module.weight_error == pytest.approx(float(missed.square().sum() / weight.square().sum()), rel=1e-3)
        if "k_proj" not in module.name and "v_proj" not in module.name:  # those count tokens by their attention
            error = float((x @ missed.t()).square().sum() / (x @ weight.t()).square().sum())
            assert module.error == pytest.approx(error, rel=1e-3)


def test_rtn_needs_no_calibration_and_states_no_output_error(models: Callable[..., Path], tmp_path: Path) -> None:
    record = quantize(spec(method="rtn"), Checkpoint(models()), tmp_path, replace(context(), tokens=None))
    modules = [module for layer in record.layers for module in layer.modules]
    assert len(modules) == 14 and all(module.error is None and module.damp is None for module in modules)


def test_the_gpu_that_was_named_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current one."""
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") and pick_device("cpu") == CPU
    assert made_current == [torch.device("cuda:1")]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_limit_of_the_shell_leaves_is_what_is_available() -> None:
    """As `ulimit -d` sets it, of which this process has used some already."""
    code = """
import resource, torch
from compress.system.memory import _status, available
held = bytearray(2**27)
allowed = _status("VmData:") + 2**28
resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
assert 2**27 < available(torch.device("cpu")) <= 2**28
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- what goes wrong


def test_damaged_weights_are_named(models: Callable[..., Path], tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "config.json").write_bytes((models() / "config.json").read_bytes())
    tensors = {n: t for file in models().glob("*.safetensors") for n, t in load_file(file).items()}
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("inf")
    save_file(tensors, parent / "model.safetensors")
    for method in ("gptq", "rtn"):
        with pytest.raises(NumericalError, match=r"^model\.layers\.1\.mlp\.up_proj\.weight holds NaN or inf"):
            quantize(spec(method=method), Checkpoint(parent), tmp_path / method, context())


def test_what_a_format_cannot_hold_is_said_before_anything_is_written(
    models: Callable[..., Path], tmp_path: Path
) -> None:
    mixed = spec(symmetric=False, overrides={"*.down_proj": Override(bits=8)})
    with pytest.raises(RecipeError, match="asymmetric layers only where all modules share one scheme"):
        quantize(mixed, Checkpoint(models()), tmp_path / "work", context())
    assert not (tmp_path / "work").exists()


def test_a_hessian_beyond_repair_falls_back_to_rounding(
    models: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, solved: Solved
) -> None:
    usual, calls = solve_module.factorize, []

    def factorize(hessian: Tensor, *arguments: Any) -> Any:
        calls.append(hessian)
        return usual(torch.full_like(hessian, torch.nan) if len(calls) == 2 else hessian, *arguments)

    monkeypatch.setattr(solve_module, "factorize", factorize)
    asked = context()
    record = quantize(spec(), Checkpoint(models()), tmp_path, asked)
    fallen = [module for layer in record.layers for module in layer.modules if module.fallback]
    assert fallen and all("not positive definite" in str(module.fallback) for module in fallen)
    assert asked.reporter.warnings[-1] == f"{len(fallen)} of 14 matrices fell back to round-to-nearest"
    check_files(models(), tmp_path / "checkpoint", solved, dict.fromkeys(linears(models()), (4, 32, True)))
    check_logits(tmp_path)
