"""A stand-in for the package of a tracker."""

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Package(ModuleType):
    """It has the functions of wandb and trackio that are used, and notes what is asked of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # by which it counts as installed
        self.asked: list[tuple[Any, ...]] = []
        for each in ("init", "log", "define_metric", "finish"):
            setattr(self, each, self._noting(each))

    def _noting(self, name: str) -> Any:
        return lambda *values, **more: self.asked.append((name, *values, more))
