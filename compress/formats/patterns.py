"""Short regular expressions that select exactly some modules of a model, as both formats' configs want them."""

import re
from collections.abc import Iterable

_NUMBER = re.compile(r"(?:(?<=\.)|^)(\d+)(?=\.|$)")  # a whole component of a module's name, such as a layer's index


def also_called(module: str) -> list[str]:
    """A module's name in the files, and in the model where that is another: an output head has one of its own there."""
    return [module, "lm_head"] if module == "embed_out" else [module]


def has_number(name: str) -> bool:
    """Whether a module lies inside a numbered list (the decoder layers), which an output head does not."""
    return _NUMBER.search(name) is not None


def inside_layer(name: str) -> str:
    """What follows a module's first number: `mlp.up_proj` for `model.layers.0.mlp.up_proj`."""
    parts = _NUMBER.split(name, maxsplit=1)
    return parts[-1].removeprefix(".")


def select(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    r"""Anchored patterns that match exactly `names` among `everything`.

    Names that differ in their numbers alone share a pattern: `^model\.layers\.\d+\.mlp\.up_proj$` for all layers,
    `^model\.layers\.(0|1)\.mlp\.up_proj$` for some. Where the numbers do not multiply out (some experts of some
    layers), each name has its own.
    """
    patterns = []
    universe = _by_numbers(everything)
    for literals, chosen in _by_numbers(names).items():
        values = [set(column) for column in zip(*chosen, strict=True)]
        rivals = {n for n in universe[literals] if all(v in ok for v, ok in zip(n, values, strict=True))}
        if rivals == chosen:
            every = [set(column) for column in zip(*universe[literals], strict=True)]
            numbers = [_one_of(some, whole) for some, whole in zip(values, every, strict=True)]
            patterns.append(_pattern(literals, numbers))
        else:
            patterns += [_pattern(literals, numbers) for numbers in sorted(chosen, key=lambda n: [int(v) for v in n])]
    return patterns


def _by_numbers(names: Iterable[str]) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """The names' numbers, by what stands around them."""
    groups: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for name in names:
        parts = _NUMBER.split(name)
        groups.setdefault(tuple(parts[0::2]), set()).add(tuple(parts[1::2]))
    return groups


def _one_of(values: set[str], every: set[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return r"\d+" if values == every else f"({'|'.join(sorted(values, key=int))})"


def _pattern(literals: Iterable[str], numbers: Iterable[str]) -> str:
    first, *rest = (re.escape(literal) for literal in literals)
    return f"^{first}{''.join(number + literal for number, literal in zip(numbers, rest, strict=True))}$"
