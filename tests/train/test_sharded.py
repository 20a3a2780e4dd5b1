"""Training in several processes, on CPUs with gloo: what each holds, and that all together do what one does."""

import os
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import killable
import numpy as np
import pytest
import torch
from random_models import make_model
from torch import Tensor, nn
from trained import StopsTraining, Tensors, apart, context, log_of, spec, train, trained, weights, write_text

from compress.errors import OutputError
from compress.model.checkpoint import Checkpoint
from compress.recipe.train import TrainStage
from compress.system import distributed
from compress.train import sharded, state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models as small as these only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_ranks(work: Callable[[], Any], world: int) -> list[Any]:
    """What a function answers in each of several processes that have joined; what it raises, as text."""
    with socket.socket() as tried:
        tried.bind(("localhost", 0))
        port = tried.getsockname()[1]
    here: list[Connection] = []
    processes: list[Any] = []
    for rank in range(world):
        mine, theirs = killable.CONTEXT.Pipe()
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place = {name: str(n) for name, n in numbers.items()} | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes.append(killable.CONTEXT.Process(target=_answer, args=(work, place, theirs), daemon=True))
        processes[-1].start()
        here.append(mine)
    answers: dict[Connection, Any] = {}
    while len(answers) < world:
        for pipe in wait([each for each in here if each not in answers]):
            answers[pipe] = pipe.recv()  # type: ignore[index, union-attr]
            failed = [answer for answer in answers.values() if isinstance(answer, str)]
            if failed:
                for process in processes:
                    process.kill()
            assert not failed, failed
    return [answers[pipe] for pipe in here]


def _answer(work: Callable[[], Any], environment: dict[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        assert distributed.join("cpu") == "cpu"
        answer = plain(work())
        distributed.leave()
    except Exception as error:  # said in the process that tests
        answer = f"{type(error).__name__}: {error}"
    pipe.send(answer)


def plain(value: Any) -> Any:
    """Tensors as arrays, which go through a pipe whole."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value.numpy() if isinstance(value, Tensor) else value


# What each process holds


class Odd(nn.Module):
    """Rows that no two or three processes share evenly; the last linear is tied to the first, and one is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7, bias=False)
        self.layers = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])
        self.last = nn.Linear(5, 7, bias=False)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden: Tensor = self.first(inputs)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return hidden @ self.last.weight


def values() -> Tensors:
    torch.manual_seed(0)
    return {name: torch.randn(parameter.shape) for name, parameter in Odd().named_parameters()}


def inputs() -> Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


def hold() -> dict[str, Any]:
    """What a process has of the module, and what its gradient is where each process takes its part of the inputs."""
    stored, read = values(), []
    with sharded.mesh_of(CPU) as mesh, torch.device("meta"):
        module = Odd()
    with sharded.mesh_of(CPU) as mesh:
        count = sharded.set_trained(module, lambda name: not name.startswith("layers.0"), torch.float32)

        def load(names: Sequence[str]) -> Tensors:
            read.append(list(names))
            return {name: stored[name] for name in names}

        sharded.shard(module, module.layers, mesh, torch.float32, load, CPU, again=distributed.world() == 2)
        own = dict(module.named_parameters())
        parts = {name: sharded.own_part(parameter).numel() for name, parameter in own.items()}
        whole = {name: sharded.whole(parameter).clone() for name, parameter in own.items()}
        share = len(inputs()) // distributed.world()
        mine = inputs()[distributed.rank() * share : (distributed.rank() + 1) * share]
        (module(mine).square().sum() * distributed.world()).backward()
        gradients = {name: sharded.whole(p.grad) for name, p in own.items() if p.grad is not None}
        zeros = sharded.mean_over_processes(sharded.own_part(own["first.weight"]) > 0, own["first.weight"].numel())
        sharded.set_whole(own["first.weight"], 2 * stored["first.weight"])
        again = sharded.whole(own["first.weight"]).clone()
    return {
        "count": count, "read": read, "parts": parts, "whole": whole, "gradients": gradients, "again": again,
        "positive": zeros,
    }  # fmt: skip


@pytest.mark.parametrize("again", [False, True], ids=["small", "layers computed again"])
def test_one_process_computes_in_16_bits_and_sums_gradients_in_32(again: bool) -> None:
    stored, low = values(), torch.bfloat16
    with torch.device("meta"):
        module = Odd()
    plain_one = Odd().to(low)
    plain_one.load_state_dict(stored, strict=False)
    plain_one.layers[0].requires_grad_(False)
    with sharded.mesh_of(CPU) as mesh:
        sharded.set_trained(module, lambda name: not name.startswith("layers.0"), low)
        sharded.shard(module, module.layers, mesh, low, lambda names: {n: stored[n] for n in names}, CPU, again=again)
        own = dict(module.named_parameters())
        for batch in (inputs().to(low), inputs().flip(0).to(low)):
            out, wanted = module(batch), plain_one(batch)
            assert out.dtype == low and torch.equal(out, wanted)
            out.square().sum().backward()
            wanted.square().sum().backward()
            assert dict(module.named_parameters()).keys() == own.keys()
            assert all(each is own[name] for name, each in module.named_parameters())
            gradients = {name: p.grad for name, p in plain_one.named_parameters() if p.grad is not None}
            for name, parameter in own.items():
                if name not in gradients:
                    assert name.startswith("layers.0") and parameter.dtype == low and parameter.grad is None
                    continue
                assert parameter.dtype == parameter.grad.dtype == torch.float32  # type: ignore[union-attr]
                assert torch.equal(sharded.whole(parameter.grad), gradients[name].float())  # type: ignore[arg-type]
                assert torch.equal(sharded.whole(parameter), stored[name])
            module.zero_grad()
            plain_one.zero_grad()
        if not again:  # the other way is FSDP's
            with pytest.raises(RuntimeError):
                module(torch.zeros(2, 3, dtype=low))
            assert module.first.weight is module.last.weight is own["first.weight"]
        for _ in range(2):
            module(inputs().to(low)).square().sum().backward()
        plain_one(inputs().to(low)).square().sum().backward()
        assert torch.equal(sharded.whole(own["first.weight"].grad), 2 * plain_one.first.weight.grad.float())  # type: ignore[arg-type, union-attr]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_parts_gradients_and_tied_weights_are_those_of_the_whole_module(world: int) -> None:
    answers = [plain(hold())] if world == 1 else on_ranks(hold, world)
    stored, module = values(), Odd()
    module.load_state_dict(stored, strict=False)
    module(inputs()).square().sum().backward()
    names = [name for name in stored if not name.startswith("layers.0")]
    for found in answers:
        assert found["count"] == sum(stored[name].numel() for name in names)
        assert found["read"] == [  # a layer at a time, and the tied one once
            ["layers.0.weight", "layers.0.bias"], ["layers.1.weight", "layers.1.bias"], ["first.weight"],
        ]  # fmt: skip
        assert found["whole"].keys() == stored.keys()
        assert all(np.array_equal(found["whole"][name], stored[name]) for name in stored)
        assert found["gradients"].keys() == set(names)
        for name in names:
            wanted = module.get_parameter(name).grad
            assert wanted is not None and np.allclose(found["gradients"][name], wanted, rtol=1e-5, atol=1e-5)
        assert np.array_equal(found["again"], 2 * stored["first.weight"])
        assert found["positive"] == pytest.approx(float((stored["first.weight"] > 0).float().mean()))
    for name, tensor in stored.items():
        assert sum(found["parts"][name] for found in answers) == tensor.numel()
        if world == 2:
            assert max(found["parts"][name] for found in answers) < tensor.numel()


def test_alone_a_group_of_one_is_there_inside_and_gone_behind() -> None:
    assert not torch.distributed.is_initialized()
    with sharded.mesh_of(CPU) as mesh:
        assert mesh.size() == 1 and torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()


def test_what_is_frozen_is_held_in_the_precision_of_the_passes_and_what_is_trained_in_float32() -> None:
    with torch.device("meta"):
        module = Odd()
    sharded.set_trained(module, lambda name: name == "layers.1.weight", torch.bfloat16)
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name == "layers.1.weight")
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16)
    assert module.last.weight is module.first.weight


# A stage

CASES: dict[str, dict[str, Any]] = {
    "ce": {},
    "kl": {"loss": "kl", "micro_batch": 1},
    "cached": {"loss": "kl", "targets": "cached", "draws": 50},
    "hidden": {
        "kind": "distill", "losses": {"kl": 1, "hidden": 1}, "hidden_layers": {0: 1}, "micro_batch": 1,
        "checkpoint_activations": True,
    },
    "first layer": {  # the others and the head get no gradients
        "kind": "distill", "losses": {"hidden": 1}, "hidden_layers": {0: 0}, "micro_batch": 1, "weight_decay": 0.1,
    },
    "lora": {"lora": {"rank": 2}, "learning_rate": 1e-2},
}  # fmt: skip


class Models:
    """A teacher, a narrower student with a tied head, and a text, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, folder / "text.jsonl"

    @property
    def base(self) -> Checkpoint:
        return Checkpoint(self.folder / "base")

    @property
    def small(self) -> Checkpoint:
        return Checkpoint(self.folder / "small")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    make_model(folder / "base", dtype=torch.float32)
    make_model(
        folder / "small", dtype=torch.float32, hidden_size=48, num_attention_heads=3, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    write_text(folder / "text.jsonl")
    return Models(folder)


def stage(models: Models, case: str) -> TrainStage:
    return (
        spec(models.text, steps=8, save_every=2, learning_rate=1e-3, **CASES[case])
        if case != "lora"
        else spec(models.text, steps=8, save_every=2, **CASES[case])
    )


def run_stage(models: Models, case: str, output: Path, stop: int | None = None) -> Any:
    """The figures of a run; nothing where it was stopped behind so many steps."""
    there = context(output.parent / "work", models.base)
    if stop is not None:
        there = replace(there, reporter=StopsTraining(stop))
        try:
            train(models.small, output, stage(models, case), there)
        except KeyboardInterrupt:
            return None
        raise AssertionError("it was not stopped")
    record = train(models.small, output, stage(models, case), there)
    return trained(record).held_out, record.device, there.reporter.warnings


@pytest.mark.parametrize("case", [case for case in CASES if case != "first layer"])
def test_two_processes_do_what_one_does(case: str, models: Models, tmp_path: Path) -> None:
    """Three sequences are held out, so that one of the two has fewer of them than the other."""
    output = tmp_path / "two" / "out"
    found = on_ranks(partial(run_stage, models, case, output), 2)
    assert found[0] == found[1] and found[0][1] == "2 x cpu"
    alone = run_stage(models, case, tmp_path / "one" / "out")
    assert [step for step, _ in found[0][0]] == [step for step, _ in alone[0]]
    one, two = log_of(tmp_path / "one" / "out"), log_of(output)
    for before, after in zip(one, two, strict=True):
        assert before.keys() == after.keys()
        assert [after[key] for key in after] == pytest.approx([before[key] for key in before], rel=1e-5)
    written = weights(output / "checkpoint")
    assert apart(written, weights(tmp_path / "one" / "out" / "checkpoint")) < 1e-4


@pytest.mark.parametrize(("case", "first", "second"), [("ce", 2, 1), ("ce", 1, 2), ("first layer", 2, 1)])
def test_a_state_is_taken_up_by_another_number_of_processes(
    case: str, first: int, second: int, models: Models, tmp_path: Path
) -> None:
    def work(world: int, output: Path, stop: int | None = None) -> Any:
        call = partial(run_stage, models, case, output, stop)
        return [call()] if world == 1 else on_ranks(call, world)

    assert work(first, tmp_path / "mixed" / "out", 5) == [None] * first
    assert (tmp_path / "mixed" / "out" / "state-00000004").is_dir()
    before = log_of(tmp_path / "mixed" / "out")
    work(second, tmp_path / "mixed" / "out")
    work(1, tmp_path / "whole" / "out")
    found, wanted = log_of(tmp_path / "mixed" / "out"), log_of(tmp_path / "whole" / "out")
    assert found[:5] == before[:5]  # what was written before is still there
    assert [line.keys() for line in found] == [line.keys() for line in wanted]
    for before_, after in zip(wanted, found, strict=True):
        assert list(after.values()) == pytest.approx(list(before_.values()), rel=1e-5)
    written = [weights(tmp_path / name / "out" / "checkpoint") for name in ("mixed", "whole")]
    assert apart(*written) < 1e-4


def save_where_one_has_no_room(folder: Path) -> dict[str, str]:
    """What a process is told; in the second no file may be longer than a few bytes."""
    stored = values()
    with sharded.mesh_of(CPU) as mesh, torch.device("meta"):
        module = Odd()
    with sharded.mesh_of(CPU) as mesh:
        sharded.shard(module, module.layers, mesh, torch.float32, lambda names: {n: stored[n] for n in names}, CPU)
        if distributed.rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        with pytest.raises(OutputError) as caught:
            state.save(folder / "state-00000001", module, None, {})
    return {"said": str(caught.value)}


def test_a_disk_without_room_in_one_process_is_told_of_in_all(tmp_path: Path) -> None:
    told = on_ranks(partial(save_where_one_has_no_room, tmp_path), 2)
    assert told[0] == told[1]
    assert told[0]["said"].startswith(f"{tmp_path / 'state-00000001'}: cannot be written (")
    assert not (tmp_path / "state-00000001").exists()
