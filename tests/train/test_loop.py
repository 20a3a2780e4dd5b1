"""The training loop around a model of a few numbers: what a step does, what follows when it goes wrong, and a stop."""

import json
import math
import re
import resource
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example
from hypothesis import strategies as st
from torch import Tensor, nn
from tracker_here import Package

from compress.errors import NumericalError, OutputError, UserError
from compress.system.progress import Reporter
from compress.system.tracker import tracker_problem
from compress.train import sharded, state
from compress.train.log import Log
from compress.train.loop import Loop, Place, Settings
from compress.train.losses.inputs import Head
from compress.train.progress import Progress
from compress.train.schedule import rate
from compress.train.trainee import Inputs, Taught, inputs_of

CPU = torch.device("cpu")
NUMBERS = 6


@dataclass(frozen=True)
class Rows:
    """Two sequences at most of three tokens; all but the first are scored."""

    tokens: Tensor
    positions: Tensor
    scored: Tensor


class Numbers:
    """A text in which sequence n is n, n, n."""

    def __init__(self, batch: int = 2) -> None:
        self.batch = batch
        self.asked: list[int] = []

    def indices(self, step: int) -> list[Place]:
        self.asked.append(step)
        return [(0, (self.batch * step + n) % NUMBERS) for n in range(self.batch)]

    def read(self, places: Sequence[Place]) -> Rows:
        tokens = torch.tensor([[number] * 3 for _, number in places])
        scored = torch.tensor([[False, True, True]]).expand(len(places), -1)
        return Rows(tokens, torch.arange(3).expand_as(tokens), scored)


class Square(nn.Module):
    """One number for each token, whose loss is half the squared distance from what the token wants.

    Args:
        spoil: what is done with the loss of a step, by how many forward passes with a gradient there were.
    """

    def __init__(self, spoil: Any = None) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(NUMBERS))
        self.register_buffer("wanted", torch.arange(1.0, NUMBERS + 1))
        self.spoil, self.passes = spoil, 0

    def forward(self, inputs: Inputs, taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = 0.5 * (self.values - self.wanted)[inputs.targets].square().sum()
        if torch.is_grad_enabled():
            self.passes += 1
            if self.spoil is not None:
                loss = self.spoil(self.passes, loss)
        return loss, {"square": loss.detach()}


@dataclass
class Run:
    """A loop with its parts, in a folder."""

    folder: Path
    steps: int = 12
    every: int = 1
    state_every: int | None = None  # as `every`
    save_every: int | None = 2
    patience: int | None = None
    held_out: Sequence[Place] = ((0, 0), (0, 1), (0, 2))
    peak: float = 0.3
    spoil: Any = None
    after: Any = None
    micro: int = 2
    kept_in: dict[str, torch.dtype] = field(default_factory=dict)
    model: Square = field(init=False)
    loop: Loop = field(init=False)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.model = Square(self.spoil)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)

        def start_over() -> None:
            with torch.no_grad():
                self.model.values.zero_()
            optimizer.state.clear()

        settings = Settings(
            self.steps, self.micro, self.peak, 0.0, 10.0, self.held_out, self.every, self.state_every or self.every,
            self.patience, self.save_every,
        )  # fmt: skip
        self.reporter = Reporter(silent=True)
        self.loop = Loop(
            self.model, optimizer, Numbers(), lambda *_: None, settings, 6, self.folder, CPU, self.reporter,  # type: ignore[arg-type]
            Log(self.folder / "log.jsonl", None, self.folder, "test", {}, self.reporter), start_over,
            self.after or (lambda: None), self.kept_in, None,
        )  # fmt: skip

    def __call__(self) -> Progress:
        with sharded.mesh_of(CPU):
            return self.loop.run()

    @property
    def values(self) -> Tensor:
        return self.model.values.detach().clone()

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "log.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class Stop(Exception):
    """What stops a run in a test."""


def stop_after(steps: int) -> Any:
    left = steps

    def after() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise Stop

    return after


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A step


def test_the_teacher_is_asked_once_about_what_each_step_reads(tmp_path: Path) -> None:
    """Also behind the step before, and where training goes back; never beyond the last step."""
    run = Run(tmp_path / "run", steps=6, every=2, micro=1, held_out=(), spoil=nan_at(9))  # within step 4
    asked = []
    run.loop.teach = lambda places, _: asked.append(*places)  # type: ignore[assignment, func-returns-value]
    run()
    first, again = ([place for step in steps for place in run.loop.text.indices(step)] for steps in (range(5), (4, 5)))
    assert asked == [*first, run.loop.text.indices(5)[0], *again]  # step 5's before step 4 was known to have failed


def test_a_text_that_can_not_be_read_on_costs_no_step_that_is_done(tmp_path: Path) -> None:
    """The next step is read behind the one under way; what is wrong with it is said when it is due."""
    run = Run(tmp_path / "run", steps=6, save_every=1, held_out=())
    read = run.loop.text.read

    def torn(places: Sequence[Place]) -> Any:
        if places == run.loop.text.indices(2):
            raise OutputError("a shard is gone")
        return read(places)

    run.loop.text.read = torn  # type: ignore[method-assign]
    with pytest.raises(OutputError, match="a shard is gone"):
        run()
    assert run.loop.progress.step == 2 and state.newest(run.folder) == state.of_step(run.folder, 2)


def test_one_teaching_is_held_at_a_time(tmp_path: Path) -> None:
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    run, most = Run(tmp_path / "run", steps=3, micro=1, held_out=()), []

    def teach(*_: Any) -> Taught:
        alive.add(taught := Taught(head=Head(torch.zeros(1), None)))
        most.append(len(alive))
        return taught

    run.loop.teach = teach  # type: ignore[assignment]
    run()
    assert most == [1] * 6


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", steps=5)
    progress = run()
    values = torch.zeros(NUMBERS, requires_grad=True)
    optimizer = torch.optim.AdamW([values], lr=1.0, weight_decay=0.0)
    losses = []
    for step in range(5):
        wanted = [number % NUMBERS for number in (2 * step, 2 * step + 1)]
        loss = 0.5 * sum((values[n] - (n + 1)).square() for n in wanted) / 2  # type: ignore[misc]
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.3 * rate(step, 5, 0.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert torch.allclose(run.values, values.detach(), rtol=0, atol=1e-6)
    lines = [line for line in run.log if "loss" in line]
    assert [line["loss"] for line in lines] == pytest.approx(losses)
    assert [line["square"] for line in lines] == pytest.approx(losses)
    assert [line["scored"] for line in lines] == [4] * 5
    assert progress.scored == 20 and progress.ended and progress.stopped is None
    assert [step for step, _ in progress.losses] == [1, 2, 3, 4, 5]
    assert [loss for _, loss in progress.losses] == pytest.approx(losses)


def test_targets_lie_one_place_further_on_than_rows() -> None:
    tokens = torch.arange(12).view(2, 6)
    scored = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0]], dtype=torch.bool)
    found = inputs_of(Rows(tokens, tokens, scored), CPU)
    assert found.targets.tolist() == [1, 2, 5, 10]
    assert tokens.flatten()[found.rows].tolist() == [0, 1, 4, 9]


@example(max_examples=100, deadline=None)
@given(steps=st.integers(1, 400), warm_up=st.floats(0, 1))
def test_the_rate_rises_to_its_peak_and_falls_to_almost_nothing(steps: int, warm_up: float) -> None:
    rates = [rate(step, steps, warm_up) for step in range(steps)]
    rising = round(warm_up * steps)
    assert all(0 < each <= 1 for each in rates)
    assert all(a < b for a, b in zip(rates[:rising], rates[1:rising], strict=False))
    assert all(a > b for a, b in zip(rates[rising:], rates[rising + 1 :], strict=False))
    if rising < steps:
        assert rates[rising] == 1.0 and sum(rates[rising:]) == pytest.approx((steps - rising + 1) / 2)


# What is kept


def with_loss(run: Run, loss: float, measure: Any) -> Any:
    """Measure, with a loss that is made up."""
    forward = run.model.forward

    def made_up(inputs: Inputs, taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(loss * len(inputs.rows)), {}

    run.model.forward = made_up  # type: ignore[method-assign]
    try:
        return measure()
    finally:
        run.model.forward = forward  # type: ignore[method-assign]


def measured_as(run: Run, losses: Sequence[float]) -> Run:
    """The run, whose measurements find these losses, by step."""
    measure = run.loop._measure

    def made_up() -> Any:
        return with_loss(run, losses[run.loop.progress.step], measure)

    run.loop._measure = made_up  # type: ignore[method-assign]
    return run


def test_the_weights_of_the_best_measurement_are_kept_not_the_last_ones(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", steps=8, every=2, after=lambda: after.append(run.values))
    progress = measured_as(run, [9.0, 0.0, 5.0, 0.0, 3.0, 0.0, 4.0, 0.0, 6.0])()
    assert progress.best == (4, 3.0) and len(after) == 8
    assert torch.equal(run.values, after[3]) and not torch.equal(after[3], after[7])


def test_where_nothing_becomes_better_the_weights_of_the_start_are_kept(tmp_path: Path) -> None:
    run = measured_as(Run(tmp_path / "run", steps=3), [1.0, 2.0, 3.0, 4.0])
    assert run().best == (0, 1.0)
    assert not run.values.any()


def test_of_equal_measurements_the_later_is_kept(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = measured_as(Run(tmp_path / "run", steps=4, after=lambda: after.append(run.values)), [5.0, 2.0, 2.0, 3.0, 4.0])
    assert run().best == (2, 2.0) and torch.equal(run.values, after[1])


def test_patience_ends_training_and_the_best_is_kept(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", steps=12, patience=3, after=lambda: after.append(run.values))
    progress = measured_as(run, [9.0, 8.0, 5.0, 6.0, 5.5, 7.0, 1.0, *[0.0] * 6])()
    assert (progress.step, progress.best) == (5, (2, 5.0))
    assert progress.stopped == "no better for 3 measurements"
    assert torch.equal(run.values, after[1])
    again = measured_as(Run(tmp_path / "run", steps=12, patience=3), [0.0] * 13)
    assert again().step == 5 and torch.equal(again.values, after[1])  # ended is ended


def test_at_the_end_the_newest_state_and_the_best_weights_lie_on_disk(tmp_path: Path) -> None:
    run = measured_as(Run(tmp_path / "run", steps=7, save_every=3), [9.0, 8.0, 3.0, 4.0, 5.0, 2.0, 6.0, 7.0])
    run()
    assert {folder.name for folder in run.folder.iterdir()} == {"state-00000007", "best-00000005", "log.jsonl"}


def test_on_the_way_the_newest_state_of_a_measurement_is_kept_too(tmp_path: Path) -> None:
    kept: list[set[str]] = []
    run = Run(tmp_path / "run", steps=8, every=3, save_every=2, after=lambda: kept.append(names(tmp_path / "run")))
    measured_as(run, [9.0, 0.0, 0.0, 8.0, 0.0, 0.0, 8.5, 0.0, 7.0])()
    assert kept == [  # in front of each step's state
        set(), set(), {"state-2"}, {"state-3", "best-3"}, {"state-3", "state-4", "best-3"},
        {"state-3", "state-4", "best-3"}, {"state-6", "best-3"}, {"state-6", "best-3"},
    ]  # fmt: skip
    assert names(run.folder) == {"state-8"}


def names(folder: Path) -> set[str]:
    """Of states and weights, with short numbers."""
    return {each.name.replace("-0000000", "-") for each in folder.iterdir() if each.is_dir()}


def test_states_to_go_back_to_are_rarer_than_measurements_and_keep_their_best_weights(tmp_path: Path) -> None:
    """Step 8 goes wrong: back to step 4, whose best weights are those of step 3."""
    kept: list[set[str]] = []
    after: list[Tensor] = []

    def noted() -> None:
        kept.append(names(tmp_path / "run"))
        after.append(run.values)

    run = Run(tmp_path / "run", steps=8, state_every=4, save_every=100, spoil=nan_at(8), after=noted)
    losses = [9.0, 8.0, 7.0, 5.0, 6.0, 4.0, 3.0, 2.0, 8.0]
    measure = run.loop._measure

    def made_up() -> Any:
        step, lower = run.loop.progress.step, bool(run.loop.progress.rolled_back)
        return with_loss(run, 6.5 if lower else losses[step], measure)

    run.loop._measure = made_up  # type: ignore[method-assign]
    progress = run()
    assert kept[:7] == [  # in front of each step's measurement and state
        set(), {"best-1"}, {"best-2"}, {"best-3"}, {"state-4", "best-3"}, {"state-4", "best-3", "best-5"},
        {"state-4", "best-3", "best-6"},
    ]  # fmt: skip
    assert (progress.rolled_back, progress.best) == ([8], (3, 5.0))
    assert torch.equal(run.values, after[2]) and names(run.folder) == {"state-8", "best-3"}


def test_weights_alone_are_kept_as_a_checkpoint_would_have_them_and_go_on_whole(tmp_path: Path) -> None:
    kept_in = {"values": torch.bfloat16}
    whole = measured_as(Run(tmp_path / "whole", steps=4), [9.0, 8.0, 1.0, 5.0, 6.0])
    whole()
    run = measured_as(Run(tmp_path / "run", steps=4, kept_in=kept_in), [9.0, 8.0, 1.0, 5.0, 6.0])
    run()
    assert run.values.dtype == torch.float32 and not torch.equal(run.values, whole.values)
    assert torch.equal(run.values, whole.values.bfloat16().float())


def test_a_state_is_saved_at_measurements_and_by_the_clock_where_nobody_says_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = state._save

    def noted(folder: Path, *rest: Any) -> None:
        saved.append(int(folder.name.rpartition("-")[2]))
        save(folder, *rest)

    monkeypatch.setattr(state, "_save", noted)
    Run(tmp_path / "one", every=5, save_every=None, held_out=(), peak=1e-4)()
    assert saved == [5, 10, 12]
    monkeypatch.setattr("compress.train.loop._SAVE_SECONDS", 0.0)
    Run(tmp_path / "two", every=5, save_every=None, held_out=(), peak=1e-4)()
    assert saved[3:] == list(range(1, 13))


# What goes wrong


def nan_at(*passes: int) -> Any:
    return lambda number, loss: loss * float("nan") if number in passes else loss


def test_a_loss_that_is_no_number_goes_back_to_the_last_state_with_a_lower_rate(tmp_path: Path) -> None:
    rates: list[float] = []
    run = Run(
        tmp_path / "run", every=2, spoil=nan_at(6),
        after=lambda: rates.append(run.loop.optimizer.param_groups[0]["lr"]),
    )  # fmt: skip
    progress = run()
    assert (progress.step, progress.rolled_back, progress.slower, progress.stopped) == (12, [6], 0.3, None)
    full = [0.3 * rate(step, 12, 0.0) for step in range(12)]
    assert rates == pytest.approx([*full[:5], *[0.3 * each for each in full[4:]]])  # steps 5 and 6 come again
    assert [line["step"] for line in run.log if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in run.log if "held_out" in line] == list(range(0, 13, 2))
    (warning,) = run.reporter.warnings
    assert warning == "training: step 6: the loss is nan; back to step 4, with 0.3 of the learning rate"


def test_a_step_that_went_wrong_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    """As if the lower rate had been there from the state on."""
    run = Run(tmp_path / "run", steps=6, every=2, spoil=nan_at(6), held_out=())
    run()
    other = Run(tmp_path / "other", steps=6, every=2, held_out=(), after=lambda: slow(other))
    other()
    assert torch.equal(run.values, other.values)


def slow(run: Run) -> None:
    """From step 5 on."""
    run.loop.progress.slower = 0.3 if run.loop.progress.step >= 3 else 1.0


def test_the_second_time_training_ends_with_the_last_good_state(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", every=2, spoil=nan_at(6, 10), held_out=(), after=lambda: after.append(run.values))
    progress = run()
    # 5 steps, back to 4, again 5, 6, 7, and the next goes wrong: back to 6
    assert (progress.step, progress.rolled_back, progress.ended) == (6, [6, 8], True)
    assert progress.stopped == "the loss is nan at step 8, after a lower rate too"
    assert torch.equal(run.values, after[6])
    assert run.reporter.warnings[1].endswith("back to step 6, where it ends")
    again = Run(tmp_path / "run", every=2, held_out=())
    assert replace(again(), earlier=0.0) == replace(progress, earlier=0.0) and again.model.passes == 0
    assert torch.equal(again.values, after[6])  # ended is ended


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_held_out_loss_that_is_no_number_goes_back_as_a_step_does(loss: float, tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", steps=6, every=2, after=lambda: after.append(run.values))
    progress = measured_in_turn(run, [9.0, 8.0, loss, 7.0, 7.5])()
    assert progress.held_out == [(0, 9.0), (2, 8.0), (4, 7.0), (6, 7.5)]
    assert (progress.rolled_back, progress.slower, progress.best) == ([4], 0.3, (4, 7.0))
    assert len(after) == 8 and torch.equal(run.values, after[5])  # steps 3 and 4 come again
    assert run.reporter.warnings == [
        f"training: step 4: the held-out loss is {loss}; back to step 2, with 0.3 of the learning rate"
    ]
    assert [line["step"] for line in run.log if "held_out" in line] == [0, 2, 4, 6]


def test_the_second_held_out_loss_that_is_no_number_ends_training(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", steps=6, every=2, after=lambda: after.append(run.values))
    progress = measured_in_turn(run, [9.0, 8.0, math.nan, math.nan])()
    assert (progress.step, progress.best, progress.ended) == (2, (2, 8.0), True)
    assert progress.stopped == "the held-out loss is nan at step 4, after a lower rate too"
    assert torch.equal(run.values, after[1])


def test_a_held_out_loss_that_is_no_number_before_the_first_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="^training: the held-out loss is nan before the first step; look at"):
        measured_in_turn(Run(tmp_path / "run"), [math.nan])()


def measured_in_turn(run: Run, losses: Sequence[float]) -> Run:
    """The run, whose measurements find these losses, one after the other."""
    measure, left = run.loop._measure, iter(losses)

    def made_up() -> Any:
        return with_loss(run, next(left), measure)

    run.loop._measure = made_up  # type: ignore[method-assign]
    return run


@pytest.mark.parametrize("every", [None, 1, 2, 5])
def test_where_it_goes_back_to_does_not_hang_on_when_states_were_saved(
    every: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step's time is up, where the clock decides."""
    wanted = Run(tmp_path / "wanted", every=4, save_every=100, peak=1e-4, spoil=nan_at(8, 15))
    progress = wanted()
    monkeypatch.setattr("compress.train.loop._SAVE_SECONDS", 0.0)
    run = Run(tmp_path / "run", every=4, save_every=every, peak=1e-4, spoil=nan_at(8, 15))
    assert replace(run(), seconds=0.0) == replace(progress, seconds=0.0)
    assert (progress.step, progress.rolled_back) == (8, [8, 11])  # back to steps 4 and 8
    assert torch.equal(run.values, wanted.values) and run.log == wanted.log


def test_before_any_state_training_starts_over_once_and_then_fails(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", spoil=nan_at(2), every=6, save_every=1)
    progress = run()
    assert (progress.rolled_back, progress.slower, progress.step) == ([2], 0.3, 12)
    assert [step for step, _ in progress.held_out] == [0, 6, 12]
    assert [line["step"] for line in run.log if "held_out" in line] == [0, 6, 12]
    with pytest.raises(NumericalError) as caught:
        Run(tmp_path / "two", spoil=nan_at(2, 4), every=6, save_every=1)()
    assert str(caught.value) == (
        "training: the loss is nan at step 2, with 0.3 of the learning rate too; use a lower one, and look at the text"
    )


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    """The loss is a number, and its gradient is not."""

    def spoil(number: int, loss: Tensor) -> Tensor:
        return loss + (0 * loss).sqrt() if number == 4 else loss

    run = Run(tmp_path / "run", every=2, spoil=spoil, held_out=())
    assert run().rolled_back == [4]
    assert run.reporter.warnings[0].startswith("training: step 4: the gradient's norm is nan; back to step 2")
    assert torch.isfinite(run.values).all()


def test_a_loss_that_jumps_goes_back(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", peak=1e-4, spoil=lambda number, loss: 40 * loss if number == 11 else loss)
    assert run().rolled_back == [11]
    assert "the loss is" in run.reporter.warnings[0] and "where it was" in run.reporter.warnings[0]


# After a stop


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9, 12])
def test_stopped_and_continued_is_as_never_stopped(steps: int, tmp_path: Path) -> None:
    """The log too; measurements climb from step 7 on, so that earlier weights are kept."""
    losses = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, *[10.0] * 6]
    whole = measured_as(Run(tmp_path / "whole", every=4), losses)
    progress = whole()
    stopped = measured_as(Run(tmp_path / "stopped", every=4, after=stop_after(steps)), losses)
    with pytest.raises(Stop):
        stopped()
    again = measured_as(Run(tmp_path / "stopped", every=4), losses)
    found = again()
    assert again.loop.text.asked[0] == (steps - 1) // 2 * 2  # type: ignore[attr-defined]
    assert torch.equal(again.values, whole.values)
    assert again.log == whole.log
    assert replace(found, seconds=0.0, earlier=0.0) == replace(progress, seconds=0.0)


def test_stopped_behind_a_step_that_went_wrong_and_continued(tmp_path: Path) -> None:
    """What went wrong is known from the state on, so that another time is the second."""
    after: list[Tensor] = []
    whole = Run(tmp_path / "run", spoil=nan_at(6), after=lambda: after.append(whole.values), held_out=())
    whole()
    stopped = Run(tmp_path / "stopped", spoil=nan_at(6), after=stop_after(9), held_out=())
    with pytest.raises(Stop):
        stopped()
    again = Run(tmp_path / "stopped", held_out=())
    assert again().rolled_back == [6] and torch.equal(again.values, whole.values)
    broken = Run(tmp_path / "stopped", held_out=())
    assert broken().ended


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", steps=4)
    first = run()
    again = Run(tmp_path / "run", steps=4)
    assert replace(again(), earlier=0.0) == first and again.model.passes == 0
    assert torch.equal(again.values, run.values) and again.log == run.log


def test_the_guard_knows_the_losses_in_front_of_a_stop(tmp_path: Path) -> None:
    """A jump is one, whether or not training was stopped a moment before."""

    def jump(at: int) -> Any:
        return lambda number, loss: 40 * loss if number == at else loss

    whole = Run(tmp_path / "whole", peak=1e-4, spoil=jump(11), held_out=())
    assert whole().rolled_back == [11]
    stopped = Run(tmp_path / "run", peak=1e-4, after=stop_after(10), every=9, save_every=9, held_out=())
    with pytest.raises(Stop):
        stopped()
    again = Run(tmp_path / "run", peak=1e-4, spoil=jump(2), every=9, save_every=9, held_out=())
    assert again().rolled_back == [11]


def test_half_a_state_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was being written, and a line of the log that was cut off."""
    stopped = Run(tmp_path / "run", every=4, save_every=None, after=stop_after(6))
    with pytest.raises(Stop):
        stopped()
    (tmp_path / "run" / "state-00000004").rename(tmp_path / "run" / "state-00000004.part")
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = Run(tmp_path / "run")
    run()
    assert run.loop.text.asked[0] == 0  # type: ignore[attr-defined]
    assert [line["step"] for line in run.log if "loss" in line] == list(range(1, 13))


class Killed(BaseException):
    """What a kill looks like from inside: nothing is done behind it, on the way out neither."""


_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
_INSIDE = re.compile(r"\.part/|^__0_0\.distcp$|^\.metadata$")  # of what has no name yet, or none any more: all the same
_before: Callable[[str], None] | None = None  # called in front of each; audit hooks are there to the end of a process


def _hook(event: str, values: tuple[Any, ...]) -> None:
    if _before is not None and event in _OPERATIONS and (event != "open" or int(values[2]) & 3):
        _before(str(values[0]))


@contextmanager
def operations(kill_at: int | None = None) -> Iterator[list[None]]:
    """Inside, what changes files is counted, and nothing more is done behind so many."""
    global _before
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked.append(True)
    done: list[None] = []

    def before(path: str) -> None:
        if len(done) == kill_at:
            raise Killed
        if not _INSIDE.search(path):
            done.append(None)

    _before = before
    try:
        yield done
    finally:
        _before = None


_hooked: list[bool] = []
_PARTS = 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("part", range(_PARTS))
def test_killed_between_any_two_operations_on_files(part: int, again: bool, tmp_path: Path) -> None:
    """States at steps 2 and 3; step 4 goes wrong, at the lower rate too or not; the weights of step 2 stay the best."""

    def new(folder: str) -> Run:
        run = Run(tmp_path / folder, steps=4, every=2, save_every=3)
        run.model.spoil = lambda _, loss: loss * math.nan if goes_wrong(run.loop.progress) else loss
        return measured_as(run, [9.0, 8.0, 0.0, 0.0, 8.5] if not again else [7.0, 8.0, 0.0, 0.0, 0.0])

    def goes_wrong(progress: Progress) -> bool:
        return progress.step == 3 and (again or progress.slower == 1.0)

    whole = new("whole")
    with operations() as done:
        progress = whole()
    assert (progress.step, progress.rolled_back) == ((2, [4, 4]) if again else (4, [4]))
    for number in range(part, len(done), _PARTS):
        killed, folder = new(f"{number}"), tmp_path / f"{number}"
        with operations(number), pytest.raises(Killed):
            killed()
        continued = new(folder.name)
        found = continued()
        assert replace(found, seconds=0.0, earlier=0.0) == replace(progress, seconds=0.0), number
        assert torch.equal(continued.values, whole.values) and continued.log == whole.log, number
        shutil.rmtree(folder)


def test_seconds_of_earlier_processes_are_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only the model moves: a second for each forward pass."""
    now = 0.0

    def second(*_: Any) -> None:
        nonlocal now
        now += 1.0

    monkeypatch.setattr("compress.train.loop.time.monotonic", lambda: now)

    def new(folder: str, **settings: Any) -> Run:
        run = Run(tmp_path / folder, steps=6, every=2, held_out=((0, 0),), **settings)
        run.model.register_forward_pre_hook(second)
        return run

    whole = new("whole")()
    assert (whole.seconds, whole.earlier) == (6.0, 0.0)
    with pytest.raises(Stop):
        new("run", after=stop_after(5))()
    found = new("run", spoil=nan_at(2))()  # goes back to step 4
    assert (found.seconds, found.earlier) == (6.0, 7.0)  # of 4 steps and 3 measurements
    assert new("run")().earlier == 7.0 + 5.0  # steps 5 and 6, which goes wrong, both again, and a measurement


# Disks


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Inside, no file may be larger, as with a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1000])
def test_a_state_that_does_not_fit_the_disk_is_told_of_in_one_line(size: int, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", steps=2)
    run()
    folder = tmp_path / "run" / "state-00000003"
    with sharded.mesh_of(CPU), files_up_to(size), pytest.raises(OutputError) as caught:
        state.save(folder, run.model, run.loop.optimizer, {})
    assert str(caught.value).startswith(f"{folder}: cannot be written (") and "\n" not in str(caught.value)
    assert not folder.exists()


def test_a_full_disk_is_told_of_and_what_is_there_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    run = Run(tmp_path / "run", after=lambda: run.loop.progress.step == 4 and monkeypatch.setattr("os.fsync", full))
    with pytest.raises(OutputError, match="state-00000005: no space left on the disk; free some and run the same"):
        replace_held_out(run)()
    monkeypatch.undo()
    again = replace_held_out(Run(tmp_path / "run"))
    again()
    assert again.loop.text.asked[0] == 4  # type: ignore[attr-defined]


def replace_held_out(run: Run) -> Run:
    """The run without measurements."""
    run.loop.settings = replace(run.loop.settings, held_out=())
    return run


def test_an_interrupt_while_a_state_is_written_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path / "run", held_out=())()


@pytest.mark.parametrize("kind", ["state", "best"])
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp", "notes.json"])
@pytest.mark.parametrize("left", [None, 0, 10])
def test_a_damaged_state_is_named_and_the_remedy_helps(kind: str, file: str, left: int | None, tmp_path: Path) -> None:
    """A file is gone, or cut off."""

    def new() -> Run:
        return measured_as(Run(tmp_path / "run", steps=3, every=2), [9.0, 0.0, 3.0, 4.0])

    whole = new()
    whole()
    folder = tmp_path / "run" / ("state-00000003" if kind == "state" else "best-00000002")
    damaged = folder / file
    if left is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:left])
    remove = tmp_path / "run" if kind == "best" else "it"
    with pytest.raises(UserError) as caught:
        new()()
    said = str(caught.value)
    assert said.startswith(f"{folder}: this state of training is damaged (") and "\n" not in said
    assert f"; remove {remove} and run the same command again to " in said
    shutil.rmtree(folder if kind == "state" else tmp_path / "run")
    again = new()
    again()
    assert torch.equal(again.values, whole.values) and again.log == whole.log


# Parameters without gradients


class Late(Square):
    """Beside the numbers one that gets a gradient from some pass on, and one that never gets any."""

    def __init__(self, size: int, late: int) -> None:
        super().__init__()
        self.late, self.never = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))
        self.from_ = late

    def forward(self, inputs: Inputs, taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, parts = super().forward(inputs, taught)
        if self.passes >= self.from_:
            loss = loss + self.late.square().sum()
        return loss, parts


def late(folder: Path, make: Any, stop: int | None = None, late_from: int = 4, size: int = 8) -> Run:
    """A run of such a model, stopped behind so many steps."""
    run = Run(folder, steps=6, every=2, held_out=())
    run.model = Late(size, late_from)
    run.loop.trainee = run.model  # type: ignore[assignment]
    run.loop.optimizer = make(run.model.parameters())
    run.loop.after_step = stop_after(stop) if stop else lambda: None
    return run


def plain(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.1)


def eight_bit(parameters: Any) -> torch.optim.Optimizer:
    module = pytest.importorskip("compress.train.adamw8bit")
    made: torch.optim.Optimizer = module.BoundedAdamW8bit(parameters, lr=0.0, weight_decay=0.1)
    return made


def test_a_parameter_that_gets_its_first_gradient_late_is_stepped_as_by_the_optimizer_alone(tmp_path: Path) -> None:
    run = late(tmp_path / "run", plain)
    run()
    model = Late(8, 4)
    optimizer, text = plain(model.parameters()), Numbers()
    for step in range(6):
        loss, _ = model(inputs_of(text.read(text.indices(step)), CPU), None)
        (loss / 4).backward()
        torch.nn.utils.clip_grad_norm_(list(model.parameters()), 10.0)
        optimizer.param_groups[0]["lr"] = 0.3 * rate(step, 6, 0.0)
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    assert (run.model.get_parameter("never") == 1).all() and (run.model.get_parameter("late") < 1).all()


@pytest.mark.parametrize(("make", "size"), [(plain, 8), (eight_bit, 4096)], ids=["adamw", "adamw8bit"])
def test_training_of_parameters_without_gradients_is_continued(make: Any, size: int, tmp_path: Path) -> None:
    whole = late(tmp_path / "whole", make, late_from=100, size=size)
    again = late(tmp_path / "run", make, late_from=100, size=size)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all else here
        whole()
        with pytest.raises(Stop):
            late(tmp_path / "run", make, 3, late_from=100, size=size)()
        again()
    assert again.loop.text.asked[0] == 2  # type: ignore[attr-defined]
    for name, parameter in again.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name
    assert (again.model.get_parameter("never") == 1).all() and again.log == whole.log


# The log


def test_a_tracker_that_is_not_installed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracker_problem("wandb") == "wandb is not installed; pip install wandb, or remove tracker"
    assert tracker_problem(None) is None


@pytest.fixture
def package(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Package:
    made = Package(request.param)
    monkeypatch.setitem(sys.modules, request.param, made)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "here")
    return made


def goes_back(log: Log) -> None:
    log.rewind(-1)
    for step in (1, 2):
        log.write(step, loss=2.5 * step, note="words")
    log.rewind(1)
    log.write(2, loss=4.0)
    log.close()


@pytest.mark.parametrize("package", ["trackio"], indirect=True)
def test_trackio_gets_the_numbers_of_each_line_at_their_steps(tmp_path: Path, package: Package) -> None:
    goes_back(Log(tmp_path / "log.jsonl", "trackio", tmp_path, "recipe", {"seed": 3}, Reporter(quiet=True)))
    assert package.asked == [
        ("init", {"project": "dscompress", "name": "recipe", "config": {"seed": 3}}),
        ("log", {"loss": 2.5}, {"step": 1}), ("log", {"loss": 5.0}, {"step": 2}), ("log", {"loss": 4.0}, {"step": 2}),
        ("finish", {}),
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
def test_wandb_never_sees_its_own_steps_go_backwards(tmp_path: Path, package: Package) -> None:
    """It drops what comes at a step before the last one; ours is a number that the others are drawn over."""
    goes_back(Log(tmp_path / "log.jsonl", "wandb", tmp_path, "recipe", {"seed": 3}, Reporter(quiet=True)))
    assert package.asked[1:] == [
        ("define_metric", "*", {"step_metric": "step"}),
        ("log", {"step": 1, "loss": 2.5}, {}), ("log", {"step": 2, "loss": 5.0}, {}),
        ("log", {"step": 2, "loss": 4.0}, {}), ("finish", {}),
    ]  # fmt: skip


def test_tensorboard_hides_the_points_that_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, **settings: int) -> None:
            asked.append(("open", folder, settings))

        def add_scalar(self, key: str, value: float, step: int) -> None:
            asked.append((key, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            asked.append(("close",))

    package = ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: "here")
    goes_back(Log(tmp_path / "log.jsonl", "tensorboard", tmp_path / "events", "recipe", {}, Reporter(quiet=True)))
    folder = str(tmp_path / "events" / "recipe")
    assert asked == [
        ("open", folder, {"purge_step": 0}), ("loss", 2.5, 1), ("loss", 5.0, 2), ("close",),
        ("open", folder, {"purge_step": 2}), ("loss", 4.0, 2), ("close",),
    ]  # fmt: skip


@pytest.mark.parametrize("package", ["wandb"], indirect=True)
@pytest.mark.parametrize("name", ["init", "define_metric", "log", "finish"])
def test_a_tracker_that_fails_is_warned_of_once_and_the_file_goes_on(
    name: str, tmp_path: Path, package: Package, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []

    def fails(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise ConnectionError(f"no route {len(tried)}\nmore of it")

    setattr(package, name, fails)
    goes_back(Log(tmp_path / "log.jsonl", "wandb", tmp_path, "recipe", {}, Reporter(quiet=True)))
    why = "ConnectionError: no route 1 more of it"
    said = f"wandb failed ({why}) and gets no more of this training; all its steps are in log.jsonl"
    assert capsys.readouterr().err == f"warning: tracker: {said}\n"
    assert sum(each[0] == "log" for each in package.asked) == (3 if name == "finish" else 0)
    assert ("finish", {}) in package.asked or name != "log"  # what follows is not logged into the same run
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 2.5, "note": "words"}, {"step": 2, "loss": 4.0}]


def test_a_tracker_that_is_gone_since_the_recipe_was_checked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        Log(tmp_path / "log.jsonl", "wandb", tmp_path, "recipe", {}, Reporter(quiet=True))


@pytest.mark.parametrize("stop", [None, 2])
def test_the_log_is_closed_however_training_ends(stop: int | None, tmp_path: Path) -> None:
    closed: list[int] = []
    run = Run(tmp_path / "run", steps=3, after=stop_after(stop) if stop else None)
    assert run.loop.log is not None
    run.loop.log.close = lambda: closed.append(run.loop.progress.step)  # type: ignore[method-assign]
    if stop:
        with pytest.raises(Stop):
            run()
    else:
        run()
    assert closed == [1 if stop else 3]
