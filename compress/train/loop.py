"""The training loop: steps of gradient descent that continue, after a stop at any moment, as if there had been none.

What a step reads is a function of the seed and its number alone, so a run that takes up a state reads the batches that
it would have read. The gradient is the sum over all tokens with a loss, of all micro-batches and processes, divided by
their number: how a batch is split changes nothing but rounding.

Where it goes back to when the loss breaks out hangs on step numbers alone: to the newest state on a grid of steps, or
to the start. States in between, by the clock or by `save_every`, are only for continuing. At the end there are weights.

Sharding and states are torch's own, and no loader has to be skipped forward where a batch is asked for by its number.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from compress.errors import NumericalError
from compress.system import distributed
from compress.system.progress import Reporter
from compress.train import state
from compress.train.guard import Guard, held_out_problem
from compress.train.log import Log
from compress.train.progress import Foresight, Progress, best_of, pairs
from compress.train.schedule import rate
from compress.train.trainee import Inputs, Taught, Trainee, inputs_of

Place = tuple[int, int]  # a sequence: its source, its number there
_SAVE_SECONDS = 300.0
_SLOWER = 0.3  # of the rate, after the loss broke out


class Text(Protocol):
    """Sequences of tokens, by place."""

    def indices(self, step: int) -> Sequence[Place]:
        """Those of a step."""

    def read(self, places: Sequence[Place]) -> Any:
        """Their tokens, the documents inside, and which tokens are scored."""


Teach = Callable[[Sequence[Place], Inputs], Taught | None]


@dataclass
class _Read:
    """What a step reads: its micro-batches, the scored tokens of all processes, and the first one's teaching."""

    step: int
    micro: list[tuple[Sequence[Place], Any]]
    scored: int
    first: tuple[Inputs, Taught | None] | None


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        steps: how many.
        micro_batch: sequences of a forward pass.
        rate: peak learning rate.
        warm_up: share of the steps.
        clip: largest norm of the gradient.
        held_out: sequences that are measured on.
        evaluate_every: steps between two measurements.
        state_every: steps between two states that can be gone back to; a multiple of evaluate_every.
        patience: measurements without a better one after which it ends; None: none.
        save_every: steps between two further states; None: by the clock.
    """

    steps: int
    micro_batch: int
    rate: float
    warm_up: float
    clip: float
    held_out: Sequence[Place]
    evaluate_every: int
    state_every: int
    patience: int | None
    save_every: int | None


class Loop:
    """One run of training.

    Args:
        trainee: filled and sharded.
        optimizer: over its trained parameters.
        text: what is read.
        teach: what the teacher says of sequences.
        settings: how.
        tokens_per_step: of all processes, for the pace.
        folder: of states and of the log.
        device: where the trainee is.
        reporter: told of progress.
        log: of steps; None in processes that don't write.
        start_over: fills the trainee and the optimizer as they were at step 0.
        after_step: called behind each step of the optimizer.
        kept_in: the dtypes in which parameters' best weights are kept; the trainee's own for others.
        flops: operations for one token, and those of all devices in a second; None where that is not known.

    Attributes:
        foresight: how long it will take, from the first steps on.
    """

    def __init__(
        self,
        trainee: Trainee,
        optimizer: torch.optim.Optimizer,
        text: Text,
        teach: Teach,
        settings: Settings,
        tokens_per_step: int,
        folder: Path,
        device: torch.device,
        reporter: Reporter,
        log: Log | None,
        start_over: Callable[[], None],
        after_step: Callable[[], None],
        kept_in: Mapping[str, torch.dtype],
        flops: tuple[float, float] | None,
    ) -> None:
        self.trainee, self.optimizer, self.text, self.teach = trainee, optimizer, text, teach
        self.settings, self.folder, self.device, self.reporter, self.log = settings, folder, device, reporter, log
        self.start_over, self.after_step, self.kept_in, self.flops = start_over, after_step, kept_in, flops
        self.tokens_per_step, self.progress = tokens_per_step, Progress()
        self._since: list[float] = []  # losses since the last point of the curve
        self._guard = Guard()
        self._ahead: _Read | None = None
        self._began = time.monotonic()
        self.foresight = Foresight(settings.steps, settings.evaluate_every)

    def run(self) -> Progress:
        """Train to the end, from the newest state that there is; the trainee has the best weights then.

        Raises:
            NumericalError: the loss breaks out at a lower rate too, before there is a state to end with, or is no
                number before the first step.
            OutputError: a state can't be written.
            UserError: a state is damaged.
        """
        self._began = time.monotonic()
        try:
            self._resume()
            self.foresight = Foresight(self.settings.steps - self.progress.step, self.settings.evaluate_every)
            self._train()
            self._take_best()
        finally:
            if self.log is not None:
                self.log.close()
        return self.progress

    def _train(self) -> None:
        settings = self.settings
        saved = time.monotonic()
        with self.reporter.task("training", settings.steps, "step", self.progress.step) as advance:
            if not self.progress.held_out and (problem := self._measure()) is not None:
                raise NumericalError(f"training: {problem} before the first step; look at the model and the text")
            while not self.progress.ended:
                began, step = time.monotonic(), self.progress.step
                loss, parts, norm, scored = self._step(step)
                if (problem := self._guard.problem(loss, norm)) is None:
                    seconds = time.monotonic() - began
                    self._took(loss, parts, norm, scored, seconds)
                    advance(self._pace(loss, seconds))
                    if self._is_due(settings.evaluate_every) or self.progress.ended:
                        problem = self._measure()
                if problem is not None:
                    self._go_back(problem, step + 1)
                elif self._is_time_to_save(saved):
                    self._save()
                    saved = time.monotonic()

    def _pace(self, loss: float, seconds: float) -> str:
        """How a step went, for the user."""
        tokens = self.tokens_per_step / seconds
        mfu = "" if self.flops is None else f", MFU {100 * tokens * self.flops[0] / self.flops[1]:.0f} %"
        return f"loss {loss:.4g}, {tokens:,.0f} tokens/s{mfu}"

    def _is_due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _is_time_to_save(self, saved: float) -> bool:
        settings = self.settings
        if self.progress.ended or self._is_due(settings.state_every):
            return True
        if settings.save_every is not None:
            return self._is_due(settings.save_every)
        return distributed.first(lambda: time.monotonic() - saved > _SAVE_SECONDS)

    def _step(self, step: int) -> tuple[float, dict[str, float], float, int]:
        """Gradient and update; mean loss, means of its terms, norm of the gradient, tokens with a loss."""
        settings, read, self._ahead = self.settings, self._ahead, None
        read = read if read is not None and read.step == step else self._read(step)
        sums: dict[str, Tensor] = {}
        factor = settings.rate * self.progress.slower * rate(step, settings.steps, settings.warm_up)
        for group in self.optimizer.param_groups:  # torchao's is compiled for a tensor
            group["lr"] = group["lr"].fill_(factor) if isinstance(group["lr"], Tensor) else factor
        first, read.first = read.first, None
        for places, batch in read.micro:
            inputs, taught = first or self._taught(places, batch)
            first = None  # which the teacher's states would outlive
            loss, parts = self.trainee(inputs, taught)
            _add(sums, parts | {"loss": loss.detach()})
            (loss * (distributed.world() / max(1, read.scored))).backward()  # gradients are averaged over processes
            del inputs, taught
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainee.parameters()), settings.clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if step + 1 < settings.steps and distributed.world() == 1:  # several would wait for each other here
            with suppress(Exception):  # which comes again when that step is due
                self._ahead = self._read(step + 1)
        means = _means(sums, read.scored, self.device)
        loss_, norm_ = means.pop("loss"), float(norm)
        if loss_ == loss_ and abs(norm_) < float("inf"):
            state.complete(self.optimizer)
            self.optimizer.step()
            self.after_step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_, means, norm_, read.scored

    def _read(self, step: int) -> _Read:
        """What a step reads, and the first teaching, which a GPU does behind the step before without waiting."""
        places, size = self.text.indices(step), self.settings.micro_batch
        share = len(places) // distributed.world()
        own = places[distributed.rank() * share :][:share]
        micro = [own[n : n + size] for n in range(0, share, size)]
        batches = [self.text.read(each) for each in micro]
        first = self._taught(micro[0], batches[0])
        scored = distributed.total(sum(int(np.count_nonzero(batch.scored.numpy()[:, 1:])) for batch in batches))
        return _Read(step, list(zip(micro, batches, strict=True)), scored, first)

    def _taught(self, places: Sequence[Place], batch: Any) -> tuple[Inputs, Taught | None]:
        inputs = inputs_of(batch, self.device)
        return inputs, self.teach(places, inputs)

    def _took(self, loss: float, parts: dict[str, float], norm: float, scored: int, seconds: float) -> None:
        """Note a step that went well."""
        progress, settings = self.progress, self.settings
        progress.step += 1
        progress.scored += scored
        progress.seconds += seconds
        self.foresight.took(seconds)
        progress.ended = progress.step >= settings.steps
        self._since.append(loss)
        if progress.ended or len(self._since) >= max(1, settings.steps // 200):
            progress.losses.append((progress.step, sum(self._since) / len(self._since)))
            self._since.clear()
        if self.log is not None:
            self.log.write(
                progress.step, loss=loss, **parts, norm=norm, scored=scored, seconds=round(seconds, 4),
                rate=float(self.optimizer.param_groups[0]["lr"]),
            )  # fmt: skip

    @torch.no_grad()
    def _measure(self) -> str | None:
        """The loss on sequences that are not trained on; what is wrong with it, where something is."""
        settings, progress, world = self.settings, self.progress, distributed.world()
        if not settings.held_out or (progress.held_out and progress.held_out[-1][0] == progress.step):
            return None
        own, began = list(settings.held_out[distributed.rank() :: world]), time.monotonic()
        rounds = -(-len(settings.held_out[::world]) // settings.micro_batch)  # the same in all processes
        sums: dict[str, Tensor] = {}
        count = 0
        for number in range(rounds):
            places = own[number * settings.micro_batch : (number + 1) * settings.micro_batch]
            read = places or settings.held_out[:1]  # sharded layers are read by all together; this one does not count
            inputs, taught = self._taught(read, self.text.read(read))
            loss, _ = self.trainee(inputs, taught)
            _add(sums, {"loss": loss if places else torch.zeros_like(loss)})
            count += len(inputs.rows) if places else 0
        loss_ = _means(sums, distributed.total(count), self.device)["loss"]
        self.foresight.measured(time.monotonic() - began)
        if (problem := held_out_problem(loss_)) is not None:
            return problem
        before = progress.best
        progress.held_out.append((progress.step, loss_))
        if self.log is not None:
            self.log.write(progress.step, held_out=loss_)
        self.reporter.say(f"step {progress.step} of {settings.steps}: held-out loss {loss_:.4g}")
        if before is not None and loss_ <= before[1] and not progress.ended:
            best = state.best_of_step(self.folder, progress.step)
            state.save_weights(best, self.trainee, self.kept_in, {"step": progress.step})
            distributed.first(lambda: state.keep(self.folder, self._kept(self._states())))
        self._end_early()
        return None

    def _end_early(self) -> None:
        """End where nothing has become better for long."""
        progress, patience = self.progress, self.settings.patience
        best = progress.best
        if patience is None or best is None:
            return
        since = [step for step, _ in progress.held_out if step > best[0]]
        if len(since) >= patience and not progress.ended:
            progress.ended = True
            progress.stopped = f"no better for {patience} measurements"
            self.reporter.say(f"training ends at step {progress.step}: {progress.stopped}")

    def _go_back(self, problem: str, step: int) -> None:
        """Take up the last good state with a lower rate; the second time, end with it."""
        before, again = self.progress, bool(self.progress.rolled_back)
        found = distributed.first(lambda: state.newest(self.folder, self.settings.state_every))
        if again and found is None:
            raise NumericalError(
                f"training: {problem} at step {step}, with {_SLOWER:g} of the learning rate too; use a lower one, "
                "and look at the text"
            )
        self._take(found)
        self._guard = Guard()
        progress = self.progress
        progress.rolled_back, progress.slower, progress.earlier = [*before.rolled_back, step], _SLOWER, before.earlier
        if again:
            progress.ended, progress.stopped = True, f"{problem} at step {step}, after a lower rate too"
        distributed.first(lambda: self._settle(found))
        self._rewind(progress.step)  # behind the later states, whose lines these are
        how = "where it ends" if again else f"with {_SLOWER:g} of the learning rate"
        self.reporter.warn(f"training: step {step}: {problem}; back to step {progress.step}, {how}")

    def _settle(self, found: Path | None) -> None:
        """Note on disk that training went back to a state, or to the start, and delete the later ones."""
        if found is not None:
            state.rewrite_notes(found, self._notes())
        state.keep(self.folder, self._kept(set() if found is None else {found}))

    def _resume(self) -> None:
        newest = distributed.first(lambda: state.newest(self.folder))
        if newest is None:
            self._rewind(-1)
            return
        self._take(newest)
        self._rewind(self.progress.step)
        self.reporter.say(f"continuing behind step {self.progress.step} of {self.settings.steps}")

    def _rewind(self, step: int) -> None:
        if self.log is not None:
            self.log.rewind(step)

    def _take(self, folder: Path | None) -> None:
        """Take up a state, or start over."""
        if folder is None:
            self.start_over()
            self.progress, self._since = Progress(held_out=self.progress.held_out[:1]), []
            return
        notes = state.load(folder, self.trainee, self.optimizer)
        self._since, self._guard = notes.pop("since"), Guard(notes.pop("usual"))
        self.progress = Progress(**{**notes, "losses": pairs(notes["losses"]), "held_out": pairs(notes["held_out"])})

    def _notes(self) -> dict[str, Any]:
        """What is kept beside a state."""
        earlier = self.progress.earlier + time.monotonic() - self._began
        return asdict(self.progress) | {"earlier": earlier, "since": self._since, "usual": list(self._guard.losses)}

    def _save(self) -> None:
        """Write the state, and delete what it replaces."""
        folder = state.of_step(self.folder, self.progress.step)
        if self.progress.ended:  # what is left to be done needs no moments
            state.save_weights(folder, self.trainee, self.kept_in, self._notes())
        else:
            state.save(folder, self.trainee, self.optimizer, self._notes())
        states = {folder} if self.progress.ended else self._states()
        distributed.first(lambda: state.keep(self.folder, self._kept(states)))

    def _states(self) -> set[Path]:
        """The newest state, and the one to go back to."""
        found = {state.newest(self.folder, every) for every in (1, self.settings.state_every)}
        return {each for each in found if each is not None}

    def _kept(self, states: set[Path]) -> set[Path]:
        """States, and the best weights of each and of now."""
        best = [self.progress.best, *(best_of(pairs(state.read_notes(each)["held_out"])) for each in states)]
        return states | {state.best_of_step(self.folder, each[0]) for each in best if each is not None}

    def _take_best(self) -> None:
        """Give the trainee the weights that measured best."""
        if (best := self.progress.best) is None or best[0] == self.progress.step:
            return
        if best[0] == 0:
            self.start_over()
        else:
            state.load(state.best_of_step(self.folder, best[0]), self.trainee, None)
        self.reporter.say(f"kept: the weights of step {best[0]}, whose held-out loss is the least")


def _add(sums: dict[str, Tensor], parts: dict[str, Tensor]) -> None:
    for name, value in parts.items():
        sums[name] = sums[name] + value if name in sums else value.double()


def _means(sums: dict[str, Tensor], count: int, device: torch.device) -> dict[str, float]:
    """Sums over all processes, divided by a count."""
    stacked = torch.stack(list(sums.values())).to(device)
    return dict(zip(sums, (distributed.all_reduce(stacked) / max(1, count)).tolist(), strict=True))
