"""What a recipe will do to a model, told from headers alone: which matrices, which problems, how many bytes."""

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized import quantize
from random_models import make_model, random_tokens
from safetensors.torch import load_file, save_file
from small_model import write_model
from torch import Tensor

from compress.errors import ModelError, RecipeError
from compress.forecast_records import Forecast
from compress.formats.facts import bytes_on_disk
from compress.loop.context import Context
from compress.model.checkpoint import Checkpoint
from compress.model.shapes import check_length, check_vocabulary, find_modules, parameter_count
from compress.recipe.quantize import Override, WeightActivationStage, WeightOnlyStage
from compress.recipe.schema import Recipe
from compress.recipe.text import CalibrationSpec
from compress.runs.plan import plan_run
from compress.stages.contract import Place, Setting
from compress.stages.quantize.matrix import Matrix
from compress.stages.quantize.plan import plan, plan_matrices
from compress.stages.quantize.written import output_bytes
from compress.system.progress import Reporter

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
PARTS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = {f"model.layers.{layer}.{part}" for layer in range(2) for part in PARTS}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two layers, widths 64 and 96, tied embeddings."""
    return Checkpoint(write_model(tmp_path_factory.mktemp("plan") / "model"))


def spec(**settings: Any) -> WeightOnlyStage:
    return WeightOnlyStage(kind="quantize", **{"group_size": 32, **settings})


def planned(checkpoint: Checkpoint, **settings: Any) -> dict[str, Matrix]:
    return {matrix.name: matrix for matrix in plan_matrices(spec(**settings), checkpoint, "stages.0")}


def problems(checkpoint: Checkpoint, **settings: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        plan_matrices(spec(**settings), checkpoint, "stages.0")
    return caught.value.problems


def in_memory(file: Path) -> dict[str, Tensor]:
    """A file's tensors, no longer mapped from it, so that it can be overwritten."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


# ---- which matrices


def test_all_linears_of_the_layers_and_nothing_else(small: Checkpoint) -> None:
    found = planned(small, bits=3, symmetric=False)
    assert set(found) == LINEARS
    down = found["model.layers.1.mlp.down_proj"]
    assert down == Matrix("model.layers.1.mlp.down_proj", (64, 96), 3, 32, False, *extras(down))
    assert down.groups == 3 and planned(small, group_size=-1)["model.layers.1.mlp.down_proj"].groups == 1


def extras(matrix: Matrix) -> list[Any]:
    """What a matrix may say beside its first five fields."""
    return list(vars(matrix).values())[5:]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"lm_head": True}, {"lm_head"}),
        ({"embeddings": True}, {"model.embed_tokens"}),
        ({"lm_head": True, "embeddings": True}, {"lm_head", "model.embed_tokens"}),
    ],
)
def test_heads_and_embeddings_on_request_also_when_tied(
    small: Checkpoint, settings: dict[str, bool], names: set[str]
) -> None:
    found = planned(small, **settings)
    assert set(found) == LINEARS | names
    assert {found[name].shape for name in names} == {(4096, 64)}


def test_ignore_takes_globs(small: Checkpoint) -> None:
    assert set(planned(small, ignore=["*.layers.0.*"])) == {n for n in LINEARS if ".1." in n}
    assert set(planned(small, ignore=["*.mlp.*", "*.[qk]_proj"])) == {n for n in LINEARS if n[-6:-5] in "vo"}
    assert set(planned(small, ignore=["lm_head"], lm_head=True)) == LINEARS


@pytest.mark.parametrize("glob", ["lm_head", "embed_out", "model.embed_tokens", "*head"])
def test_head_and_embeddings_may_be_ignored_where_they_are_left_alone_anyway(small: Checkpoint, glob: str) -> None:
    assert set(planned(small, ignore=[glob])) == LINEARS
    eight = WeightActivationStage(kind="quantize", method="dynamic", ignore=[glob])
    assert {matrix.name for matrix in plan_matrices(eight, small, "stages.0")} == LINEARS
    assert problems(small, ignore=["lm_hed"])[0].startswith(
        "stages.0: 'lm_hed' matches no linear layer; did you mean lm_head?"
    )
    assert "matches no linear layer" in problems(small, overrides={glob: Override(bits=8)})[0]


def test_the_head_is_ignored_by_any_of_its_names(tmp_path: Path) -> None:
    checkpoint = Checkpoint(make_model(tmp_path / "model", "gpt_neox", tie_word_embeddings=False))
    assert "embed_out" in planned(checkpoint, lm_head=True)
    for name in ("lm_head", "embed_out"):
        assert not {"embed_out", "lm_head"} & set(planned(checkpoint, lm_head=True, ignore=[name]))


def test_of_several_overrides_each_changes_what_it_names_and_the_last_wins(small: Checkpoint) -> None:
    overrides = {
        "*.mlp.*": Override(bits=8, symmetric=False),
        "*.down_proj": Override(group_size=-1),
        "model.layers.1.*": Override(bits=2),
    }
    found = planned(small, overrides=overrides)

    def settings(name: str) -> tuple[int, int, bool]:
        matrix = found[f"model.layers.{name}"]
        return matrix.bits, matrix.group_size, matrix.symmetric

    assert settings("0.self_attn.q_proj") == (4, 32, True)
    assert settings("0.mlp.up_proj") == (8, 32, False)
    assert settings("0.mlp.down_proj") == (8, -1, False)
    assert settings("1.mlp.down_proj") == (2, -1, False)
    assert settings("1.self_attn.q_proj") == (2, 32, True)
    backwards = dict(reversed(overrides.items()))
    assert planned(small, overrides=backwards)["model.layers.1.mlp.down_proj"].bits == 8


def test_globs_respect_case(small: Checkpoint) -> None:
    assert "'*.MLP.*' matches no linear layer" in problems(small, ignore=["*.MLP.*"])[0]


# ---- problems


def test_globs_that_match_nothing_are_named_with_what_there_is(small: Checkpoint) -> None:
    found = problems(small, ignore=["*.down_prj"], overrides={"experts.*": Override(bits=8)})
    assert len(found) == 2 and all(line.startswith("stages.0: ") and "\n" not in line for line in found)
    assert found[0].startswith("stages.0: '*.down_prj' matches no linear layer; did you mean down_proj?")
    assert "'experts.*' matches no linear layer" in found[1]
    assert "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in found[1]


def test_group_sizes_that_do_not_divide_are_named_with_those_that_do(small: Checkpoint) -> None:
    assert problems(small, group_size=64) == [
        "stages.0.group_size: 64 does not divide the width 96 of model.layers.*.mlp.down_proj (2 layers); use -1 or 32"
    ]
    both = problems(small, group_size=128, overrides={"*.0.*.down_proj": Override(group_size=64)})
    assert len(both) == 3
    assert (
        sum("64 does not divide the width 96 of model.layers.*.mlp.down_proj (1 layers)" in line for line in both) == 1
    )
    assert (
        sum("128 does not divide the width 96 of model.layers.*.mlp.down_proj (1 layers)" in line for line in both) == 1
    )
    narrow = next(line for line in both if "128 does not divide the width 64 of " in line)
    assert narrow.endswith("(12 layers); use -1 or 32 or 64")
    assert "model.layers.*.mlp.gate_proj, model.layers.*.mlp.up_proj, model.layers.*.self_attn.k_proj" in narrow
    assert planned(small, group_size=64, overrides={"*.down_proj": Override(group_size=32)})


def test_all_problems_come_at_once(small: Checkpoint) -> None:
    assert len(problems(small, ignore=["nothing"], overrides={"none": Override(bits=2)}, group_size=64)) == 3


def test_nothing_left_is_a_problem(small: Checkpoint) -> None:
    assert problems(small, ignore=["*"]) == ["stages.0.ignore: leaves nothing to quantize; remove some of its globs"]


def test_lengths_and_vocabularies_beyond_the_model(small: Checkpoint) -> None:
    check_length(small, 1024, "evaluate.sequence_length")
    with pytest.raises(ModelError, match=r"^evaluate\.sequence_length: 1025 is more than the model's 1024 positions"):
        check_length(small, 1025, "evaluate.sequence_length")
    check_vocabulary(small, 4095)
    with pytest.raises(ModelError, match="token 4096, its embeddings end at 4095"):
        check_vocabulary(small, 4096)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "config.json says 3 layers, the weights have 2"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "'t5' is no decoder-only language model"),
    ],
)
def test_models_that_can_not_work_are_refused(tmp_path: Path, config: dict[str, Any], said: str) -> None:
    folder = write_model(tmp_path / "model", **config)
    recipe = Recipe(name="r", model=str(folder), stages=[spec()], evaluate=None, output="out")
    with pytest.raises(ModelError, match=said) as caught:
        plan_run(recipe, folder)
    assert "\n" not in str(caught.value)


def test_lengths_of_calibration_and_evaluation_count(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", max_position_embeddings=64)
    calibration = {"source": "text.txt", "sequence_length": 65}
    written = {"name": "r", "model": str(folder), "output": "out", "calibration": calibration}

    def recipe(method: str, evaluate: Any) -> Recipe:
        stage = {"kind": "quantize", "method": method, "group_size": 32}
        return Recipe.model_validate(written | {"stages": [stage], "evaluate": evaluate})

    with pytest.raises(ModelError, match=r"^calibration\.sequence_length: 65"):
        plan_run(recipe("gptq", None), folder)
    with pytest.raises(ModelError, match=r"^evaluate\.sequence_length: 80"):
        plan_run(recipe("rtn", {"sequence_length": 80}), folder)
    assert plan_run(recipe("rtn", {"sequence_length": 64}), folder).base is not None  # rtn needs no text


def test_weights_that_are_no_floats_and_checkpoints_without_layers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = in_memory(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj is stored as I8; give bf16"):
        find_modules(Checkpoint(folder))
    save_file({n: t for n, t in tensors.items() if ".layers." not in n}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no decoder layers under model\.layers in the weights"):
        find_modules(Checkpoint(folder))


# ---- sizes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[bool, torch.dtype], Path]:
    """Two wide layers and a small vocabulary, so that headers and heads do not hide what the matrices take."""
    folder, made = tmp_path_factory.mktemp("wide"), {}
    sizes = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64, "vocab_size": 1024}
    for tie, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        name = folder / f"{tie}"
        made[tie, dtype] = make_model(name, dtype=dtype, tie_word_embeddings=tie, **sizes)
    return made


SIZED = list(itertools.product((2, 3, 4, 8), (True, False), ("compressed-tensors", "gptq")))


@pytest.mark.parametrize(("bits", "symmetric", "format"), SIZED)
@pytest.mark.parametrize("tie", [True, False])
def test_estimated_bytes_are_the_bytes_on_disk(
    wide: dict[tuple[bool, torch.dtype], Path], tmp_path: Path, bits: int, symmetric: bool, format: str, tie: bool
) -> None:
    group_size = (32, 128, -1)[SIZED.index((bits, symmetric, format)) % 3]
    stage = spec(
        method="rtn", bits=bits, symmetric=symmetric, format=format, group_size=group_size, clip="none",
        lm_head=bits in (3, 8),
    )  # fmt: skip
    base = Checkpoint(next(path for (tied, _), path in wide.items() if tied == tie))
    matrices = plan_matrices(stage, base, "stages.0")
    context = Context(torch.device("cpu"), torch.float32, None, random_tokens(1, 4) % 1024, Reporter(quiet=True), False)
    quantize(stage, base, tmp_path, context)
    written = Checkpoint(tmp_path / "checkpoint")
    names = {matrix.name for matrix in matrices}
    packed = sum(info.bytes for name, info in written.tensors.items() if name.rpartition(".")[0] in names)
    dtype = "BF16" if tie else "F32"
    assert sum(bytes_on_disk(stage.layout, matrix, dtype) for matrix in matrices) == packed
    assert output_bytes(stage, matrices, base) == written.bytes


def test_a_tied_head_that_is_stored_twice_counts_once(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    tensors = in_memory(folder / "model.safetensors")
    once = parameter_count(Checkpoint(folder))
    assert once == sum(tensor.numel() for tensor in tensors.values())
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    twice = Checkpoint(folder)
    assert parameter_count(twice) == once
    stage = spec(method="rtn")
    context = Context(torch.device("cpu"), torch.float32, None, random_tokens(1, 4), Reporter(quiet=True), False)
    quantize(stage, twice, tmp_path / "work", context)
    written = Checkpoint(tmp_path / "work" / "checkpoint")
    assert output_bytes(stage, plan_matrices(stage, twice, "stages.0"), twice) == written.bytes


def test_memory_grows_with_the_text_and_covers_a_layer(small: Checkpoint) -> None:
    few, many = (memory(small, sequences, Place(held=0)) for sequences in (8, 128))
    assert many - few >= 120 * 1024 * 64 * 2  # hidden states in 16 bits
    layer = sum(info.bytes for name, info in small.tensors.items() if ".layers.0." in name)
    assert few >= 2 * layer
    alone = memory(small, 128, Place(held=0), drift_correction=0)
    assert many - alone >= 128 * 1024 * 64 * 2  # those of the original model
    assert memory(small, 128, Place(held=10**9)) == many + 10**9


def test_states_that_do_not_fit_on_a_gpu_are_kept_in_the_host(small: Checkpoint) -> None:
    """With room, in 16 bits in front of the widest linear; with less, between layers; with none, in the host."""
    between, inside = 2 * 128 * 1024 * 64 * 2, 2 * 128 * 1024 * (3 * 64 + 96) * 2
    rooms = {None: inside, inside + 40_000_000: inside, inside - 20_000_000: between, 30_000_000: 0}
    found = {free: forecast(small, 128, Place("cuda", 2, free, 0)) for free in rooms}
    sizes = {free: each.gpu_memory_bytes or 0 for free, each in found.items()}
    least = sizes[30_000_000]
    for free, states in rooms.items():
        assert states <= sizes[free] <= states + least
    host = {free: each.memory_bytes or 0 for free, each in found.items()}
    assert host[30_000_000] - host[None] == between
    halved = forecast(small, 128, Place("cuda", 2, None, 0, world=2)).gpu_memory_bytes or 0
    assert inside / 2 <= halved <= inside / 2 + least


def forecast(base: Checkpoint, sequences: int, place: Place, **settings: Any) -> Forecast:
    """What the quantize stage takes on so many sequences of 1024 tokens."""
    text = CalibrationSpec(source="text.txt", samples=sequences, sequence_length=1024)
    found = plan(spec(**settings), base, Setting("stages.0", text, place=place)).forecast
    assert found is not None
    return found


def memory(base: Checkpoint, sequences: int, place: Place, **settings: Any) -> int:
    found = forecast(base, sequences, place, **settings).memory_bytes
    assert found is not None
    return found


def test_planning_never_imports_torch(small: Checkpoint) -> None:
    code = (
        "import sys; from pathlib import Path; from compress.stages.quantize.plan import plan_matrices; "
        "from compress.model.checkpoint import Checkpoint; from compress.recipe.quantize import WeightOnlyStage; "
        f"stage = WeightOnlyStage(kind='quantize', group_size=32); found = Checkpoint(Path({str(small.folder)!r})); "
        "assert len(plan_matrices(stage, found, 'stages.0')) == 14; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
