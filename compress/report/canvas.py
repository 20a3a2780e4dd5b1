"""What every picture shares: its size, style and colours, and how it becomes a part of a page.

Matplotlib is imported when a picture is drawn. For a page it draws in placeholder colours that become CSS variables, so
one picture serves the light and the dark scheme; text stays text. The same figures give the same bytes.
"""

import html
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours as matplotlib takes them: of text, of what is less important, of rules, of the ground, of lines."""

    ink: str
    muted: str
    rule: str
    panel: str
    series: tuple[str, ...]


_VARIABLES = {"#010101": "var(--ink)", "#020202": "var(--muted)", "#030303": "var(--rule)", "#040404": "var(--panel)"}
INK, MUTED, RULE, PANEL = _VARIABLES
SERIES = tuple(f"#0505{number:02x}" for number in range(8))
_VARIABLES |= {colour: f"var(--series-{number})" for number, colour in enumerate(SERIES)}
PAGE = Palette(INK, MUTED, RULE, PANEL, SERIES)
MARKERS = "osD^vPX*"


def light() -> Palette:
    """The colours of the page in the light scheme, as its style sheet states them."""
    css = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", css[: css.index("@media")]))
    series = tuple(colours[f"series-{number}"] for number in range(len(SERIES)))
    return Palette(colours["ink"], colours["muted"], colours["rule"], colours["panel"], series)


def _style(palette: Palette) -> Any:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "dscompress",
        "font.family": "sans-serif",
        "text.parse_math": False,
        "font.size": 10,
        "text.color": palette.ink,
        "axes.labelcolor": palette.muted,
        "axes.edgecolor": palette.rule,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette.rule,
        "grid.linewidth": 0.7,
        "xtick.color": palette.rule,
        "ytick.color": palette.rule,
        "xtick.labelcolor": palette.muted,
        "ytick.labelcolor": palette.muted,
        "figure.facecolor": "none",
        "legend.frameon": False,
    }


@contextmanager
def canvas(height: float, width: float = 9.2, palette: Palette = PAGE) -> "Iterator[tuple[Figure, Axes]]":
    """An empty figure of this size (inches); draw and save it inside of the context, which holds the style."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_style(palette)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a page has the reader's fonts
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def svg(figure: "Figure", prefix: str, label: str) -> str:
    """The figure as an <svg> element for the page: ids of its own, the page's font, colours as CSS variables."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    viewbox = re.search(r'viewBox="[^"]*"', text)
    assert viewbox is not None
    text = text[text.index("</defs>", text.index("<style")) + len("</defs>") :]  # the prologue and its global style
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\1{prefix}-", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, variable)
    return f'<svg role="img" aria-label="{html.escape(label)}" {viewbox[0]}>{text}'


def with_titles(text: str, group: str, titles: Sequence[str]) -> str:
    """The picture, with words for each marker of a line, shown where the pointer rests on it.

    Args:
        text: of `svg`.
        group: the line's id in it, prefix included.
        titles: for its markers, in order.
    """
    head, start, rest = text.partition(f'<g id="{group}">')
    parts = re.split(r"(<use [^>]*)/>", rest, maxsplit=len(titles))
    assert len(parts) == 2 * len(titles) + 1, (group, len(titles))
    for number, title in enumerate(titles):
        parts[2 * number + 1] += f"><title>{html.escape(title)}</title></use>"
    return head + start + "".join(parts)


def legend(axes: "Axes") -> None:
    """What each line is, in a row above the axes."""
    columns = min(8, len(axes.get_legend_handles_labels()[0]))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, handlelength=1.6)
