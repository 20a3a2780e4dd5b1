"""How much memory training takes in a process, and what is chosen by it. From sizes alone: never imports torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from compress.errors import UserError
from compress.system.extras import missing_extra
from compress.system.units import size
from compress.train.body import Body

Optimizer = Literal["adamw", "adamw8bit"]

_MASTER = 4 + 4  # bytes of a float32 weight and its gradient
_MOMENTS: dict[Optimizer, float] = {"adamw": 8.0, "adamw8bit": 2.1}
_CHUNK = 1_300_000_000  # of logits, on a GPU
_TOKENS = {"cuda": 32768, "cpu": 4096}  # in a forward pass; more are no faster
LIBRARIES = 800_000_000


@dataclass(frozen=True)
class Setup:
    """What memory decides: sequences of a forward pass, the optimizer, whether layers are computed again."""

    micro_batch: int
    optimizer: Optimizer
    again: bool


@dataclass(frozen=True)
class Demand:
    """What training needs memory for.

    Args:
        student: the model.
        trainable: weights that are trained.
        teacher: the model that is asked at each step; None: none.
        length: tokens of a sequence.
        width: bytes of a number in the forward pass.
        device: "cuda" or "cpu".
        world: processes.
        cacheable: whether the teacher's targets could be cached instead.
    """

    student: Body
    trainable: int
    teacher: Body | None
    length: int
    width: int
    device: str
    world: int = 1
    cacheable: bool = False

    def bytes(self, setup: Setup) -> int:
        """Of one process."""
        own, width = self.student, self.width
        masters = self.trainable * (_MASTER + _MOMENTS[setup.optimizer])
        frozen = (own.parameters - self.trainable) * width
        outer = 2 * own.vocabulary * own.hidden
        layer = (own.parameters - outer) // max(1, own.layers)
        copies = own.parameters if self.world == 1 else 2 * layer + outer
        teacher = 0
        if self.teacher is not None:
            head = self.teacher.vocabulary * self.teacher.hidden
            teacher = self.teacher.parameters // self.world + (0 if self.world == 1 else 2 * head)
        logits = setup.micro_batch * self.length * own.vocabulary  # or as many as a chunk of them has
        chunk = min(_CHUNK, (8 + width) * logits) if self.device == "cuda" else min(_CHUNK // 4, 40 * logits)
        loss = own.vocabulary * own.hidden * (4 + width) + chunk
        kept = self._layer_bytes(own) + (own.layers - 1) * (
            own.hidden * width * self.length if setup.again else self._layer_bytes(own)
        )
        if self.teacher is not None:
            kept += self._layer_bytes(self.teacher) // 2
        states = 6 * self.length * own.hidden * width
        held = (masters + frozen) / self.world + copies * width + teacher * width
        return int(held + loss + setup.micro_batch * (kept + states) + LIBRARIES)

    def _layer_bytes(self, body: Body) -> int:
        """What a layer keeps of a sequence for its backward pass: inputs of its products, and float32 in its norms."""
        each = self.width * (7 * body.hidden + 2 * body.attention + 2 * body.keys + 4 * body.ffn) + 8 * body.hidden
        return self.length * each

    def choose(
        self, share: int, free: float, where: str, micro: int | None, optimizer: str, again: bool | None
    ) -> Setup:
        """What fits, and is fastest.

        Args:
            share: sequences of a step in this process.
            free: bytes.
            where: the stage, for messages.
            micro: sequences of a forward pass, where the recipe says so.
            optimizer: "auto", or the one that the recipe names.
            again: whether layers are computed again; None: where memory asks for it.

        Raises:
            UserError: nothing does, with the least that would and what to lower.
        """
        least = None
        for setup in self._setups(share, micro, optimizer, again):
            needed = self.bytes(setup)
            if needed <= free:
                return setup
            least = needed if least is None else min(least, needed)
        assert least is not None
        remedies = self._remedies(micro, optimizer, again)
        raise UserError(
            f"{where}: training needs about {size(least)} in each process and {size(max(0, int(free)))} are free; use "
            f"{remedies}"
        )

    def _remedies(self, micro: int | None, optimizer: str, again: bool | None) -> str:
        """What takes less, of what has not been tried."""
        found = ["lora: {}" if self.trainable == self.student.parameters else "a shorter sequence_length"]
        if self.device == "cuda":
            found.append("more processes (--nproc)")
        if optimizer == "adamw":  # named, or what auto comes to without torchao
            missing = missing_extra("torchao", "train")
            found.append("optimizer: adamw8bit" + ("" if missing is None else f" ({missing})"))
        if micro not in (None, 1):
            found.append("micro_batch: 1")
        if again is False:
            found.append("checkpoint_activations: true")
        if self.teacher is not None and self.cacheable:
            found.append("targets: cached")
        return ", ".join(found)

    def _setups(self, share: int, micro: int | None, optimizer: str, again: bool | None) -> Iterator[Setup]:
        """The better one first: exact moments before small ones, keeping before computing again, many sequences."""
        most = max(1, _TOKENS[self.device] // self.length)
        sizes = [n for n in range(share, 0, -1) if share % n == 0 and n <= most] if micro is None else [micro]
        named: list[Optimizer] = ["adamw", "adamw8bit"]
        for moments in [each for each in named if optimizer in ("auto", each)]:
            for recompute in (False, True) if again is None else (again,):
                # a forward pass of few tokens leaves a GPU waiting; then computing again costs less
                large = [n for n in sizes if recompute or again is not None or 4 * n >= sizes[0]]
                yield from (Setup(n, moments, recompute) for n in large)
            if again is None:
                yield from (Setup(n, moments, False) for n in sizes if 4 * n < sizes[0])
