"""The stage kinds of a recipe. A new kind is one row here and a package with plan.py and run.py (contract.py)."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """Where a stage kind is found; nothing is imported before it is asked for.

    Args:
        spec: `module:name` of what a recipe may say, a `StageSpec` or a union of some.
        package: with the modules `plan` and `run`.
        expands: whether one of a recipe may stand for several, which the module `parts` says.
    """

    spec: str
    package: str
    expands: bool = False

    def load_spec(self) -> Any:
        """The type of the stage in a recipe; never imports torch."""
        module, _, name = self.spec.partition(":")
        return getattr(import_module(module), name)

    def plan(self) -> Any:
        """The module with `plan`; never imports torch."""
        return import_module(f"{self.package}.plan")

    def parts(self, spec: Any, shapes: Any, setting: Any) -> list[Any]:
        """The stages that one of a recipe stands for, on a model of these shapes (None where it is not here)."""
        if not self.expands:
            return [spec]
        found: list[Any] = import_module(f"{self.package}.parts").parts(spec, shapes, setting)
        return found

    def run(self) -> Any:
        """The module with `CODE_VERSION` and `run`."""
        return import_module(f"{self.package}.run")


KINDS = {
    "distill": Kind("compress.recipe.train:DistillStage", "compress.stages.training", expands=True),
    "finetune": Kind("compress.recipe.train:FinetuneStage", "compress.stages.training"),
    "prune": Kind("compress.recipe.prune:PruneSpec", "compress.stages.prune", expands=True),
    "quantize": Kind("compress.recipe.quantize:QuantizeStage", "compress.stages.quantize"),
}
