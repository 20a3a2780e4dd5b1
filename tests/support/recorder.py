"""What stands in for CUDA graphs in tests of what is replayed: what it records is called again."""

from collections.abc import Callable


class Recorder:
    """Counts what is asked of it; fails where it is told to."""

    def __init__(self, free: int = 2**40, fails: int = 0) -> None:
        self.bytes, self.fails = free, fails
        self.warmed = self.recorded = self.replayed = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        self.warmed += 1
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        if self.recorded <= self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")

        def replay() -> None:
            self.replayed += 1
            work()

        return replay

    def free(self) -> int:
        return self.bytes
