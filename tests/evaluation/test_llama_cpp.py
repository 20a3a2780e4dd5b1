"""What llama.cpp is asked about a file, and what is made of its answers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exported import written
from gguf_files import byte_level, write_gguf
from random_models import make_model, random_tokens

from compress.evaluation import llama_cpp
from compress.evaluation.llama_cpp import (
    LlamaAnswer,
    Timing,
    apart_of,
    ask_llama_cpp,
    check_in_llama_cpp,
    llama_cpp_missing,
)

asks_llama_cpp = pytest.mark.skipif(llama_cpp_missing() is not None, reason="llama.cpp is not installed")


@asks_llama_cpp
def test_the_tiny_model_passes(tiny_model: Path, tmp_path: Path) -> None:
    done = written(tiny_model, tmp_path / "tiny.gguf", "bf16")
    checks, pace = check_in_llama_cpp(tiny_model, done.files[0], done.matrices, timing=Timing(16, 4))
    assert [check.passed for check in checks] == [True, True]
    assert checks[0].detail.startswith("the same in 2")
    assert "of 16 tokens it goes on with, the first" in checks[1].detail
    assert pace is not None and min(pace.prefill_tokens_per_second, pace.decode_tokens_per_second) > 0
    assert pace.peak_bytes >= pace.loaded_bytes > done.bytes


@asks_llama_cpp
def test_one_wrong_matrix_is_seen(tiny_model: Path, tmp_path: Path) -> None:
    done = written(tiny_model, tmp_path / "tiny.gguf", "f32")
    tensor = next(t for t in gguf.GGUFReader(done.files[0]).tensors if t.name == "blk.2.attn_v.weight")
    values = np.memmap(done.files[0], np.float32, "r+", int(tensor.data_offset), tuple(tensor.data.shape))
    values *= 1.25
    values.flush()
    checks, _ = check_in_llama_cpp(tiny_model, done.files[0], done.matrices)
    assert [check.passed for check in checks] == [True, False]


@asks_llama_cpp
def test_other_tokens_are_said_with_the_text(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = byte_level(tiny_model, "qwen2", add_bos_token=False)
    file = write_gguf(tiny_model, tmp_path / "tiny.gguf", tokenizer=tokenizer)
    checks, _ = check_in_llama_cpp(tiny_model, file, ["F32"])
    assert [check.passed for check in checks] == [False, True]
    assert "odd texts, first in" in checks[0].detail and "instead of" in checks[0].detail


@asks_llama_cpp
def test_what_it_does_not_open_is_said_in_one_line(tmp_path: Path) -> None:
    original = make_model(tmp_path / "model")
    file = write_gguf(original, tmp_path / "model.gguf", without=["blk.1.ffn_up.weight"])
    answer = ask_llama_cpp(file, [1, 2])
    assert isinstance(answer, str) and "blk.1.ffn_up.weight" in answer and "\n" not in answer
    checks, pace = check_in_llama_cpp(original, file, ["F32"])
    assert pace is None and [check.passed for check in checks] == [False]
    assert "does not open it: " in checks[0].detail


@asks_llama_cpp
def test_all_logits_of_a_prompt_and_those_one_by_one(tmp_path: Path) -> None:
    file = written(make_model(tmp_path / "model"), tmp_path / "model.gguf").files[0]
    tokens = random_tokens(1, 20)[0].tolist()
    first = ask_llama_cpp(file, tokens, new_tokens=3)
    assert isinstance(first, LlamaAnswer)
    assert first.logits.shape == (20, 4096) and first.continuation[0] == int(first.logits[-1].argmax())
    again = ask_llama_cpp(file, [*tokens, *first.continuation], new_tokens=0)
    assert isinstance(again, LlamaAnswer)
    assert again.logits[19:22].argmax(-1).tolist() == first.continuation
    assert (again.logits[:20] - first.logits).abs().max() <= 1e-2 * first.logits.abs().max()


def test_a_process_that_dies_is_told_by_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "client.py"
    said = "'x.cpp:12: GGML_ASSERT(ok) failed', 'a backtrace', sep='\\n', file=sys.stderr, flush=True"
    client.write_text(f"import os, sys\nprint({said})\nos.abort()\n")
    monkeypatch.setattr(llama_cpp.llama_cpp_client, "__file__", str(client))
    monkeypatch.setattr(llama_cpp, "_library", lambda: Path("nowhere.so"))
    assert ask_llama_cpp(client, []) == "stopped by signal 6 (x.cpp:12: GGML_ASSERT(ok) failed)"


def test_without_the_package_nobody_is_asked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: None)
    checks, pace = check_in_llama_cpp(tiny_model, Path("x.gguf"), ["F32"])
    assert pace is None and [check.passed for check in checks] == [None]
    assert checks[0].detail == "not asked: xllamacpp is not installed; pip install 'dscompress[llama-cpp]'"


@pytest.mark.parametrize(("types", "most"), [(["F32"], 0.25), (["F16", "BF16"], 1.0), (["BF16", "Q4_0"], 5.0)])
def test_how_far_apart_follows_from_what_rounding_does(types: list[str], most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(9, 50, generator=generator), torch.randn(9, 50, generator=generator)
    tokens = torch.randint(0, 50, (9,), generator=generator)

    def of(logits: Any) -> Any:
        values = logits.double().numpy()
        values = values - np.log(np.exp(values).sum(1, keepdims=True))
        return values[np.arange(8), tokens[1:].numpy()]

    said, rounded = exact + 0.01 * noise, exact + 0.05 * noise.flip(0)
    found = apart_of(said, exact, rounded, tokens, types)
    apart = np.abs(of(said) - of(exact))
    assert found.tokens == 8
    assert found.mean == pytest.approx(apart.mean()) and found.max == pytest.approx(apart.max())
    assert found.tolerance == pytest.approx(max(0.005, most * np.abs(of(rounded) - of(exact)).mean()))
