"""A whole run of a small recipe, and verification: of what it wrote, and of damaged copies of it."""

import json
from pathlib import Path

import pytest
import torch
from random_models import load_stock, make_model, random_tokens

from compress.evaluate import verify
from compress.evaluate.stock import Answer, Request
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import Recipe
from compress.records import Report
from compress.run.runner import run
from compress.system.progress import Reporter

CPU = torch.device("cpu")
TOKENS = random_tokens(1, 24, 2)[0]
Finished = tuple[Path, Path, Report]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run of a recipe, without evaluation: the parent, the output, the report."""
    folder = tmp_path_factory.mktemp("run")
    parent = make_model(folder / "model", intermediate_size=128, attention_bias=True, shard="200KB")
    (parent / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (parent / "LICENSE").write_text("whose model this is")
    (parent / "pytorch_model.bin").write_bytes(b"never opened")
    text = folder / "text.txt"
    text.write_text("The library stood at the corner of two quiet streets, and its door was open.\n" * 60)
    calibration = {"source": str(text), "samples": 8, "sequence_length": 32}
    recipe = Recipe.model_validate(
        {"name": "small", "model": str(parent), "calibration": calibration, "evaluate": None,
         "stages": [{"kind": "quantize", "group_size": 32}], "output": str(folder / "out")}
    )  # fmt: skip
    return parent, folder / "out", run(recipe, device="cpu", reporter=Reporter(quiet=True))


def test_a_run_writes_all_that_a_loader_and_a_reader_want(finished: Finished) -> None:
    parent, output, report = finished
    names = {file.name for file in output.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "LICENSE"}
    assert names >= {"chat_template.jinja", "README.md", "report.json", "report.md", "report.html", "dscompress.json"}
    assert not {"pytorch_model.bin"} & names
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (output / name).read_bytes() == (parent / name).read_bytes()
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (output, parent))
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == before
    assert (output / "README.md").read_text().startswith("---\n")
    assert report.compressed.bytes == sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert report.size_ratio == report.base.bytes / report.compressed.bytes > 1


def test_a_run_is_verified_by_the_stock_loader(finished: Finished) -> None:
    verified = finished[2].verified
    assert verified.passed and verified.loader == verify.STOCK
    assert verified.max_logit_difference == 0.0


@pytest.fixture
def stock_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks the stock loader here and not in a process of its own, which takes seconds to start."""

    def ask(request: Request) -> Answer:
        stock = load_stock(Path(request.model), getattr(torch, request.dtype))
        with torch.no_grad():
            logits = stock(torch.tensor([request.tokens]), use_cache=False).logits[0]
        return Answer(logits.float(), [])

    monkeypatch.setattr(verify, "ask", ask)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def flip(folder: Path, name: str) -> None:
    """Flip the bits of one byte in the middle of a tensor."""
    for file in folder.glob("*.safetensors"):
        raw = bytearray(file.read_bytes())
        length = int.from_bytes(raw[:8], "little")
        row = json.loads(raw[8 : 8 + length]).get(name)
        if row is not None:
            raw[8 + length + sum(row["data_offsets"]) // 2] ^= 0xFF
            file.write_bytes(raw)
            return
    raise AssertionError(f"no tensor {name}")


@pytest.mark.usefixtures("stock_in_process")
def test_verification_passes_what_was_written_and_fails_a_flipped_byte(finished: Finished, tmp_path: Path) -> None:
    output, dtype = finished[1], torch.bfloat16
    computed = verify.own_logits(Checkpoint(output), TOKENS, CPU, dtype, False)
    assert verify.verify_logits(output, TOKENS, computed, CPU, dtype, False).passed
    packed = [name for name in Checkpoint(output).tensors if name.endswith("weight_packed")]
    for name in packed:
        damaged = copied(output, tmp_path / name)
        flip(damaged, name)
        found = verify.verify_logits(damaged, TOKENS, computed, CPU, dtype, False)
        assert not found.passed, name
        assert found.max_logit_difference is not None and found.tolerance is not None
        assert found.max_logit_difference > found.tolerance


@pytest.mark.usefixtures("stock_in_process")
def test_verify_command_compares_with_the_record_and_with_the_stock_loader(finished: Finished, tmp_path: Path) -> None:
    output = finished[1]
    recorded = json.loads((output / "dscompress.json").read_text())["probe"]
    dtype = getattr(torch, recorded["dtype"])
    checks = verify.verify_checkpoint(output, CPU, dtype, False)
    assert [check.name for check in checks] == ["files", "record", "stock loader"]
    assert all(check.passed for check in checks)
    damaged = copied(output, tmp_path / "damaged")
    flip(damaged, "model.layers.0.self_attn.q_proj.weight_packed")
    found = {check.name: check.passed for check in verify.verify_checkpoint(damaged, CPU, dtype, False)}
    assert not found.pop("record") or not found.pop("files")
    (damaged / "dscompress.json").unlink()
    unknown = {check.name: check.passed for check in verify.verify_checkpoint(damaged, CPU, dtype, False)}
    assert unknown["record"] is None and unknown["stock loader"]
