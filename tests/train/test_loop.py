"""The training loop around a model of a few numbers: what a step does, what follows when it goes wrong, and a stop."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as example
from hypothesis import strategies as st
from torch import Tensor, nn

from compress.errors import NumericalError
from compress.system.progress import Reporter
from compress.train import sharded, state
from compress.train.log import Log, tracker_problem
from compress.train.loop import Loop, Place, Progress, Settings, inputs_of
from compress.train.schedule import rate
from compress.train.trainee import Inputs

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
    save_every: int | None = 2
    patience: int | None = None
    held_out: Sequence[Place] = ((0, 0), (0, 1), (0, 2))
    peak: float = 0.3
    spoil: Any = None
    measured: Any = None  # instead of the held-out loss, by how many measurements there were
    after: Any = None
    micro: int = 2
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
            self.steps, self.micro, self.peak, 0.0, 10.0, self.held_out, self.every, self.patience, self.save_every
        )
        self.reporter = Reporter(silent=True)
        self.loop = Loop(
            self.model, optimizer, Numbers(), lambda *_: None, settings, 6, self.folder, CPU, self.reporter,  # type: ignore[arg-type]
            Log(self.folder / "log.jsonl", None, self.folder, "test", {}), start_over, self.after or (lambda: None), None,
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


def with_loss(run: Run, loss: float, measure: Any) -> None:
    """Measure, with a loss that is made up."""
    forward = run.model.forward

    def made_up(inputs: Inputs, taught: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.tensor(loss * len(inputs.rows)), {}

    run.model.forward = made_up  # type: ignore[method-assign]
    try:
        measure()
    finally:
        run.model.forward = forward  # type: ignore[method-assign]


def measured_as(run: Run, losses: Sequence[float]) -> Run:
    """The run, whose measurements find these losses, by step."""
    measure = run.loop._measure

    def made_up() -> None:
        with_loss(run, losses[run.loop.progress.step], measure)

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


def test_only_the_newest_state_and_the_best_weights_lie_on_disk(tmp_path: Path) -> None:
    run = measured_as(Run(tmp_path / "run", steps=7, save_every=3), [9.0, 8.0, 3.0, 4.0, 5.0, 2.0, 6.0, 7.0])
    run()
    assert {folder.name for folder in run.folder.iterdir()} == {"state-00000007", "best-00000005", "log.jsonl"}


def test_a_state_is_saved_by_the_clock_where_nobody_says_how_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = state.save

    def noted(folder: Path, *rest: Any) -> None:
        saved.append(int(folder.name.rpartition("-")[2]))
        save(folder, *rest)

    monkeypatch.setattr(state, "save", noted)
    Run(tmp_path / "one", save_every=None, held_out=())()
    assert saved == [12]
    monkeypatch.setattr("compress.train.loop._SAVE_SECONDS", 0.0)
    Run(tmp_path / "two", save_every=None, held_out=())()
    assert saved[1:] == list(range(1, 13))


# What goes wrong


def nan_at(*passes: int) -> Any:
    return lambda number, loss: loss * float("nan") if number in passes else loss


def test_a_loss_that_is_no_number_goes_back_to_the_last_state_with_a_lower_rate(tmp_path: Path) -> None:
    rates: list[float] = []
    run = Run(tmp_path / "run", spoil=nan_at(6), after=lambda: rates.append(run.loop.optimizer.param_groups[0]["lr"]))
    progress = run()
    assert (progress.step, progress.rolled_back, progress.slower, progress.stopped) == (12, [6], 0.3, None)
    full = [0.3 * rate(step, 12, 0.0) for step in range(12)]
    assert rates == pytest.approx([*full[:5], *[0.3 * each for each in full[4:]]])  # steps 5 and 6 come again
    assert [line["step"] for line in run.log if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in run.log if "held_out" in line] == list(range(13))
    (warning,) = run.reporter.warnings
    assert warning == "training: step 6: the loss is nan; back to step 4, with 0.3 of the learning rate"


def test_a_step_that_went_wrong_leaves_no_trace_in_the_weights(tmp_path: Path) -> None:
    """As if the lower rate had been there from the state on."""
    run = Run(tmp_path / "run", steps=6, spoil=nan_at(6), held_out=())
    run()
    other = Run(tmp_path / "other", steps=6, held_out=(), after=lambda: slow(other))
    other()
    assert torch.equal(run.values, other.values)


def slow(run: Run) -> None:
    """From step 5 on."""
    run.loop.progress.slower = 0.3 if run.loop.progress.step >= 3 else 1.0


def test_the_second_time_training_ends_with_the_last_good_state(tmp_path: Path) -> None:
    after: list[Tensor] = []
    run = Run(tmp_path / "run", spoil=nan_at(6, 10), held_out=(), after=lambda: after.append(run.values))
    progress = run()
    # 5 steps, back to 4, again 5, 6, 7, and the next goes wrong: back to 6
    assert (progress.step, progress.rolled_back, progress.ended) == (6, [6, 8], True)
    assert progress.stopped == "the loss is nan at step 8, after a lower rate too"
    assert torch.equal(run.values, after[6])
    assert run.reporter.warnings[1].endswith("back to step 6, where it ends")


def test_before_any_state_training_starts_over_once_and_then_fails(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", spoil=nan_at(2), save_every=6)
    progress = run()
    assert (progress.rolled_back, progress.slower, progress.step) == ([2], 0.3, 12)
    assert [step for step, _ in progress.held_out] == list(range(13))
    assert [line["step"] for line in run.log if "held_out" in line] == list(range(13))
    with pytest.raises(NumericalError) as caught:
        Run(tmp_path / "two", spoil=nan_at(2, 4), save_every=6)()
    assert str(caught.value) == (
        "training: the loss is nan at step 2, with 0.3 of the learning rate too; use a lower one, and look at the text"
    )


def test_a_gradient_that_is_no_number_is_not_applied(tmp_path: Path) -> None:
    """The loss is a number, and its gradient is not."""

    def spoil(number: int, loss: Tensor) -> Tensor:
        return loss + (0 * loss).sqrt() if number == 4 else loss

    run = Run(tmp_path / "run", spoil=spoil, held_out=())
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
    whole = measured_as(Run(tmp_path / "whole"), losses)
    progress = whole()
    stopped = measured_as(Run(tmp_path / "stopped", after=stop_after(steps)), losses)
    with pytest.raises(Stop):
        stopped()
    again = measured_as(Run(tmp_path / "stopped"), losses)
    found = again()
    assert again.loop.text.asked[0] == (steps - 1) // 2 * 2  # type: ignore[attr-defined]
    assert torch.equal(again.values, whole.values)
    assert again.log == whole.log
    assert replace(found, seconds=0.0) == replace(progress, seconds=0.0)


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
    assert again() == first and again.model.passes == 0
    assert torch.equal(again.values, run.values) and again.log == run.log


def test_the_guard_knows_the_losses_in_front_of_a_stop(tmp_path: Path) -> None:
    """A jump is one, whether or not training was stopped a moment before."""

    def jump(at: int) -> Any:
        return lambda number, loss: 40 * loss if number == at else loss

    whole = Run(tmp_path / "whole", peak=1e-4, spoil=jump(11), held_out=())
    assert whole().rolled_back == [11]
    stopped = Run(tmp_path / "run", peak=1e-4, after=stop_after(10), save_every=9, held_out=())
    with pytest.raises(Stop):
        stopped()
    again = Run(tmp_path / "run", peak=1e-4, spoil=jump(2), save_every=9, held_out=())
    assert again().rolled_back == [11]


def test_half_a_state_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was being written, and a line of the log that was cut off."""
    stopped = Run(tmp_path / "run", after=stop_after(6))
    with pytest.raises(Stop):
        stopped()
    (tmp_path / "run" / "state-00000004").rename(tmp_path / "run" / "state-00000004.part")
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    run = Run(tmp_path / "run")
    run()
    assert run.loop.text.asked[0] == 0  # type: ignore[attr-defined]
    assert [line["step"] for line in run.log if "loss" in line] == list(range(1, 13))


# The log


def test_a_tracker_that_is_not_installed_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert tracker_problem("wandb") == "wandb is not installed; pip install wandb, or remove tracker"
    assert tracker_problem(None) is None


def test_a_tracker_gets_the_numbers_of_each_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package trackio."""
    (tmp_path / "trackio.py").write_text(
        "SEEN = []\n"
        "def init(**settings):\n    SEEN.append(settings)\n"
        "def log(numbers, step):\n    SEEN.append((step, numbers))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    log = Log(tmp_path / "log.jsonl", "trackio", tmp_path, "recipe", {"seed": 3})
    log.write(1, loss=2.5, note="words")
    import trackio  # type: ignore[import-not-found]

    assert trackio.SEEN == [
        {"project": "dscompress", "name": "recipe", "config": {"seed": 3}},
        (1, {"loss": 2.5}),
    ]
