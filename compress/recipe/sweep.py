"""What a recipe may say of a sweep: the values that its settings take, one result for each. Never imports torch."""

from typing import Annotated, Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from compress.recipe.types import Closed, Count, Number, Text

Values = Annotated[list[Any], Field(min_length=1)]
Listed = Annotated[list[dict[Text, Any]], Field(min_length=1)]


class Search(Closed):
    """The largest or the smallest value of a setting whose result keeps to limits, by bisection."""

    maximize: Text | None = Field(default=None, description="Figure to make large, such as sparsity or size_ratio.")
    minimize: Text | None = Field(default=None, description="Figure to make small instead, such as bytes.")
    over: Text = Field(description="Path of the setting that is varied, such as stages.0.target.sparsity.")
    range: Annotated[list[Number], Field(min_length=2, max_length=2)] = Field(
        description="Least and largest value of the setting: [0.05, 0.6]."
    )
    subject_to: dict[Text, Number] = Field(
        min_length=1,
        description="Limits, by figure: {kl: 0.1}. What is better when small may be at most that, what is better when "
        "large (top1, tasks.NAME) at least.",
    )
    tolerance: Annotated[Number, Field(gt=0)] | None = Field(
        default=None,
        description="How close the value is found; null is a hundredth of the range, or 1 between whole numbers.",
    )
    points: Count = Field(default=12, ge=3, description="Most points to try.")

    @model_validator(mode="after")
    def _check(self) -> "Search":
        if (self.maximize is None) == (self.minimize is None):
            raise PydanticCustomError("goal", "needs one of maximize and minimize, and not both")
        if self.range[0] >= self.range[1]:
            raise PydanticCustomError("range", "range: the first value must be less than the second")
        return self

    @property
    def goal(self) -> str:
        """The figure to make large or small."""
        return self.maximize or self.minimize or ""

    @property
    def whole(self) -> bool:
        """Whether the values are whole numbers."""
        low, high = self.range
        fine = self.tolerance is not None and self.tolerance < 1
        return not fine and float(low).is_integer() and float(high).is_integer() and high - low >= 2

    def exact(self, value: float) -> int | float:
        """A value as the setting takes it."""
        return round(value) if self.whole else float(f"{value:.6g}")

    @property
    def ends(self) -> list[int | float]:
        """Both ends of the range."""
        return [self.exact(value) for value in self.range]

    @property
    def width(self) -> float:
        """How far apart the last two values may be."""
        low, high = self.range
        return float(self.tolerance or (1 if self.whole else (high - low) / 100))


class Sweep(Closed):
    """Points of a sweep: a grid, a list, or a search."""

    grid: dict[Text, Values] | None = Field(
        default=None, min_length=1, description="Values of each setting, by its path; all combinations are points."
    )
    list: Listed | None = Field(
        default=None,
        description="The points themselves: settings by their paths, such as {stages.0.bits: 3}; `name` names a point.",
    )
    search: Search | None = Field(default=None, description="Find one setting's best value instead.")

    @model_validator(mode="after")
    def _check(self) -> "Sweep":
        if sum(each is not None for each in (self.grid, self.list, self.search)) != 1:
            raise PydanticCustomError("sweep", "needs one of grid, list and search")
        return self
