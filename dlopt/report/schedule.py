"""The learning rate over a run, drawn before it: as lines of text for a terminal, or as a figure in a file."""

from __future__ import annotations

import html
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dlopt.artifact import write_atomically
from dlopt.optim.schedules import Course, Scheduled, refuse_too_long
from dlopt.part import DloptError
from dlopt.train.job import Fit, course_of
from dlopt.train.start import peak_of

POINTS = 5000
"""A longer run is drawn by so many of its steps."""
WIDTH, HEIGHT = 72, 14
"""Columns and lines of the plot in letters."""
MARKS = 12
"""The most epochs that are marked by name."""
ENDINGS = (".svg", ".png", ".html")
INK, QUIET, LINE, COLOUR = "#1b1f24", "#5b6470", "#d5dae1", "#2457d6"
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<body style="max-width: 60rem; margin: 2rem auto; font-family: system-ui, sans-serif; color: {ink}">
<h1>{title}</h1>
{figure}
</html>
"""


class Curve(NamedTuple):
    """The rate at the steps of a run."""

    course: Course
    steps: np.ndarray
    """All of them, or POINTS at equal distances; from 0."""
    rates: np.ndarray
    """The rate of each; the factor on the peak rate where that is to be found by a range test."""
    what: str
    """What the numbers are."""
    says: str
    """What is to be known about the figure, in a sentence or two."""


def curve_of(fit: Fit, rows: int) -> Curve:
    """The rates of a job that trains on so many rows. Raises DloptError when its schedule does not fit."""
    course, schedule = course_of(fit, rows), fit.train.schedule
    refuse_too_long(schedule, course)
    steps = np.unique(np.linspace(0, course.steps - 1, int(min(course.steps, POINTS))).round())
    factors = np.array([schedule.factor(step, course) for step in steps.tolist()])
    peak = peak_of(fit, rows)
    what = "share of the peak rate" if peak is None else "learning rate"
    return Curve(course, steps, factors * (1.0 if peak is None else peak), what, " ".join(_notes(schedule, peak)))


def _notes(schedule: Scheduled, peak: float | None) -> list[str]:
    """What the figure cannot show."""
    notes = [] if peak is not None else ["The peak rate is found by a range test when training begins."]
    if schedule.watches_validation():
        notes.append("Falls of a plateau depend on the validation split and are not drawn: the rate is at most what is shown.")
    return notes


def text(curve: Curve) -> str:
    """A plot in letters, WIDTH columns wide beside the labels: in each column the rates from its left to its right, below it the epochs."""
    top = float(curve.rates.max()) or 1.0
    heights = (curve.rates / top * (HEIGHT - 1)).round().astype(int)
    edges = np.searchsorted(curve.steps, np.arange(WIDTH + 1) * curve.course.steps / WIDTH, side="right") - 1
    canvas = np.full((HEIGHT, WIDTH), " ")
    for column, (left, right) in enumerate(pairwise(edges)):
        some = heights[left : right + 1]
        canvas[some.min() : some.max() + 1, column] = "*"
    labels = {HEIGHT - 1: f"{top:.4g}", 0: "0"}
    wide = max(len("epoch"), *map(len, labels.values()))
    ruler, names = _ruler(curve.course)
    rows = [f"{labels.get(line, ''):>{wide}} |{''.join(canvas[line])}" for line in range(HEIGHT - 1, -1, -1)]
    below = [f"{'':>{wide}} {ruler}", f"{'epoch':>{wide}} {names}"]
    return "\n".join(line.rstrip() for line in (f"{'':>{wide}} {curve.what}", *rows, *below))


def _ruler(course: Course) -> tuple[str, str]:
    """The line below the plot with a mark at each epoch that is named, and their numbers."""
    epochs = course.steps / course.epoch
    ruler, names = ["-"] * (WIDTH + 1), [" "] * (WIDTH + 8)
    for epoch in _marked(epochs):
        at = round(epoch / epochs * WIDTH)
        ruler[at] = "+"
        names[at : at + len(str(epoch))] = str(epoch)
    return "".join(ruler), "".join(names)


def _marked(epochs: float) -> range:
    """The epochs that are named."""
    size = next(size for size in (scale * 10**power for power in range(20) for scale in (1, 2, 5)) if epochs / size <= MARKS)
    return range(0, int(epochs + 1e-6) + 1, size)


def write(path: Path, curve: Curve, title: str) -> None:
    """Draw it into a file, of the kind that its ending says. Raises DloptError."""
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DloptError(f"--output: {path}: the ending must be one of {', '.join(ENDINGS)}")
    drawn = _drawn(curve, title, "png" if ending == ".png" else "svg")
    if ending == ".html":
        svg = drawn.decode()
        page = PAGE.format(title=html.escape(title), ink=INK, figure=svg[svg.index("<svg") :])
        drawn = page.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, drawn)
    except OSError as error:
        raise DloptError(f"--output: cannot write to {path}: {error.strerror}") from None


def _drawn(curve: Curve, title: str, kind: str) -> bytes:
    """The figure; the same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": "schedule",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    epochs, epoch = curve.course.steps / curve.course.epoch, curve.course.epoch

    def to_steps(epochs: Any) -> Any:
        return epochs * epoch

    def to_epochs(steps: Any) -> Any:
        return steps / epoch

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=(7.2, 3.4), layout="constrained")
        axes = figure.add_subplot()
        for at in range(int(epochs) + 1) if epochs <= 100 else _marked(epochs):
            axes.axvline(at, color=LINE, linewidth=0.6)
        axes.plot(curve.steps / epoch, curve.rates, color=COLOUR, linewidth=1.7)
        axes.set(xlim=(0, epochs), ylim=(0, None), xlabel="epoch", ylabel=curve.what)
        axes.set_xticks(_marked(epochs))
        above = axes.secondary_xaxis("top", functions=(to_steps, to_epochs))
        above.set_xlabel("step", color=QUIET)
        above.tick_params(colors=QUIET)
        figure.suptitle(title, color=INK, fontsize=10)
        if curve.says:
            figure.supxlabel(curve.says, color=QUIET, fontsize=7.5)
        content = BytesIO()
        figure.savefig(content, format=kind, dpi=150, metadata=dict.fromkeys(("Date", "Creator")) if kind == "svg" else {"Software": None})
    return content.getvalue()
