"""What training takes, in bytes and operations, and what is chosen by it; and which losses are taken for accidents."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from compress.errors import UserError
from compress.train.body import Body
from compress.train.flops import PEAKS, peak_of, step_flops
from compress.train.guard import Guard
from compress.train.memory import Demand, Setup

EXACT, SMALL = "adamw", "adamw8bit"


def body(
    layers: int = 4, hidden: int = 256, ffn: int = 1024, vocabulary: int = 32000, heads: int = 256, tied: bool = False
) -> Body:
    """Of a llama with as many keys as queries."""
    linears = layers * (4 * hidden * heads + 3 * hidden * ffn)
    outer = vocabulary * hidden
    return Body((1 if tied else 2) * outer + linears, outer + linears, layers, hidden, ffn, heads, heads, vocabulary)


SIZES = ("layers", "hidden", "ffn", "vocabulary", "heads")
DIMS = st.fixed_dictionaries(
    {
        "layers": st.integers(1, 80),
        "hidden": st.integers(1, 128).map(lambda n: 64 * n),
        "ffn": st.integers(1, 256).map(lambda n: 64 * n),
        "vocabulary": st.integers(1, 300).map(lambda n: 512 * n),
        "heads": st.integers(1, 128).map(lambda n: 64 * n),
        "tied": st.booleans(),
    }
)
SETUPS = st.builds(Setup, st.integers(1, 64), st.sampled_from([EXACT, SMALL]), st.booleans())


def demand(student: Body, **more: Any) -> Demand:
    given_: dict[str, Any] = {
        "trainable": student.parameters, "teacher": None, "length": 512, "width": 2, "device": "cuda", "world": 1,
    }  # fmt: skip
    return Demand(student, **given_ | more)


@settings(max_examples=200, deadline=None)
@given(
    dims=DIMS,
    setup=SETUPS,
    length=st.integers(1, 8192),
    share=st.floats(0, 1),
    taught=st.booleans(),
    world=st.sampled_from([1, 2, 8]),
    device=st.sampled_from(["cuda", "cpu"]),
    key=st.sampled_from([*SIZES, "length", "trainable", "teacher", "micro", "again", "moments"]),
    factor=st.integers(2, 5),
)
def test_more_of_anything_never_needs_less(
    dims: dict[str, int], setup: Setup, length: int, share: float, taught: bool, world: int, device: str, key: str,
    factor: int,
) -> None:  # fmt: skip
    student = body(**dims)
    less = demand(
        student, trainable=int(share * student.parameters), length=length, teacher=student if taught else None,
        world=world, device=device,
    )  # fmt: skip
    more, more_setup = less, setup
    if key in SIZES:
        larger = body(**dims | {key: factor * dims[key]})
        more = replace(less, student=larger, trainable=int(share * larger.parameters))
    elif key == "length":
        more = replace(less, length=factor * length)
    elif key == "trainable":
        more = replace(less, trainable=min(student.parameters, factor * less.trainable))
    elif key == "teacher":
        more = replace(less, teacher=body(**dims | {"layers": factor * dims["layers"]}))
    elif key == "micro":
        more_setup = replace(setup, micro_batch=factor * setup.micro_batch)
    elif key == "again":
        setup, more_setup = replace(setup, again=True), replace(setup, again=False)
    else:
        setup, more_setup = replace(setup, optimizer=SMALL), replace(setup, optimizer=EXACT)  # type: ignore[arg-type]
    assert more.bytes(more_setup) >= less.bytes(setup) > 0


@settings(max_examples=100, deadline=None)
@given(dims=DIMS, setup=SETUPS, taught=st.booleans())
def test_more_processes_never_need_more_in_each(dims: dict[str, int], setup: Setup, taught: bool) -> None:
    """Of a deep model, whose layers are much beside the whole one that a process holds."""
    student = body(**dims | {"layers": 80, "vocabulary": 512})
    found = [demand(student, world=world, teacher=student if taught else None).bytes(setup) for world in (2, 4, 8)]
    assert found[0] >= found[1] >= found[2]


def test_weights_gradients_and_moments_are_the_bytes_that_torch_keeps() -> None:
    """16 bytes a trained weight with exact moments, and 2 more for the copy that computes."""
    small, large = body(layers=4), body(layers=40)
    one, two = (demand(each, length=1).bytes(Setup(1, "adamw", True)) for each in (small, large))
    assert (two - one) / (large.parameters - small.parameters) == pytest.approx(18, rel=0.01)
    frozen = demand(large, trainable=0, length=1).bytes(Setup(1, "adamw", True))
    assert (two - frozen) / large.parameters == pytest.approx(14, rel=0.01)  # it is held in 16 bits then, and once more


def test_exact_moments_come_first_then_keeping_then_many_sequences() -> None:
    asked = demand(body(layers=32, hidden=2048, ffn=8192), length=2048)
    chosen = [
        asked.choose(16, free, "stages.0", None, "auto", None)
        for free in sorted(
            {asked.bytes(Setup(n, o, a)) for n in (1, 2, 4, 8, 16) for o in (EXACT, SMALL) for a in (True, False)}
        )  # type: ignore[arg-type]  # noqa: E501
    ]
    assert chosen[-1] == Setup(16, "adamw", False)
    exact = [setup.optimizer == "adamw" for setup in chosen]
    assert exact == sorted(exact) and True in exact and False in exact  # small moments where nothing else fits
    assert any(setup.again for setup in chosen) and not chosen[-1].again


@settings(max_examples=100, deadline=None)
@given(
    dims=DIMS,
    share=st.integers(1, 48),
    free=st.floats(1e9, 4e11),
    optimizer=st.sampled_from(["auto", EXACT, SMALL]),
    micro=st.sampled_from([None, 1, 3]),
    again=st.sampled_from([None, True, False]),
    device=st.sampled_from(["cuda", "cpu"]),
)
def test_what_is_chosen_fits_and_is_what_was_asked_for(
    dims: dict[str, int], share: int, free: float, optimizer: str, micro: int | None, again: bool | None, device: str
) -> None:
    asked = demand(body(**dims), device=device)
    try:
        found = asked.choose(share, free, "stages.0", micro, optimizer, again)
    except UserError:
        least = Setup(micro or 1, SMALL if optimizer == "auto" else optimizer, again is not False)  # type: ignore[arg-type]
        assert asked.bytes(least) > free
        return
    assert asked.bytes(found) <= free
    assert found.micro_batch == micro if micro else share % found.micro_batch == 0
    assert optimizer in ("auto", found.optimizer) and again in (None, found.again)


def test_where_nothing_fits_the_message_names_the_least_and_what_to_lower() -> None:
    asked = demand(body(), teacher=body(), cacheable=True)
    with pytest.raises(UserError) as caught:
        asked.choose(16, 1e9, "finetune", 4, "adamw", False)
    least = asked.bytes(Setup(4, "adamw", False))
    found = re.fullmatch(
        r"finetune: training needs about (\S+) GB in each process and 1\.00 GB are free; use lora: \{\}, more "
        r"processes \(--nproc\), optimizer: adamw8bit, micro_batch: 1, checkpoint_activations: true, targets: cached",
        str(caught.value),
    )
    assert found is not None, str(caught.value)
    assert float(found[1]) == pytest.approx(least / 1e9, abs=0.01)
    with pytest.raises(UserError, match="use a shorter sequence_length$"):
        replace(asked, trainable=100, teacher=None, device="cpu").choose(16, 1e8, "finetune", None, "auto", None)
    with pytest.raises(UserError, match=r"use lora: \{\}$"):
        replace(asked, cacheable=False, device="cpu").choose(16, 1e8, "finetune", None, "auto", None)


@pytest.mark.parametrize(
    ("here", "optimizer", "said"),
    [
        (True, "adamw", "use lora: {}, optimizer: adamw8bit"),
        (
            False,
            "adamw",
            "use lora: {}, optimizer: adamw8bit (torchao is not installed; pip install 'dscompress[train]')",
        ),
        (True, "adamw8bit", "use lora: {}"),
        (True, "auto", "use lora: {}"),  # it has tried both
    ],
)
def test_small_moments_are_a_remedy_where_they_were_not_tried(
    here: bool, optimizer: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.system.extras.find_spec", lambda name: object() if here else None)
    with pytest.raises(UserError) as caught:
        demand(body(), device="cpu").choose(16, 1e8, "finetune", None, optimizer, None)
    assert str(caught.value).endswith(f"; {said}")


# Operations


def test_operations_are_those_that_torch_counts() -> None:
    """Of a whole step of a small llama and a teacher; torch counts attention whole, half of which is masked."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    linears = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_proj.weight"))
    outer = 512 * 64
    own = Body(linears + 2 * outer, linears + outer, 3, 64, 128, 64, 32, 512)
    tokens = torch.randint(0, 512, (1, 32))
    with FlopCounterMode(display=False) as counted:
        model(tokens).logits.sum().backward()
    attention = 3 * (2 * 3 * 64 * 32)  # the masked half, in three layers and three passes
    found = step_flops(own, None, 32)
    assert counted.get_total_flops() / 32 == found + attention
    assert step_flops(own, own, 32) == pytest.approx(4 / 3 * found)
    assert step_flops(own, None, 32, trainable=0.0) == pytest.approx(2 / 3 * found)
    assert step_flops(own, None, 32, again=True) == pytest.approx(4 / 3 * found)


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce GTX 1080", None),
        (None, None),
    ],
)
def test_a_gpu_is_known_by_the_longest_name_that_its_own_holds(gpu: str | None, name: str | None) -> None:
    assert peak_of(gpu) == (None if name is None else PEAKS[name])


# The guard


def seen(losses: list[float]) -> Guard:
    guard = Guard()
    assert [guard.problem(loss, 1.0) for loss in losses] == [None] * len(losses)
    return guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_or_gradient_that_is_no_number_is_a_problem_at_once(bad: float) -> None:
    assert Guard().problem(bad, 1.0) == f"the loss is {bad}"
    assert Guard().problem(1.0, bad) == f"the gradient's norm is {bad}"


def test_a_spike_is_three_times_the_median_and_half_a_nat_above() -> None:
    assert seen([2.0] * 8).problem(6.0, 1.0) is None
    assert seen([2.0] * 8).problem(6.01, 1.0) == "the loss is 6.01 where it was 2"
    assert seen([0.01] * 8).problem(0.5, 1.0) is None  # many times as much, and still little
    assert seen([0.01] * 8).problem(0.52, 1.0) is not None
    assert seen([0.0] * 8).problem(0.4, 1.0) is None
    assert seen([2.0] * 7).problem(100.0, 1.0) is None  # too few to tell


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=100))
def test_no_loss_within_half_a_nat_or_three_times_of_all_before_is_a_spike(changes: list[float]) -> None:
    guard, losses = Guard(), [1.0]
    for change in changes:
        least = min(losses[-32:])
        losses.append(min(change, max(3 * least, least + 0.5)))
    assert [guard.problem(loss, 1.0) for loss in losses] == [None] * len(losses)


def test_a_guard_takes_up_what_another_has_seen() -> None:
    first = seen([2.0] * 40)
    assert len(first.losses) == 32
    assert Guard(list(first.losses)).problem(50.0, 1.0) is not None


def test_a_spike_is_not_remembered() -> None:
    guard = seen([2.0] * 32)
    for _ in range(40):
        assert guard.problem(50.0, 1.0) is not None
