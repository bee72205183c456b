"""Figures of the data profile: how values are spread, the splits over each other; drawn as the report's other figures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dlopt.report.plots import FIRST, NARROW, QUIET, SECOND, drawn

SPLITS = (FIRST, SECOND, QUIET)
"""Colours of train, validation and test, or of whatever series there are."""
LABEL = 28
"""Letters of a label that are shown."""


def histogram(name: str, edges: np.ndarray, series: Mapping[str, np.ndarray], date: bool = False) -> Markup:
    """Shares of the values between edges: the first series as an area, the others as lines over it. date: edges are seconds since 1970."""

    def draw(axes: Axes) -> None:
        for shares, colour in zip(series.values(), SPLITS, strict=False):
            first = colour == FIRST
            axes.stairs(shares, edges, fill=first, color=colour, alpha=0.35 if first else 1, linewidth=0 if first else 1.3)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(4 if date else 6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _day(value) if date else f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if len(series) > 1:
            _name_splits(axes, list(series))

    return drawn(name, NARROW, draw)


def bars(name: str, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> Markup:
    """A group of bars for each label, one a series, of shares from 0 to 1."""
    names = [label if len(label) <= LABEL else f"{label[: LABEL - 1]}…" for label in labels]
    left = 0.05 + 0.016 * max(map(len, names), default=0)
    height = 0.9 + 0.22 * len(labels) * max(1, len(series) ** 0.5)

    def draw(axes: Axes) -> None:
        places, width = np.arange(len(labels)), 0.8 / max(len(series), 1)
        for index, (shares, colour) in enumerate(zip(series.values(), SPLITS, strict=False)):
            offset = (index - (len(series) - 1) / 2) * width
            axes.barh(places + offset, shares, height=width, color=colour, alpha=0.75)
        axes.set_yticks(places, names, parse_math=False)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if len(series) > 1:
            _name_splits(axes, list(series))

    return drawn(name, ((3.7, height), (left, 0.35 / height, 0.96 - left, 1 - 0.65 / height)), draw)


def _name_splits(axes: Axes, names: Sequence[str]) -> None:
    """The names of the series above the figure, in their colours."""
    right = 0.0
    for name, colour in reversed(list(zip(names, SPLITS, strict=False))):
        axes.annotate(
            name,
            (1, 1),
            xycoords="axes fraction",
            xytext=(-right, 3),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="bottom",
            fontweight="bold",
            parse_math=False,
        )
        right += 6.0 * len(name) + 6


def _day(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s").astype("datetime64[D]"))
