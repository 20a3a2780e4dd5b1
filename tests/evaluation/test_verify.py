"""A whole run of a small recipe, and verification: of what it wrote, and of damaged copies of it."""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import invoke
from desk import RUN, Desk
from random_models import load_stock, make_model, random_tokens
from stock_here import answering
from torch import Tensor

from compress.evaluation import verify
from compress.evaluation.stock import Answer, Request, _failed
from compress.model.checkpoint import Checkpoint
from compress.recipe.schema import Recipe
from compress.records import Report, Verified
from compress.runs.runner import run
from compress.system.fingerprint import sha256
from compress.system.progress import Reporter

pytestmark = pytest.mark.usefixtures("stock_process")
CPU = torch.device("cpu")
TOKENS = random_tokens(1, 24, 2)[0]
Finished = tuple[Path, Path, Report]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stock_process: None) -> Finished:
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

    monkeypatch.setattr(verify, "asked", answering(ask))


def verified(folder: Path, computed: Tensor, dtype: torch.dtype) -> Verified:
    with verify.opening(folder, TOKENS, CPU, dtype, False) as opened:
        return opened(computed).verified


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
    assert verified(output, computed, dtype).passed
    packed = [name for name in Checkpoint(output).tensors if name.endswith("weight_packed")]
    for name in packed:
        damaged = copied(output, tmp_path / name)
        flip(damaged, name)
        found = verified(damaged, computed, dtype)
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
    found = {check.name: check for check in verify.verify_checkpoint(damaged, CPU, dtype, False)}
    assert found["files"] == verify.Check("files", False, "changed since they were written: model.safetensors")
    # the digest corrected too: what was computed is another witness
    record = json.loads((damaged / "dscompress.json").read_text())
    record["files"] = {name: sha256(damaged / name) for name in record["files"]}
    (damaged / "dscompress.json").write_text(json.dumps(record))
    found = {check.name: check for check in verify.verify_checkpoint(damaged, CPU, dtype, False)}
    assert {name: check.passed for name, check in found.items()} == {
        "files": True, "record": False, "stock loader": True,  # which reads the same damaged codes as our reader
    }  # fmt: skip
    assert found["record"].detail.startswith(f"{verify.OWN}: largest difference of a logit ")
    (damaged / "dscompress.json").unlink()
    unknown = {check.name: check.passed for check in verify.verify_checkpoint(damaged, CPU, dtype, False)}
    assert unknown["record"] is None and unknown["stock loader"]


@pytest.mark.usefixtures("stock_in_process")
def test_our_reader_and_the_stock_loader_are_compared(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = copied(finished[1], tmp_path / "copy")
    (output / "dscompress.json").unlink()
    other = copied(output, tmp_path / "other")
    flip(other, "model.layers.0.self_attn.q_proj.weight_packed")
    asked = verify.asked
    monkeypatch.setattr(verify, "asked", lambda request: asked(replace(request, model=str(other))))
    found = {check.name: check.passed for check in verify.verify_checkpoint(output, CPU, torch.float32, False)}
    assert found == {"files": True, "record": None, "stock loader": False}


@pytest.mark.parametrize(
    ("code", "said", "failure", "short"),
    [
        (1, ["Traceback", "KeyError: 'x'"], "KeyError: 'x'", False),
        (1, [], "no reason given", False),
        (-9, [], "the loader was stopped by signal 9, most likely for want of memory", True),
        (-11, [], "the loader was stopped by signal 11", False),
        (-6, ["what():  std::bad_alloc"], "what():  std::bad_alloc", True),
        (1, ["MemoryError"], "MemoryError", True),
        (1, ["torch.OutOfMemoryError: CUDA out of", "a hint"], "torch.OutOfMemoryError: CUDA out of", True),
        (1, ["OSError: [Errno 28] No space left on device"], "OSError: [Errno 28] No space left on device", True),
    ],
)  # fmt: skip
def test_want_of_memory_or_disk_is_told_from_a_checkpoint_that_cannot_be_opened(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, code: int, said: list[str], failure: str, short: bool
) -> None:
    answer = _failed(code, said)
    assert (answer.logits, answer.failure, answer.short) == (None, failure, short)
    monkeypatch.setattr(verify, "asked", answering(lambda request: answer))
    output, dtype = finished[1], torch.bfloat16
    computed = verify.own_logits(Checkpoint(output), TOKENS, CPU, dtype, False)
    found = verified(output, computed, dtype)
    if short:
        assert (found.loader, found.passed, found.max_logit_difference) == (verify.OWN, True, 0.0)
        assert found.note == f"no room for the stock loader: {failure}"
    else:
        assert (found.loader, found.passed, found.max_logit_difference) == (verify.STOCK, False, None)
        assert found.note == failure


@pytest.mark.parametrize(
    ("line", "code", "end"),
    [
        ("KeyError: 'x'", 1, f"warning: the written checkpoint was not verified by {verify.STOCK}: KeyError: 'x'\n"),
        ("MemoryError", 0, f"verified by the {verify.OWN}: no room for the stock loader: MemoryError\n"),
    ],
)
def test_exit_code_of_a_run_whose_result_the_stock_loader_cannot_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int, end: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "asked", answering(lambda request: _failed(1, [line])))
    with ExitStack() as stack:
        Desk(tmp_path, stack)
        result = invoke(*RUN)
    assert (result.exit_code, end in result.stderr) == (code, True), result.stderr
    assert json.loads((tmp_path / "out/report.json").read_text())["verified"]["passed"] == (code == 0)
