"""The pictures of report.html, as SVG that lies inside the page and takes its colours from the page's style sheet.

The same report gives the same bytes.
"""

from statistics import fmean
from typing import TYPE_CHECKING, Any

from compress.records import Quality, Report, Trained
from compress.report import figures
from compress.report.canvas import INK, MARKERS, MUTED, PANEL, SERIES, canvas, legend, svg, with_titles
from compress.report.chain import chain_points
from compress.report.figures import MatrixRow
from compress.system.units import count, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def error_by_layer(report: Report) -> str | None:
    """Relative output error of every matrix over the layers, a line for each kind; None without such errors."""
    from matplotlib.ticker import MaxNLocator

    by_kind: dict[str, dict[int, list[MatrixRow]]] = {}
    for row in figures.matrices(report):
        if row.layer is not None and row.module.error:
            by_kind.setdefault(row.kind, {}).setdefault(row.layer, []).append(row)
    if not by_kind:
        return None
    fallbacks = [row for layers in by_kind.values() for rows in layers.values() for row in rows if row.module.fallback]
    titles: list[list[str]] = []
    with canvas(3.9) as (figure, axes):
        axes.set_yscale("log")
        for number, (kind, layers) in enumerate(by_kind.items()):
            style: dict[str, Any] = {"color": SERIES[number % 8], "marker": MARKERS[number % 8]}
            means = [fmean(row.module.error or 0.0 for row in rows) for rows in layers.values()]
            style |= {"markersize": 4, "linewidth": 1.4, "markeredgewidth": 0, "gid": f"kind-{number}"}
            axes.plot(list(layers), means, label=kind, **style)
            titles.append([f"layer {i}, {kind}: {figures.percent(x)}" for i, x in zip(layers, means, strict=True)])
        if fallbacks:
            ring: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": INK}
            layers_hit, errors = zip(*((row.layer or 0, row.module.error or 0.0) for row in fallbacks), strict=True)
            axes.plot(layers_hit, errors, linestyle="none", label="fallback", **ring)
        axes.yaxis.set_major_formatter(_percent)
        axes.yaxis.set_minor_formatter(lambda value, _: _minor(value, axes, _percent(value, None)))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="decoder layer", ylabel="relative output error")
        axes.margins(x=0.02)
        legend(axes)
        text = svg(figure, "layers", "Relative output error of every kind of matrix over the layers")
    for number, words in enumerate(titles):
        text = with_titles(text, f"layers-kind-{number}", words)
    return text


def kl_by_window(quality: Quality) -> str | None:
    """KL of every evaluation window, with their mean and its interval; None for fewer than two windows."""
    from matplotlib.ticker import MaxNLocator

    windows = quality.kl_per_window
    if len(windows) < 2:
        return None
    with canvas(2.7) as (figure, axes):
        if quality.kl.ci95 is not None:
            axes.axhspan(*quality.kl.ci95, color=SERIES[0], alpha=0.2, linewidth=0, label="95 % interval of the mean")
        axes.axhline(quality.kl.mean, color=SERIES[0], linewidth=1.4, label=f"mean {figures.number(quality.kl.mean)}")
        size = 5 if len(windows) <= 200 else 2.5
        style: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": size, "gid": "each"}
        axes.plot(windows, color=SERIES[1], label="one window", **style)
        axes.set(xlabel="evaluation window, in the order of the text", ylabel="KL, nats per token")
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        legend(axes)
        text = svg(figure, "windows", "KL divergence of every evaluation window")
    return with_titles(text, "windows-each", [f"window {n}: {figures.number(kl)}" for n, kl in enumerate(windows)])


def size_bars(report: Report) -> str | None:
    """Bytes of the quantized matrices and of all else, before and after; None where the record can't tell."""
    parts = figures.size_parts(report)
    if parts is None:
        return None
    names = ["quantized matrices", "kept as they were (embeddings, norms, ...)"]
    widest = max(report.base.bytes, report.compressed.bytes)
    with canvas(1.75) as (figure, axes):
        for part, (name, colour) in enumerate(zip(names, [SERIES[0], SERIES[7]], strict=True)):
            lefts, widths = [sum(bar[:part]) for bar in parts], [bar[part] for bar in parts]
            axes.barh([1, 0], widths, 0.6, left=lefts, color=colour, label=name)
            for y, left, width in zip((1, 0), lefts, widths, strict=True):
                if width > 0.12 * widest:
                    label = size(width)
                    axes.text(left + width / 2, y, label, color=PANEL, ha="center", va="center_baseline")
        for y, end in ((1, report.base.bytes), (0, report.compressed.bytes)):
            axes.text(end + 0.01 * widest, y, size(end), va="center_baseline")
        axes.set_yticks([1, 0], ["base", "compressed"])
        axes.tick_params(length=0)
        axes.xaxis.set_visible(False)
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.set_xlim(0, 1.13 * widest)
        legend(axes)
        return svg(figure, "sizes", "Bytes on disk of the base and of the compressed checkpoint")


def loss_curve(trained: Trained, number: int) -> str | None:
    """Losses of training and on held-out text over the steps of stage `number`, with the step that was kept.

    None for fewer than two points of either. Losses that fall by more than 20 times are drawn on a log scale.
    """
    from matplotlib.ticker import MaxNLocator

    lines = {"training": trained.losses, "held out": trained.held_out}
    if max(map(len, lines.values())) < 2:
        return None
    values = [value for pairs in lines.values() for _, value in pairs]
    with canvas(3.2) as (figure, axes):
        if 0 < 20 * min(values) < max(values):
            axes.set_yscale("log")
            axes.yaxis.set_minor_formatter(lambda value, _: _minor(value, axes, f"{value:g}"))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for (label, pairs), colour in zip(lines.items(), SERIES, strict=False):
            if pairs:
                marker: Any = {"marker": "o", "markersize": 4, "markeredgewidth": 0} if len(pairs) <= 60 else {}
                steps, losses = zip(*pairs, strict=True)
                gid = label.replace(" ", "-")
                axes.plot(steps, losses, color=colour, linewidth=1.4, label=label, gid=gid, **marker)
        best = trained.best_step
        if best is not None and best in dict(trained.held_out):
            ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none"}
            ring |= {"markeredgecolor": INK, "linestyle": "none", "gid": "best"}
            axes.plot([best], [dict(trained.held_out)[best]], label=f"best, step {best:,}", **ring)
        for index, step in enumerate(trained.rolled_back):
            style: dict[str, Any] = {"color": MUTED, "linestyle": ":", "linewidth": 1.4, "gid": f"rolled-back-{index}"}
            axes.axvline(step, label="" if index else "rolled back", **style)
        each = f"{count(trained.tokens / trained.steps)} tokens each, " if trained.steps else ""
        axes.set(xlabel=f"step ({each}{count(trained.tokens)} in all)", ylabel="mean loss")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.margins(x=0.02)
        legend(axes)
        return svg(figure, f"training-{number}", f"Losses over the steps of stage {number}")


def chain_curve(report: Report) -> str | None:
    """KL from the base against parameters, from stage to stage; None where `chain_points` has nothing."""
    points = chain_points(report)
    if not points:
        return None
    verbs = list(dict.fromkeys(point.verb for point in points))
    with canvas(3.4) as (figure, axes):
        way: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "gid": "way"}
        axes.plot([point.parameters for point in points], [point.kl for point in points], **way)
        for number, verb in enumerate(verbs):
            style: dict[str, Any] = {"color": SERIES[number % 8], "marker": MARKERS[number % 8], "markersize": 7}
            places = [(point.parameters, point.kl) for point in points if point.verb == verb]
            style |= {"linestyle": "none", "markeredgewidth": 0, "clip_on": False, "zorder": 3}
            axes.plot(*zip(*places, strict=True), label=verb, **style)
        for point in points[1:]:  # by turns on both sides: a stage often moves little
            side = 1 if point.number % 2 else -1
            place: dict[str, Any] = {"textcoords": "offset points", "xytext": (8 * side, 3)}
            place |= {"ha": "left" if side > 0 else "right"}
            axes.annotate(str(point.number), (point.parameters, point.kl), **place)
        axes.set(xlabel="parameters", ylabel="KL from the base, nats per token")
        scale, letter = _scale(max(point.parameters for point in points))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}{letter}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.margins(x=0.05, y=0.1)
        axes.set_ylim(bottom=0)
        legend(axes)
        return svg(figure, "chain", "KL divergence from the base against parameters, from stage to stage")


def _scale(largest: int) -> tuple[int, str]:
    """The unit of an axis of numbers of things, and its letter."""
    units = {1_000_000_000: "B", 1_000_000: "M", 1_000: "K"}
    return next(((unit, letter) for unit, letter in units.items() if largest >= unit), (1, ""))


def _percent(value: float, _: object) -> str:
    return f"{100 * value:g} %"


def _minor(value: float, axes: "Axes", label: str) -> str:
    """The label of 2 and 5 between the powers of ten where the axis spans less than two of them."""
    low, high = axes.get_ylim()
    return label if high / low < 100 and f"{value:.0e}"[0] in "25" else ""
