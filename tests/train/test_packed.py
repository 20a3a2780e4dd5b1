"""Attention inside documents, beside a mask that transformers makes, and plain attention on each document alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.train.packed import boundaries, packed_attention, takes_documents
from compress.train.trainee import Inputs, isolate, states_of
from tests.support.random_models import load_stock, make_model, random_tokens

CPU = torch.device("cpu")


def positions_of(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


@given(
    rows=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_boundaries_are_the_ends_of_documents_and_of_sequences(rows: list[list[int]]) -> None:
    whole = max(map(sum, rows))
    lengths = [[*row, whole - sum(row)] if sum(row) < whole else row for row in rows]
    found = boundaries(positions_of(lengths)).tolist()
    ends = [0]
    for length in (length for row in lengths for length in row):
        ends.append(ends[-1] + length)
    assert found == ends


def test_a_sequence_that_goes_on_with_a_document_begins_one_of_its_own() -> None:
    assert boundaries(torch.tensor([[0, 1, 2], [3, 4, 0]])).tolist() == [0, 3, 5, 6]


def test_each_document_is_attended_to_by_itself() -> None:
    query, key, value = torch.randn(11, 4, 8), torch.randn(11, 2, 8), torch.randn(11, 2, 8)
    found = packed_attention(query, key, value, torch.tensor([0, 4, 5, 11]), 6, 0.3)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        for head in range(4):
            scores = 0.3 * query[start:end, head].double() @ key[start:end, head // 2].double().T
            scores.masked_fill_(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            expected = scores.softmax(-1) @ value[start:end, head // 2].double()
            assert torch.allclose(found[start:end, head].double(), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_states_and_gradients_are_those_of_the_mask(family: str, tmp_path: Path) -> None:
    model = load_stock(make_model(tmp_path / "model", family, torch.float32), torch.float32).requires_grad_()
    positions = positions_of([[10, 14], [24], [3, 1, 20]])
    inputs = Inputs(random_tokens(3, 24), positions, torch.arange(72), torch.arange(72), boundaries(positions))

    def found() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        states = states_of(model, model.model.layers, inputs).last
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        return states.detach(), [each.grad.clone() for each in model.model.layers.parameters()]

    masked, wanted = found()
    isolate(model, CPU)
    assert takes_documents(model)
    states, gradients = found()
    assert torch.allclose(states, masked, atol=1e-5 * float(masked.abs().max()))
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, expected, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "more"),
    [("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 16}), ("mistral", {"sliding_window": 4096})],
)
def test_windows_and_caps_keep_their_usual_attention(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = load_stock(make_model(tmp_path / "model", family, torch.float32, **more), torch.float32)
    isolate(model, CPU)
    assert not takes_documents(model)


@pytest.mark.parametrize("fault", ["other", "missing"])
def test_a_kernel_that_gives_other_states_or_none_is_not_used(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(query: Tensor, *_: Any) -> Tensor:
        if fault == "missing":
            raise RuntimeError("FlashAttention is not there")
        return query * 2

    monkeypatch.setattr("compress.train.packed.packed_attention", broken)
    model = load_stock(make_model(tmp_path / "model", "llama", torch.float32), torch.float32)
    isolate(model, CPU)
    assert not takes_documents(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("heads", [(9, 3), (4, 4)])
def test_flash_attention_gives_the_outputs_and_gradients_of_the_cpu(heads: tuple[int, int]) -> None:
    positions = positions_of([[300, 724], [1024], [1, 1000, 23]])
    documents, tokens = boundaries(positions), positions.numel()
    plain = [torch.randn(tokens, count, 64).bfloat16() for count in (heads[0], heads[1], heads[1])]
    found = []
    for device in ("cpu", "cuda"):
        made = [
            each.to(device, torch.float32 if device == "cpu" else torch.bfloat16).requires_grad_() for each in plain
        ]
        out = packed_attention(*made, documents.to(device), 1024, 0.125)
        (out.float() * torch.linspace(-1, 1, out.numel(), device=device).view_as(out)).sum().backward()
        found.append([out, *(each.grad for each in made)])
    for one, other in zip(*found, strict=True):
        assert float((one - other.cpu().float()).norm() / one.norm()) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_on_the_gpu_takes_documents(compiled: bool, tmp_path: Path) -> None:
    model: nn.Module = load_stock(make_model(tmp_path / "model", "llama", torch.bfloat16), torch.bfloat16)
    model.requires_grad_().cuda()
    positions = positions_of([[10, 14], [24]])
    rows = torch.arange(48)
    inputs = Inputs(*(each.cuda() for each in (random_tokens(2, 24), positions, rows, rows, boundaries(positions))))
    layers: Any = model.model.layers
    usual = states_of(model, layers, inputs).last
    isolate(model, torch.device("cuda"))
    assert takes_documents(model)
    if compiled:
        for layer in layers:
            layer.compile()
    own = states_of(model, layers, inputs).last
    assert float((own - usual).float().abs().max()) < 0.05 * float(usual.float().abs().max())
    own.float().square().sum().backward()
