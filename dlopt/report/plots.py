"""Figures of the report: curves as inline SVG that follows the page's light or dark colours, images as data URIs.

Everything is drawn through matplotlib's objects, never pyplot, and the same numbers give the same bytes.
"""

from __future__ import annotations

import base64
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO, StringIO
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from PIL import Image

INK, QUIET, LINE, ALARM, FIRST, SECOND, *MORE = (f"#0d1a{number:02x}" for number in range(10))
"""Stand-ins, which the SVG's text has until they become the page's own colours."""
COLOURS = {INK: "ink", QUIET: "quiet", LINE: "line", ALARM: "alarm", FIRST: "accent", SECOND: "second"}
COLOURS |= {stand_in: f"run{number}" for number, stand_in in enumerate(MORE, start=3)}
OF_RUN = (FIRST, SECOND, *MORE)
"""Of so many runs over each other; only a page that compares runs has those after the second."""
OF_SPLIT = {"train": FIRST, "validation": SECOND}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.7,
    "lines.solid_joinstyle": "round",
    "xtick.color": LINE,
    "xtick.labelcolor": QUIET,
    "ytick.color": LINE,
    "ytick.labelcolor": QUIET,
    "ytick.minor.size": 0,
}
Layout = tuple[tuple[float, float], tuple[float, float, float, float]]
"""Width and height of a figure in inches; left, bottom, width and height of its axes, as shares of the figure."""
ENDED: Layout = (3.7, 2.2), (0.14, 0.18, 0.64, 0.72)
"""With room on the right for the names of curves. All figures of a grid are as wide, so that their letters are as large."""
NARROW: Layout = (3.7, 2.2), (0.13, 0.18, 0.83, 0.78)
SQUARE: Layout = (3.7, 3.4), (0.16, 0.14, 0.8, 0.83)
BUCKETS = 80
"""A noisy series of more points is drawn as the mean of so many groups, in a band from the lowest to the highest."""
POINTS = 500
"""A smooth series of more points is drawn by so many of them."""
DOTS, CELLS = 1000, 36
"""Of more points than DOTS, how many lie in each cell of a grid of CELLS by CELLS is drawn."""
BARS = 40
SMALL, THUMBNAIL = 64, 96
"""Images of up to SMALL pixels a side are shown exactly, larger ones as thumbnails of so many."""


class Curve(NamedTuple):
    """A run's series, NaN where a value was not finite."""

    name: str
    colour: str
    x: np.ndarray
    y: np.ndarray
    dashed: bool = False


def by_epoch(
    name: str, epochs: Sequence[int], series: Mapping[str, np.ndarray], best: int, percent: bool = False, logarithmic: bool = False
) -> Markup:
    """A curve for each split (values, NaN where there is none) over the epochs, with the best epoch marked.

    percent: values are shares. logarithmic: so may the axis be, where values span more than a factor of ten.
    """

    def draw(axes: Axes) -> None:
        for split, values in series.items():
            axes.plot(epochs, values, color=OF_SPLIT[split], marker="o", markersize=3 if len(epochs) < 40 else 0)
        axes.axvline(best, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.annotate(f"best epoch {best}", (best, 1.02), xycoords=("data", "axes fraction"), color=QUIET, ha="center", va="bottom")
        axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        _scale(axes, np.concatenate(list(series.values())), logarithmic=logarithmic)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        _label_ends(axes, [Curve(split, OF_SPLIT[split], np.asarray(epochs), values) for split, values in series.items()])

    return drawn(name, ENDED, draw)


def by_step(name: str, steps: np.ndarray, values: np.ndarray, smooth: bool = False, limit: float | None = None) -> Markup:
    """A series over the steps; NaN values are gaps with a mark below. `limit` is drawn as a line across."""

    def draw(axes: Axes) -> None:
        x, (low, mean, high) = _picked(steps, values) if smooth else _grouped(steps, values)
        axes.fill_between(x, low, high, color=FIRST, alpha=0.2, linewidth=0)
        axes.plot(x, mean, color=FIRST, marker="o" if len(x) == 1 else None, markersize=3)
        lost = steps[np.isnan(values)]
        axes.plot(lost, np.zeros(len(lost)), "^", color=ALARM, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
        if limit is not None and np.nanmax(values, initial=0) > limit / 3:
            axes.axhline(limit, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
            axes.annotate(
                "train.clip",
                (1, limit),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                color=QUIET,
                ha="right",
                va="bottom",
            )
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        axes.set_xlabel("step")
        _scale(axes, values, logarithmic=not smooth)
        if smooth:
            axes.set_ylim(bottom=0)

    return drawn(name, NARROW, draw)


def by_run(name: str, curves: Sequence[Curve], along: str, percent: bool = False, logarithmic: bool = False) -> Markup:
    """A curve for each run over its epochs or steps (what `along` says). Long series are drawn as `by_step` does."""
    longest = max(len(curve.name) for curve in curves)
    layout = (5.4, 2.7), (0.1, 0.16, 0.88 - 0.0165 * longest, 0.79)

    def draw(axes: Axes) -> None:
        for curve in curves:
            x, (low, mean, high) = _grouped(curve.x, curve.y)
            marker = "o" if len(curve.x) < 40 else None
            axes.fill_between(x, low, high, color=curve.colour, alpha=0.15, linewidth=0)
            axes.plot(x, mean, color=curve.colour, linestyle=(0, (4, 2)) if curve.dashed else "-", marker=marker, markersize=3)
            lost = curve.x[np.isnan(curve.y)]
            axes.plot(lost, np.zeros(len(lost)), "^", color=ALARM, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel(along)
        _scale(axes, np.concatenate([curve.y for curve in curves]), logarithmic)
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        _label_ends(axes, curves)

    return drawn(name, layout, draw)


def curve(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    titles: tuple[str, str],
    diagonal: bool = False,
    level: float | None = None,
    steps: bool = False,
) -> Markup:
    """A curve in the unit square, filled below. A diagonal or a level show what chance would give. steps: it falls at once."""

    def draw(axes: Axes) -> None:
        kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).astype(int))
        style: Any = "steps-pre" if steps else "default"
        axes.plot(x[kept], y[kept], color=FIRST, drawstyle=style)
        axes.fill_between(x[kept], y[kept], step="pre" if steps else None, color=FIRST, alpha=0.15, linewidth=0)
        if diagonal or level is not None:
            axes.plot([0, 1], [0, 1] if level is None else [level] * 2, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel=titles[0], ylabel=titles[1])

    return drawn(name, SQUARE, draw)


def calibration(name: str, said: np.ndarray, share: np.ndarray, rows: np.ndarray) -> Markup:
    """How often what was given a probability is so, by that probability: a dot a bin, the larger the more rows it has; the line is where
    both are equal."""

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.plot(said, share, color=FIRST, alpha=0.6)
        axes.scatter(said, share, s=12 + 90 * rows / rows.max(), color=FIRST, linewidth=0)
        axes.set(xlim=(0, 1.01), ylim=(0, 1.01), xlabel="probability", ylabel="share that is so")

    return drawn(name, SQUARE, draw)


def sizes(name: str, bytes: np.ndarray, values: np.ndarray, names: Sequence[str], title: str) -> Markup:
    """A metric by the size of a file, a dot each; the first is what the others were made of, the last what came of it all."""

    def draw(axes: Axes) -> None:
        axes.axhline(values[0], color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.scatter(bytes[1:-1], values[1:-1], s=18, color=QUIET, linewidth=0)
        axes.scatter(bytes[[0, -1]], values[[0, -1]], s=36, color=FIRST, linewidth=0)
        for place in (0, len(names) - 1):
            axes.annotate(names[place], (bytes[place], values[place]), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
        axes.set(xscale="log", xlabel="bytes, packed", ylabel=title)
        axes.margins(0.2)

    return drawn(name, SQUARE, draw)


def bars(name: str, names: Sequence[str], values: np.ndarray, title: str) -> Markup:
    """A bar for each name, downwards from the first."""
    height = 0.5 + 0.2 * len(names)
    layout: Layout = (5.4, height), (0.32, 0.42 / height, 0.65, 1 - 0.5 / height)

    def draw(axes: Axes) -> None:
        places = np.arange(len(names))
        axes.barh(places, values, color=FIRST, alpha=0.75, height=0.7)
        axes.axvline(0, color=QUIET, linewidth=1)
        axes.set_yticks(places, [_short(name) for name in names], parse_math=False)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel(title)

    return drawn(name, layout, draw)


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def scatter(name: str, x: np.ndarray, y: np.ndarray) -> Markup:
    """Predicted by true values, with the line where both are equal: a dot each, or of many points how many lie in each cell."""

    def draw(axes: Axes) -> None:
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        edge = (high - low or abs(high) or 1.0) / 30
        low, high = low - edge, high + edge
        axes.plot([low, high], [low, high], color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.set(xlim=(low, high), ylim=(low, high), xlabel="true", ylabel="predicted")
        if len(x) <= DOTS:
            axes.plot(x, y, ".", color=FIRST, alpha=0.5, markeredgewidth=0, markersize=5)
            return
        counts, edges, _ = np.histogram2d(x, y, bins=CELLS, range=[[low, high]] * 2)
        rows, columns = np.nonzero(counts)
        middle = (edges[1:] + edges[:-1]) / 2
        shade = 0.15 + 0.85 * np.sqrt(counts[rows, columns] / counts.max())
        side = 72 * SQUARE[0][0] * SQUARE[1][2] / CELLS
        axes.scatter(middle[rows], middle[columns], s=side**2, marker="s", color=FIRST, alpha=shade.round(2), linewidth=0)

    return drawn(name, SQUARE, draw)


def errors(name: str, values: np.ndarray, title: str) -> Markup:
    """How often values occur; those beyond the middle 99 % are counted in the outermost bars. A line stands at 0."""

    def draw(axes: Axes) -> None:
        low, high = np.quantile(values, (0.005, 0.995))
        if low == high:
            low, high = low - 0.5, high + 0.5
        counts, edges = np.histogram(np.clip(values, low, high), bins=BARS, range=(low, high))
        axes.stairs(counts, edges, fill=True, color=FIRST, alpha=0.75)
        axes.axvline(0, color=QUIET, linewidth=1, linestyle=(0, (3, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set(xlabel=title, ylabel="rows")

    return drawn(name, SQUARE, draw)


def picture(image: np.ndarray) -> str:
    """A data URI of an image, uint8 (height, width, channels)."""
    drawn = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    small = max(drawn.size) <= SMALL
    if not small:
        drawn.thumbnail((THUMBNAIL, THUMBNAIL))
    kind = "png" if small or drawn.mode == "RGBA" else "jpeg"
    content = BytesIO()
    drawn.save(content, format=kind, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def _picked(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS of the points, first and last among them; values thrice, (3, points), as `_grouped` has them."""
    kept = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).astype(int))
    return steps[kept], np.stack([values[kept]] * 3)


def _grouped(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The middle step of each group, and the lowest, mean and highest of its finite values, (3, groups)."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), BUCKETS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without a finite value is NaN, and that is meant
        found = [[function(values[part]) for part in parts] for function in (np.nanmin, np.nanmean, np.nanmax)]
    return np.array([steps[part].mean() for part in parts]), np.array(found)


def _scale(axes: Axes, values: np.ndarray, logarithmic: bool) -> None:
    """A logarithmic axis for positive values that span more than a factor of ten, if it is wanted; plain numbers as labels."""
    finite = values[np.isfinite(values)]
    low, high = finite.min(initial=np.inf), finite.max(initial=-np.inf)
    if logarithmic and 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=_steps(low, high)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _steps(low: float, high: float) -> tuple[float, ...]:
    """Of a logarithmic axis: the multiples of powers of ten that have ticks, the fewest of which at least three are seen."""
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if sum(low <= step * 10.0**power <= high for step in steps for power in powers) > 2:
            return steps
    return (1.0, 2.0, 3.0, 5.0, 7.0)


def _label_ends(axes: Axes, curves: Iterable[Curve]) -> None:
    """The name of each curve beside its last point, moved up where two would touch, and all of them down again from above the figure."""
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.get_ylim()  # settles the limits, which the transformation asks for
    ends = []
    for curve in curves:
        there = np.flatnonzero(np.isfinite(curve.y))
        if len(there):
            ends.append((to_axes.transform((curve.x[there[-1]], curve.y[there[-1]]))[1], curve.name, curve.colour))
    heights: list[float] = []
    for height, _, _ in sorted(ends):
        heights.append(max(height, heights[-1] + 0.08 if heights else -np.inf))
    above = max(max(heights, default=0.0) - 1, 0.0)
    for height, (_, name, colour) in zip(heights, sorted(ends), strict=True):
        axes.text(1.01, height - above, name, transform=axes.transAxes, color=colour, va="center", fontweight="bold", parse_math=False)


def drawn(name: str, layout: Layout, draw: Callable[[Axes], None]) -> Markup:
    """The figure that `draw` makes, as an SVG element of a page. `name` tells its ids from those of other figures."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        size, place = layout
        figure = Figure(figsize=size)
        draw(figure.add_axes(place))
        content = StringIO()
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Markup(_for_page(content.getvalue()))  # matplotlib has escaped its text


def _for_page(svg: str) -> str:
    """Without the parts that only a file of its own needs, and with the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg, count=5)
    svg = re.sub(r"font-family: [^;]*; ", "", re.sub(r'<g id="[^"]*"', "<g", svg)).replace("xlink:href", "href")
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg
