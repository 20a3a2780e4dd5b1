"""What a stage was expected to take: in the plan before a run, and beside what was measured in report.json."""

from typing import Annotated

from pydantic import Field

from compress.record_types import Count, Typed


class Forecast(Typed):
    """What a stage is expected to take; None: not known.

    Args:
        output_bytes: of the files with its weights, to the byte; nearly so where it is `about`.
        about: whether what it writes is settled only as it runs (a shape that is chosen, a method that is compared).
        memory_bytes: most memory that the process has resident, libraries included.
        gpu_memory_bytes: most memory that is allocated on the GPU.
        disk_bytes: free space in the work folder that it wants while it runs.
        seconds: of the whole stage, as they were foreseen behind its first layer or its first steps of training.
    """

    output_bytes: Count | None = None
    about: bool = False
    memory_bytes: Count | None = None
    gpu_memory_bytes: Count | None = None
    disk_bytes: Count | None = None
    seconds: Annotated[float, Field(ge=0)] | None = None

    def later(self, seconds: float) -> "Forecast":
        """The same with so many seconds more, where they are known at all."""
        return self if self.seconds is None else self.model_copy(update={"seconds": self.seconds + seconds})
