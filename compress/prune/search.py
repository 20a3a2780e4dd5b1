"""The shape that meets a target: the nearest that loaders accept, and of those the one that shrinks most evenly.

Never imports torch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from compress.prune.axes import Anatomy, Dims, head_choices

_NEAR = 0.005  # of the model's parameters: shapes as near as that to the target are all as good
_SIZES = 16  # that are tried along each of three or four axes but the last
_REACHED = 0.02  # of the same: a target that no shape comes as near to is not reached


@dataclass(frozen=True)
class Found:
    """Shapes for a target.

    Args:
        best: the shapes that meet it, best first; empty where none does.
        nearest: the nearest shape, met or not.
    """

    best: Sequence[Dims]
    nearest: Dims


def search(
    anatomy: Anatomy,
    axes: Sequence[str],
    multiples: dict[str, int],
    wanted: float,
    cost: Callable[[Dims], float],
    at_most: bool,
) -> Found:
    """Find shapes whose cost is the wanted one.

    Args:
        anatomy: of the model.
        axes: that may shrink.
        multiples: what ffn, hidden and the heads' joined width (q) must be a multiple of.
        wanted: parameters or bytes.
        cost: of a shape, in the same unit, smaller for smaller shapes.
        at_most: nothing above `wanted` will do.
    """
    whole = min(cost(anatomy.dims), anatomy.shapes.bytes)  # a later stage may work on no shape as wide
    near: list[tuple[float, Dims]] = []
    for dims in _candidates(anatomy, axes, multiples, wanted, cost):
        if dims == anatomy.dims and not at_most and wanted < whole:
            continue  # what asks for a smaller model gets one, or hears why not
        near.append(((cost(dims) - wanted) / whole, dims))
    if not near:
        return Found([], anatomy.dims)
    allowed = [(miss, dims) for miss, dims in near if not at_most or miss <= 0]
    nearest = min(allowed or near, key=lambda each: abs(each[0]))
    if not allowed or abs(nearest[0]) > _REACHED and not at_most:
        return Found([], nearest[1])
    limit = max(abs(nearest[0]), _NEAR)
    good = {dims: miss for miss, dims in allowed if abs(miss) <= limit}
    return Found(sorted(good, key=lambda dims: (_unevenness(anatomy.dims, dims, axes), abs(good[dims]))), nearest[1])


def _unevenness(before: Dims, after: Dims, axes: Sequence[str]) -> float:
    """How differently the axes shrink: the variance of the logarithms of their shares."""
    logs = [math.log(after.of_axis(axis) / before.of_axis(axis)) for axis in axes]
    mean = sum(logs) / len(logs)
    return round(sum((each - mean) ** 2 for each in logs), 6)


def _candidates(
    anatomy: Anatomy, axes: Sequence[str], multiples: dict[str, int], wanted: float, cost: Callable[[Dims], float]
) -> Iterator[Dims]:
    """Legal shapes, with the finest axis next to the target on both sides."""
    whole = anatomy.dims
    last = next(axis for axis in ("ffn", "hidden", "layers", "heads") if axis in axes)
    shapes = [whole]
    for axis in axes:
        if axis != last:
            shapes = [each for dims in shapes for each in _coarsely(list(_along(dims, whole, axis, multiples)), axes)]
    for dims in shapes:
        line = list(_along(dims, whole, last, multiples))  # falling, but for heads
        if last == "hidden":  # of which not every multiple is legal
            line = [each for each in line if anatomy.refusal(each) is None]
        if last == "heads":
            tried: Sequence[Dims] = line
        else:
            low, high = 0, len(line)
            while low < high:  # the first that costs no more than is wanted
                middle = (low + high) // 2
                low, high = (middle + 1, high) if cost(line[middle]) > wanted else (low, middle)
            tried = line[max(0, low - 1) : low + 1]
        yield from (each for each in tried if anatomy.refusal(each) is None)


def _coarsely(line: Sequence[Dims], axes: Sequence[str]) -> Sequence[Dims]:
    """Fewer sizes along an axis where there are so many axes that all shapes would take long."""
    return line if len(axes) < 3 else line[:: max(1, len(line) // _SIZES)]


def _along(dims: Dims, whole: Dims, axis: str, multiples: dict[str, int]) -> Iterator[Dims]:
    """All sizes along an axis, from the whole downwards."""
    if axis == "heads":
        for heads, groups in head_choices(whole):
            if (heads, groups) == (whole.heads, whole.kv_heads) or heads * whole.head_dim % multiples["q"] == 0:
                yield replace(dims, heads=heads, kv_heads=groups)
        return
    step = 1 if axis == "layers" else multiples[axis]
    most = whole.of_axis(axis)
    yield dims
    for value in range((most - 1) // step * step, 0, -step):
        yield replace(dims, **{axis: value})


def nearest_legal(anatomy: Anatomy, dims: Dims, multiples: dict[str, int]) -> Dims | None:
    """The legal shape with the fewest changes from one that is not, by the sum of relative changes of its sizes."""
    whole, found = anatomy.dims, []
    widths = {dims.hidden}
    if "hidden" not in anatomy.problems:
        widths |= set(range(multiples["hidden"], whole.hidden + 1, multiples["hidden"]))
    for heads, groups in head_choices(whole):
        for hidden in widths:
            trial = replace(dims, heads=heads, kv_heads=groups, hidden=hidden)
            fits = heads * whole.head_dim % multiples["q"] == 0 and trial != whole
            if fits and anatomy.refusal(trial) is None:
                change = (
                    abs(heads / dims.heads - 1) + 3 * abs(hidden / dims.hidden - 1) + abs(groups / dims.kv_heads - 1)
                )
                found.append((change, trial))
    return min(found, key=lambda each: each[0])[1] if found else None
