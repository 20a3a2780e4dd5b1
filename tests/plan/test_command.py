"""`dscompress plan` as it is used: what it prints and writes, what it recommends, and what bad input gets."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import invoke

import compress
from compress.footprint.cards import CARDS
from compress.footprint.losses import LOSSES
from compress.footprint.precisions import PRECISIONS
from compress.footprint.recommend import ORDER, RECIPES
from compress.footprint.records import Footprint
from compress.recipe.load import list_recipes, load_recipe
from compress.runs.plan import plan_run

CONFIGS = Path(__file__).parent / "configs"
LLAMA = CONFIGS / "llama-3.1-8b.json"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "RESULTS.md"
NAMES = [precision.name for precision in PRECISIONS]


def succeed(*arguments: object) -> str:
    result = invoke("plan", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def advice(name: str, **options: Any) -> compress.footprint.records.Advice:  # type: ignore[name-defined]
    found = compress.plan(str(CONFIGS / f"{name}.json"), **options).advice
    assert found is not None
    return found


# What it prints


def test_every_precision_has_a_row_and_nothing_is_cut() -> None:
    printed = succeed(LLAMA, "--gpu", "4090")
    lines = [line for line in printed.splitlines() if line.startswith(tuple(NAMES))]
    assert [line.split("  ")[0] for line in lines] == NAMES
    assert "…" not in printed
    assert "llama, 8,030,261,248 parameters (from its config)" in printed
    assert "RTX 4090: 25.8 GB, of which a model may fill 23.2 GB, 1,008 GB/s" in printed
    assert "KV cache   1.07 GB for 8192 tokens x 1 (8 key-value heads, model shared by 2 or 4 or 8 cards)" in printed


def test_without_a_card_all_cards_are_listed() -> None:
    printed = succeed(LLAMA)
    assert all(f"\n{name} " in printed for name in CARDS) and "…" not in printed
    assert "give --gpu NAME or --memory 24GB" in printed


def test_json_is_the_record() -> None:
    found = Footprint.model_validate_json(succeed(LLAMA, "--gpu", "4090", "--json"))
    assert found == compress.plan(str(LLAMA), gpu="RTX 4090")
    rows = {row.precision: row for row in found.rows}
    assert rows["bf16"].total_bytes == 2 * 8_030_261_248 + found.cache.bytes + (rows["bf16"].activation_bytes or 0)
    assert found.cache.bytes == 2 * 32 * 8 * 128 * 2 * 8192
    assert rows["bf16"].ms_per_token == pytest.approx(
        (2 * (8_030_261_248 - 128256 * 4096) + found.cache.bytes) / 1008e6
    )
    assert rows["fp32"].fits is False and rows["fp32"].ms_per_token is None
    assert rows["fp32"].cache_bytes == 2 * found.cache.bytes


def test_a_mixture_says_both_counts_and_that_it_is_not_made() -> None:
    printed = succeed(CONFIGS / "qwen3-30b-a3b.json", "--gpu", "a100 40gb")
    assert "30,532,122,624 parameters, 3.35B active" in printed
    assert "dscompress does not compress this model for now: it is a mixture of experts" in printed
    assert "which dscompress does not train" in printed and "dscompress run" not in printed


def test_both_caches_of_a_latent_are_said() -> None:
    printed = succeed(CONFIGS / "deepseek-v3.json", "--gpu", "h200")
    assert "one latent for all heads" in printed and "with keys and values of each head it is 40.9 GB" in printed


def test_a_machine_that_unpacks_codes_gets_no_figures_for_them() -> None:
    rows = {row.precision: row for row in compress.plan(str(LLAMA), gpu="m4 pro").rows}
    assert rows["bf16"].fits and not rows["int4 g128"].fits and rows["int4 g128"].longest_context is None
    assert rows["int4 g128"].cards["M4 Pro 48GB"] is None and rows["int4 g128"].cards["RTX 4090"] == 1
    assert "unpacks them to 16 bits" in succeed(LLAMA, "--gpu", "m4 pro")


def test_training_takes_less_with_more_cards_and_never_less_than_its_weights() -> None:
    found = compress.plan(str(LLAMA))
    for each in found.training:
        assert list(each.bytes.values()) == sorted(each.bytes.values(), reverse=True)
    by_way = {each.way: each.bytes for each in found.training}
    assert by_way["finetune, AdamW"][8] > 16 * found.model.parameters / 8
    assert by_way["finetune, LoRA of rank 16"][1] < by_way["finetune, 8-bit AdamW"][1] < by_way["finetune, AdamW"][1]
    assert by_way["distill from the base, AdamW"][1] > by_way["finetune, AdamW"][1] + 2 * found.model.parameters * 0.9


# What it recommends


def test_the_finest_that_fits_is_taken() -> None:
    assert advice("llama-3.1-8b", gpu="4090").precision == "bf16"
    assert advice("llama-3.1-8b", gpu="4080").precision == "int8"
    assert advice("llama-3.1-8b", gpu="5080").precision == "fp8"  # which multiplies no int8
    assert advice("llama-3.1-8b", memory="8GB").precision == "int4 g64"
    assert advice("llama-3.1-8b", memory="8GB", context=16384).precision == "int3 g64"
    assert advice("llama-3.1-8b", memory="8GB", context=16384).recipe == "8b_int4_gptq"


def test_what_a_card_has_no_kernels_for_is_said_and_not_recommended() -> None:
    rows = {row.precision: row for row in compress.plan(str(LLAMA), gpu="v100").rows}
    assert rows["int8"].fits and not rows["int8"].has_kernels and rows["int3 g64"].has_kernels is None
    assert advice("llama-3.1-70b", gpu="mi300x", batch=20).precision == "fp8"
    assert "no kernels on MI300X for int8; int4 g64; " in succeed(LLAMA, "--gpu", "mi300x")
    cells = [line.split() for line in succeed(LLAMA).splitlines() if line.startswith(("T4 ", "L4 "))]
    assert [row[:4] for row in cells] == [["T4", "2*", "1", "1*"], ["L4", "1", "1", "1"]]


def test_what_does_not_fit_says_by_how_much_and_what_would() -> None:
    text = advice("llama-3.1-70b", gpu="3060").text
    assert text.startswith(
        "nothing fits RTX 3060 12GB with 8192 tokens x 1: the smallest that it runs, pruned 40 %, int4"
    )
    assert " GB over the 11.6 GB that a model may fill; what would: 4 such cards, or one " in text
    text = advice("llama-3.1-8b", memory="6GB", context=131072, batch=4).text
    assert "--context " in text and "--batch" not in text
    assert "is 1 " not in text


def test_orders_and_recipes_are_of_what_there_is() -> None:
    assert set(ORDER) <= set(NAMES) and set(LOSSES) <= set(NAMES)
    assert {*RECIPES.values(), "8b_int4_gptq", "8b_edge_chain"} <= {name for name, _ in list_recipes()}
    measured = [LOSSES[name].most for name in ORDER if name in LOSSES]
    assert measured == sorted(measured)


def test_losses_stand_in_the_results() -> None:
    results = RESULTS.read_text(encoding="utf-8")
    for figure in ("0.00853", "0.0105", "0.01826", "0.0208", "0.0607", "0.110", "0.315"):
        assert figure in results
    said = {f"{value:.3g}" for each in LOSSES.values() for value in (each.least, each.most)}
    assert said == {"0.0085", "0.0105", "0.0183", "0.0208", "0.0607", "0.11", "0.315"}


@pytest.mark.parametrize(
    ("memory", "precision"),
    [("9MB", "int8"), ("6MB", "int4 g64"), ("4.6MB", "int3 g128"), ("4.4MB", "pruned 25 %, int4")],
)
def test_the_recipe_that_is_written_can_be_run(memory: str, precision: str, tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "recipe.yaml"
    printed = succeed(tiny_model, "--memory", memory, "--context", 64, "--write", file)
    assert f"advice     {precision}: " in printed and f"recipe     {file}" in printed
    assert file.read_text().count("#") >= 6
    recipe = load_recipe(str(file))
    row = next(row for row in compress.plan(str(tiny_model), context=64).rows if row.precision == precision)
    planned = plan_run(recipe, tiny_model).stages[-1].shapes
    assert planned is not None and planned.bytes == row.file_bytes
    assert recipe.calibration == "general_en" and Path(recipe.model) == tiny_model


def test_the_command_that_is_printed_plans_the_same(tiny_model: Path) -> None:
    found = compress.plan(str(tiny_model), memory="4.6MB", context=64)
    assert found.advice is not None and found.advice.command is not None and found.advice.recipe is not None
    settings = [*found.advice.settings, "evaluate.sequence_length=1024"]
    recipe = load_recipe(found.advice.recipe, overrides=settings, model=str(tiny_model))
    assert all(f"--set {each}" in found.advice.command for each in settings)
    shapes = plan_run(recipe, tiny_model).stages[-1].shapes
    assert shapes is not None
    assert shapes.bytes == next(row.file_bytes for row in found.rows if row.precision == found.advice.precision)


def test_yaml_holds_any_path(tmp_path: Path, tiny_model: Path) -> None:
    odd = tmp_path / "a model: #1"
    odd.symlink_to(tiny_model)
    succeed(odd, "--memory", "9MB", "--context", 64, "--write", tmp_path / "r.yaml")
    assert yaml.safe_load((tmp_path / "r.yaml").read_text())["model"] == str(odd)


# What bad input gets


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "gtx 99"], "--gpu gtx 99: is not known"),
        (["--memory", "24"], "--memory 24: has no unit; write 24GB"),
        (["--memory", "much"], "--memory much: is no size; write it like 24GB or 22.5GiB"),
        (["--memory", "0GB"], "--memory 0GB: is no size"),
        (["--gpu", "4090", "--memory", "24GB"], "--gpu and --memory: say the same thing twice; give one of them"),
        (["--batch", "0"], "--batch 0: is no number of sequences; use 1 or more"),
        (["--context", "131073"], "--context 131073: is more than the model's 131072 positions; use at most 131072"),
        (["--context", "0"], "--context 0: is no number of tokens; use 1 or more"),
        (["--write", "new.yaml"], "--write: needs to know what to fit; give --gpu or --memory too"),
        (["--write", "new.yaml", "--gpu", "4090"], "--write: there is no recipe to write: bf16 fits RTX 4090"),
        (["--write", "new.yaml", "--gpu", "4080"], "has a config and no weights; name the model's folder or hub id"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_make_no_sense(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("plan", LLAMA, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_is_there_is_kept(tmp_path: Path, tiny_model: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    result = invoke("plan", tiny_model, "--memory", "9MB", "--write", file)
    assert (result.exit_code, file.read_text()) == (2, "mine")
    assert result.stderr == f"error: {file}: exists; name another file\n"
    result = invoke("plan", tiny_model, "--memory", "9MB", "--context", 64, "--write", tmp_path / "no" / "r.yaml")
    assert result.exit_code == 2 and "cannot be written (No such file or directory)" in result.stderr


GOOD = json.loads(LLAMA.read_text())
BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ([], "holds no JSON object"),
    "no architecture": ({"hidden_size": 64}, "has no model_type, so its architecture is not known"),
    "an unknown family": ({"model_type": "llamma"}, "model_type 'llamma' is no causal language model"),
    "an encoder": ({"model_type": "vit"}, "model_type 'vit' is no causal language model"),
    "code of its own": (GOOD | {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}}, "model_type 'own' is no"),
    "text for a number": (GOOD | {"hidden_size": "wide"}, "hidden_size"),
    "no width": (GOOD | {"hidden_size": 0}, "hidden_size"),
    "heads that do not divide": (GOOD | {"num_attention_heads": 0}, "num_attention_heads"),
}


@pytest.mark.parametrize("name", BAD)
def test_configs_that_are_none(name: str, tmp_path: Path) -> None:
    content, said = BAD[name]
    file = tmp_path / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    for given in (file, tmp_path):
        result = invoke("plan", given)
        assert result.exit_code == 2, result.stdout
        assert result.stderr.count("\n") == 1 and said in result.stderr


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("./nowhere", "./nowhere does not exist"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
        ("package:no_such_package/x.gguf", "package no_such_package is not installed"),
    ],
)
def test_models_that_are_not_there(model: str, said: str) -> None:
    result = invoke("plan", model)
    assert result.exit_code == 2 and said in result.stderr


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    result = invoke("plan", tmp_path)
    assert result.exit_code == 2 and "no config.json, so this is no Hugging Face model folder" in result.stderr
