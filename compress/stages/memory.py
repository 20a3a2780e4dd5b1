"""How much memory the layer loop takes, from shapes alone. Never imports torch.

What is counted follows compress/loop/stream.py: a layer's weights and the next one's, what solves its largest group of
matrices, and the states of all calibration tokens: inside a layer where there is room (`interleaved`), between layers
where there is less, in the host's memory where a GPU has none. Everything outside the layers is in memory in front of
the first and behind the last of them only.

Dimensions: D width of the hidden states, I inputs of a layer's widest linear, n weights of a layer.
"""

import math
from dataclasses import dataclass

from compress.forecast_records import Forecast
from compress.model.arch import width_of
from compress.model.shapes import Shapes, find_modules
from compress.stages.contract import Place

LIBRARIES = {"cpu": 540_000_000, "cuda": 2_100_000_000}  # of the host's memory, as torch and transformers are imported
_BATCH = {"cpu": 2048, "cuda": 16384}  # tokens that go through a layer at once, as compress/loop/stream.py has it
_STARTS = 50_000_000  # what the first passes through a layer import and set up, on a CPU
_SQUARES = 20  # bytes for each entry of the largest Hessian: itself, flipped, its factor and two steps between them


@dataclass(frozen=True)
class Load:
    """What a stage does in the layer loop.

    Args:
        tokens: of the calibration; 0: none.
        beside: the model that is run beside the stage's parent; None: nothing is.
        layer: bytes of weights that are held of a layer, in all forms, the next layer's included.
        solver: bytes that solve the largest group of a layer's matrices.
        outside: the same for what lies outside the layers.
        shares: the parts into which the room for states is divided.
    """

    tokens: int
    beside: Shapes | None
    layer: int
    solver: int
    outside: int = 0
    shares: int = 1


def solver_bytes(inputs: int, weights: int, hessian: bool) -> int:
    """Bytes that solve matrices with so many common inputs, and so many weights in all."""
    return max(_SQUARES * inputs**2 + 4 * weights, 8 * inputs**2 + 28 * weights) if hessian else 20 * weights


def largest_layer(shapes: Shapes) -> tuple[int, int]:
    """Bytes and weights of the layer that has most."""
    inside = find_modules(shapes).layers + "."
    found: dict[str, tuple[int, int]] = {}
    for name, info in shapes.tensors.items():
        if name.startswith(inside):
            index = name.removeprefix(inside).partition(".")[0]
            stored, weights = found.get(index, (0, 0))
            found[index] = stored + info.bytes, weights + math.prod(info.shape)
    return max(found.values())


def forecast(load: Load, shapes: Shapes, place: Place, output: int, disk: int, about: bool = False) -> Forecast:
    """What a stage in the layer loop takes.

    Args:
        load: what it does.
        shapes: of its parent.
        place: where.
        output: bytes that it writes.
        disk: free space that it wants.
        about: whether `output` is settled only as it runs.
    """
    modules, tokens = find_modules(shapes), -(-load.tokens // place.world)
    inside = sum(info.bytes for name, info in shapes.tensors.items() if name.startswith(modules.layers + "."))
    outside = sum(info.bytes for info in shapes.tensors.values()) - inside
    widths = [_widths(each) for each in (shapes, load.beside) if each is not None]
    between = [tokens * hidden * place.width for hidden, _ in widths]
    within = [tokens * (3 * hidden + widest) * place.width for hidden, widest in widths]  # what the last linear reads
    hidden, widest = widths[0]
    batch = min(tokens, _BATCH[place.device]) * (3 * widest + 6 * hidden) * place.width
    room = math.inf
    if place.free is not None:
        room = (place.free - load.layer - _SQUARES * widest**2 - batch) / load.shares
    there = place.device == "cpu" or 2 * between[0] <= room
    kept = within[0] <= room
    states = sum(within if kept else between if there else [0])
    sums = 8 * widest**2 if tokens else 0
    work = load.layer + max(load.solver, sums + batch * (1 if kept else len(widths))) + states
    ends = 2 * outside + load.outside + (sum(between) if there else 0)
    memory, gpu = LIBRARIES[place.device] if place.held is None else place.held, None
    if place.device == "cpu":
        memory += max(work, ends) + (_STARTS if tokens else 0)
    else:
        gpu = max(work, ends)
        memory = max(memory, LIBRARIES["cuda"])  # CUDA's own come with the first kernels
        memory += 2 * max(largest_layer(shapes)[0], outside) + (0 if there else sum(between))
    return Forecast(output_bytes=output, about=about, memory_bytes=memory, gpu_memory_bytes=gpu, disk_bytes=disk)


def _widths(shapes: Shapes) -> tuple[int, int]:
    """Of the hidden states, and of what a layer's widest linear reads."""
    widths = [shape[1] for shape in find_modules(shapes).linears.values()]
    return width_of(shapes.config) or min(widths), max(widths)
