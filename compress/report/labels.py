"""Writes names beside the points of a picture where they cover nothing."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST = 32
_AROUND = 5  # pixels that a marker takes to each side
# Offsets from the marker in points, with the alignments that go with them; the first that fits best is taken.
_PLACES = (
    (7, 4, "left", "bottom"), (-7, -4, "right", "top"), (7, -4, "left", "top"), (-7, 4, "right", "bottom"),
    (0, 9, "center", "bottom"), (0, -9, "center", "top"), (9, 0, "left", "center"), (-9, 0, "right", "center"),
    (16, 14, "left", "bottom"), (-16, -14, "right", "top"), (16, -14, "left", "top"), (-16, 14, "right", "bottom"),
)  # fmt: skip


def place(
    figure: "Figure", axes: "Axes", labels: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]]
) -> None:
    """Write each text beside its point, crossing as few lines as possible; one without a free place is left out.

    Args:
        figure: all else is in it already.
        axes: whose lines are crossed, and inside of which texts stay.
        labels: x and y of a point (data), and its text; the first are served first.
        marks: x and y of all markers, none of which is covered.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # only now is it known where things lie
    inside = axes.get_window_extent()
    pixels = axes.transData.transform
    taken = []
    for x, y in (pixels(mark) for mark in marks):
        taken.append(Bbox.from_extents(x - _AROUND, y - _AROUND, x + _AROUND, y + _AROUND))
    lines = [line.get_path().transformed(line.get_transform()) for line in axes.lines if line.get_linestyle() != "None"]
    for x, y, text in labels:
        found = []
        shown = axes.annotate(short(text), (x, y), (0, 0), textcoords="offset points", fontsize=9)
        for number, (right, up, horizontal, vertical) in enumerate(_PLACES):
            shown.set(position=(right, up), horizontalalignment=horizontal, verticalalignment=vertical)
            box = shown.get_window_extent()
            if box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1:
                continue
            if not any(box.overlaps(other) for other in taken):
                found.append((sum(path.intersects_bbox(box, filled=False) for path in lines), number, box))
        if not found:
            shown.remove()
            continue
        _, number, box = min(found, key=lambda each: each[:2])
        right, up, horizontal, vertical = _PLACES[number]
        shown.set(position=(right, up), horizontalalignment=horizontal, verticalalignment=vertical)
        taken.append(box)


def short(text: str) -> str:
    """Cut to what has room in a picture."""
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
