"""How fast training goes, and how long it still takes: from the lines of speed.jsonl, as the driver sees them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

RECENT = 10
"""Lines, a second each, whose median is the speed that is shown: a pause to measure the validation split does not show in it."""
FEWEST, WINDOW = 3, 30.0
"""Lines before anything is said of the time left, and the fewest seconds that it is made of once a whole epoch is done."""
SETTLING = 10.0
"""Seconds in which the time left that is shown comes most of the way to a new estimate: it counts down and does not jump."""


class _Point(NamedTuple):
    time: float
    rows: int


class Forecast:
    """Of one run. rows: of an epoch; epochs: of the whole run."""

    def __init__(self, rows: int, epochs: int) -> None:
        self.rows, self.epochs = rows, epochs
        self.restart()

    def restart(self) -> None:
        """Another group of workers sets out, at a speed of its own."""
        self.points: deque[_Point] = deque()
        self.speeds: deque[float] = deque(maxlen=RECENT)
        self.arrived = 0.0
        self.shown: tuple[float, float] | None = None
        """When it was shown, and how many seconds were left."""

    def add(self, line: dict[str, Any], now: float) -> None:
        """A line of speed.jsonl has come. now: seconds of the driver's clock."""
        self.arrived = now
        self.points.append(_Point(line["time"], line["rows"]))
        if line["rows_per_second"]:
            self.speeds.append(line["rows_per_second"])
        while len(self.points) > FEWEST and self._enough_since(self.points[1]):
            self.points.popleft()

    def _enough_since(self, point: _Point) -> bool:
        last = self.points[-1]
        return last.rows - point.rows >= self.rows and last.time - point.time >= WINDOW

    def speed(self) -> float | None:
        """Rows per second while steps are taken."""
        return statistics.median(self.speeds) if self.speeds else None

    def left(self, now: float) -> float | None:
        """Seconds until the last epoch's end, None while too little is known. A whole epoch tells how long validation takes too: once
        there is one, the estimate is made of whole epochs."""
        target = self._target(now)
        if target is None:
            return None
        if self.shown is None:
            self.shown = (now, target)
            return target
        before, seconds = self.shown
        counted = max(0.0, seconds - (now - before))
        settled = counted + (target - counted) * -math.expm1((before - now) / SETTLING)
        self.shown = (now, settled)
        return settled

    def _target(self, now: float) -> float | None:
        if len(self.points) < FEWEST:
            return None
        first, last = self.points[0], self.points[-1]
        if last.rows <= first.rows:
            return None
        rows = self.rows * self.epochs - last.rows
        return max(0.0, rows * (last.time - first.time) / (last.rows - first.rows) - (now - self.arrived))


def clock(seconds: float) -> str:
    """4:05, 1:02:33, or 2 d 3:04:05."""
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    long = f"{hours}:{minutes:02}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"
    return f"{days} d {long}" if days else long


def rounded(rows: float) -> str:
    """Three digits of a speed: 12,300, or 0.452."""
    return f"{float(f'{rows:.3g}'):,.0f}" if rows >= 100 else f"{rows:.3g}"
