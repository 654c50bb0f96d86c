"""Charts as SVG by matplotlib. They take the page's text colour, so that one drawing serves light, dark and paper."""

import io
from collections.abc import Mapping, Sequence
from math import atan2, degrees, log10
from typing import Any

from headrace.errors import HeadraceError

INK = "#123456"  # replaced by the page's text colour
COLOURS = {
    "read": "#2f81c7",
    "compute": "#3a9a5b",
    "stall": "#d1603d",
    "other": "#8a63b8",
}
SVG_ID = "headrace"


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise HeadraceError("pages need matplotlib", hint="pip install 'headrace[html]'") from error
    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": SVG_ID,
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.facecolor": "none",
            "figure.facecolor": "none",
            "savefig.facecolor": "none",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "axes.grid": True,
            "grid.color": INK,
            "grid.alpha": 0.15,
        }
    )
    return pyplot


def _svg(figure: Any, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return "<div class=chart>" + text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1) + "</div>"


Spans = Sequence[tuple[float, float]]


def timeline(panels: Mapping[str, Mapping[str, Spans]], unit: str = "s") -> str:
    """Bars of time by resource. Several panels share the axis, so that measured spans stand under predicted ones."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 1.1 + 1.25 * len(panels)), sharex=True, squeeze=False)
    for axis, (title, rows) in zip(axes[:, 0], panels.items(), strict=True):
        for at, (name, spans) in enumerate(reversed(list(rows.items()))):
            bars = [(start, end - start) for start, end in spans]
            axis.broken_barh(bars, (at - 0.38, 0.76), color=COLOURS.get(name, COLOURS["other"]), linewidth=0)
        axis.set_yticks(range(len(rows)), list(reversed(list(rows))))
        axis.set_title(title, loc="left", fontsize=10)
        axis.grid(axis="y", visible=False)
    axes[-1, 0].set_xlabel(f"time in {unit}")
    figure.tight_layout()
    return _svg(figure, "timeline of a pass")


def bars(rows: Mapping[str, float], label: str) -> str:
    """Horizontal bars with their names, for example busy seconds by resource."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 0.7 + 0.34 * len(rows)))
    names = list(reversed(list(rows)))
    axis.barh(names, [rows[name] for name in names], color=COLOURS["read"], height=0.6)
    axis.set_xlabel(label)
    axis.grid(axis="y", visible=False)
    return _svg(figure, label)


def roofline(roofs: Mapping[str, float], peak: float, points: Mapping[str, tuple[float, float]]) -> str:
    """FLOP per byte against FLOP per second: bandwidths as slopes, arithmetic as the ceiling, plans as points.

    Args:
        roofs: bytes per second by resource.
        peak: FLOP per second.
        points: (FLOP per byte, FLOP per second reached) by name.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(9, 4.2))
    low = min([0.3, *(x / 2 for x, _ in points.values() if x > 0)])
    high = max([3e3, *(2 * x for x, _ in points.values())])
    lows = [min(peak, rate * low) for rate in roofs.values()] + [y for _, y in points.values() if y > 0]
    bottom, top = min(lows) / 2, 3 * peak
    # The angle on the page of a slope of one in logarithms: the axes are 8 by 3.7 inches.
    slope = degrees(atan2(3.7 / log10(top / bottom), 8 / log10(high / low)))
    for name, rate in roofs.items():
        xs = [low, min(peak / rate, high), high]
        axis.plot(xs, [min(peak, rate * x) for x in xs], color=INK, linewidth=1.1, alpha=0.7)
        place = {"rotation": slope, "rotation_mode": "anchor", "va": "bottom", "fontsize": 8, "color": INK}
        axis.text(low * 1.2, min(peak, rate * low) * 1.35, name, **place)
    axis.set_xlim(low, high)
    axis.set_ylim(bottom, top)
    markers = "osD^vP*X<>"
    for at, (name, (x, y)) in enumerate(points.items()):
        colour = COLOURS["stall"] if at < 2 else COLOURS["other"]
        axis.plot([x], [y], markers[at % len(markers)], color=colour, label=name, markersize=8 if at < 2 else 6)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("FLOP per byte read")
    axis.set_ylabel("FLOP/s")
    axis.legend(fontsize=8, loc="lower right")
    return _svg(figure, "roofline")


def frontiers(panels: Mapping[str, tuple[str, Sequence[tuple[float, float]], Sequence[tuple[float, float]]]]) -> str:
    """All configurations and their Pareto frontier: title -> (label of x, all points, the frontier)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 3.4), squeeze=False)
    for axis, (title, (label, cloud, line)) in zip(axes[0], panels.items(), strict=True):
        axis.plot(
            [x for x, _ in cloud],
            [y for _, y in cloud],
            ".",
            color=COLOURS["read"],
            alpha=0.25,
            markersize=4,
            rasterized=False,
        )
        axis.plot([x for x, _ in line], [y for _, y in line], "o-", color=COLOURS["stall"], markersize=4)
        axis.set_yscale("log")
        if all(x > 0 for x, _ in cloud) and label.startswith("$"):
            axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_ylabel("tok/s of each sequence")
        axis.set_title(title, loc="left", fontsize=10)
    figure.tight_layout()
    return _svg(figure, "frontier of speed")
