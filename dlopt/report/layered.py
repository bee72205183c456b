"""Figures of many layers at once, over the steps, and the curve of a learning rate range test."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dlopt.report.plots import ALARM, FIRST, QUIET, SECOND, Layout, drawn

MOST_LINES = 6
"""Layers that are lines; more of them are rows of a heat map."""
COLUMNS, TICKS = 60, 8
"""Of more looks, how many groups of them are columns of the map; how many of the columns have their step below."""
LONGEST = 24
"""Characters of a layer's name that are shown: of a longer one, as many parts from its end as fit."""
FAINT = 0.06
HOT, LOST = (0.36, 0.52, 0.93), (0.80, 0.25, 0.22)
"""Colours of the map, for pages of both colours: the values, more or less of it, and what is not finite."""
DECADES = 12.0
"""Powers of ten that the colours span at most, from the greatest value down."""


def by_layer(
    name: str, steps: Sequence[int], layers: Sequence[str], values: np.ndarray, between: tuple[float, float] | None = None
) -> Markup:
    """Values (layers, steps) of each layer over the steps, on a logarithmic scale: lines of a few layers, a heat map of many. NaN is
    what is not finite; what is 0 has no place on the scale, and counts as its lower end.

    between: the ends of the scale, of a figure that stands beside others, which then is a heat map however few the layers are.
    """
    written, at = [short(layer) for layer in layers], np.asarray(steps)
    if len(layers) <= MOST_LINES and between is None:
        return drawn(name, _beside_lines(written), lambda axes: _lines(axes, at, written, values))
    return drawn(name, _beside_rows(written), lambda axes: _heat(axes, at, written, values, between or extent(values)))


def sweep(name: str, rates: np.ndarray, losses: np.ndarray, suggested: float) -> Markup:
    """Losses over learning rates, and the rate that they suggest."""

    def draw(axes: Axes) -> None:
        axes.plot(rates, losses, color=FIRST)
        axes.set_xscale("log")
        axes.axvline(suggested, color=SECOND, linewidth=1.2, linestyle=(0, (3, 3)))
        axes.annotate(f"{suggested:.2g}", (suggested, 1.02), xycoords=("data", "axes fraction"), color=SECOND, ha="center", va="bottom")
        _plain_powers(axes, losses)
        axes.set(xlabel="learning rate", ylabel="loss")

    return drawn(name, ((5.4, 2.7), (0.11, 0.17, 0.84, 0.73)), draw)


def short(layer: str) -> str:
    """A name as it fits beside a figure."""
    if len(layer) <= LONGEST:
        return layer
    end = layer[1 - LONGEST :]
    whole = end if layer[-LONGEST] == "." else end.partition(".")[2]
    return f"\N{HORIZONTAL ELLIPSIS}{whole or end}"


def _beside_lines(layers: Sequence[str]) -> Layout:
    """With room for the names right of the ends of lines."""
    return (5.4, 2.7), (0.12, 0.16, 0.83 - 0.0135 * max(map(len, layers)), 0.78)


def _beside_rows(layers: Sequence[str]) -> Layout:
    """With room for the names left of the rows."""
    names = 0.0115 * max(map(len, layers))
    height = max(2.7, 0.7 + 0.17 * len(layers))
    return (5.4, height), (0.03 + names, 0.48 / height, 0.83 - names, 1 - 0.62 / height)


def _lines(axes: Axes, steps: np.ndarray, layers: list[str], values: np.ndarray) -> None:
    """The first layers in one colour, the last in another, the outermost strongest."""
    floor = extent(values)[0]
    half = (len(layers) - 1) / 2
    for place, (line, layer) in enumerate(zip(values, layers, strict=True)):
        colour, strength = (SECOND, FIRST)[place >= half], 0.45 + 0.55 * (abs(place - half) / half if half else 1)
        shown = np.where(line == 0, floor, line)
        axes.plot(steps, shown, color=colour, alpha=strength, label=layer, marker="o", markersize=2.5 if len(steps) < 40 else 0)
        lost = steps[np.isnan(line)]
        axes.plot(lost, np.zeros(len(lost)), "^", color=ALARM, markersize=5, transform=axes.get_xaxis_transform(), clip_on=False)
    if steps[-1] > 20 * steps[0]:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("step")
    _plain_powers(axes, values)
    _name_ends(axes, steps, values, floor)


def _name_ends(axes: Axes, steps: np.ndarray, values: np.ndarray, floor: float) -> None:
    """Each layer's name beside the end of its line, moved up where two would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    axes.get_ylim()  # settles the limits, which the transformation asks for
    ends = []
    for line, drawing in zip(values, axes.get_lines()[::2], strict=True):
        there = np.flatnonzero(np.isfinite(line))
        last = max(line[there[-1]], floor) if len(there) else floor
        ends.append((to_axes.transform((steps[-1], last))[1], str(drawing.get_label()), drawing.get_color()))
    heights: list[float] = []
    for height, _, _ in sorted(ends):
        heights.append(max(height, heights[-1] + 0.08 if heights else 0.0))
    above = max(heights[-1] - 1, 0.0)
    for height, (_, layer, colour) in zip(heights, sorted(ends), strict=True):
        axes.text(1.02, height - above, layer, transform=axes.transAxes, color=colour, va="center", fontsize=8)


def _heat(axes: Axes, steps: np.ndarray, layers: list[str], values: np.ndarray, between: tuple[float, float]) -> None:
    """A row a layer, the first on top; a column a look, or several that lie together, by their median."""
    parts = np.array_split(np.arange(len(steps)), min(len(steps), COLUMNS))
    low, high = (math.log10(end) for end in between)
    with np.errstate(divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a group without a finite value is NaN, and that is meant
        logs = np.clip(np.log10(values), low, high)
        grouped = np.stack([np.nanmedian(logs[:, part], axis=1) for part in parts], axis=1)
    axes.imshow(_colours((grouped - low) / (high - low)), aspect="auto", interpolation="nearest")
    axes.grid(visible=False)
    axes.set_yticks(range(len(layers)), layers, fontsize=7)
    chosen = np.unique(np.linspace(0, len(parts) - 1, min(len(parts), TICKS)).round().astype(int))
    axes.set_xticks(chosen, [f"{steps[parts[place][0]]:,}" for place in chosen])
    axes.set_xlabel("step")
    _scale_beside(axes, low, high)


def _scale_beside(axes: Axes, low: float, high: float) -> None:
    """What the colours stand for."""
    place = axes.get_position()
    scale = axes.figure.add_axes((place.x1 + 0.02, place.y0, 0.025, place.height))
    shades = np.linspace(1, 0, 64)[:, None]
    scale.imshow(_colours(shades), aspect="auto", extent=(0, 1, low, high))
    ticks = np.arange(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 5)))
    scale.set_yticks(ticks, [f"{10.0**tick:.0e}" if abs(tick) > 3 else f"{10.0**tick:g}" for tick in ticks.tolist()], fontsize=7)
    scale.yaxis.tick_right()
    scale.set_xticks([])
    scale.grid(visible=False)
    scale.set_frame_on(False)


def _colours(shares: np.ndarray) -> np.ndarray:
    """Shares of the scale to colours, (..., 4), the least transparent for the greatest."""
    lost = np.isnan(shares)[..., None]
    colours = np.where(lost, np.array(LOST), np.array(HOT))
    return np.concatenate((colours, np.where(lost, 1.0, FAINT + (1 - FAINT) * shares[..., None])), axis=-1)


def extent(values: np.ndarray) -> tuple[float, float]:
    """The ends of a logarithmic scale: a factor of ten at least."""
    there = values[np.isfinite(values) & (values > 0)]
    high = float(there.max(initial=0.0)) or 1.0
    return max(min(float(there.min(initial=high)), high / 10), high * 10.0**-DECADES), high


def _plain_powers(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis where values span more than a factor of ten, with few and plain numbers."""
    low, high = extent(values)
    if high > 10 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", labelcolor=QUIET)
