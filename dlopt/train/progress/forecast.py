"""How fast training goes, and how long it still takes: from the lines of speed.jsonl, as the driver sees them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any, NamedTuple

RECENT, STRETCHES, PAUSES = 10, 60, 20
"""Lines, a second each, whose median is the speed that is shown; and of what the time left is made: so many stretches between two lines
of one epoch, and so many from one epoch into another, which have the measuring of the validation split in them."""
FEWEST = 2
"""Stretches before anything is said of the time left."""
SETTLING, SHARE, FASTEST = 10.0, 0.25, 0.5
"""Seconds in which the time left that is shown comes most of the way to a new estimate: it counts down and does not jump. Towards the end
it is this share of what is left, and not less than the last of these."""


class _Stretch(NamedTuple):
    """From one line to the next."""

    seconds: float
    rows: int
    ends: int
    """Of epochs, within it."""


class Forecast:
    """Of one run. rows: of an epoch; epochs: of the whole run."""

    def __init__(self, rows: int, epochs: int) -> None:
        self.rows, self.epochs = rows, epochs
        self.restart()

    def restart(self) -> None:
        """Another group of workers sets out, at a speed of its own."""
        self.last: dict[str, Any] | None = None
        self.speeds: deque[float] = deque(maxlen=RECENT)
        self.stretches: deque[_Stretch] = deque(maxlen=STRETCHES)
        self.pauses: deque[_Stretch] = deque(maxlen=PAUSES)
        self.arrived = 0.0
        self.shown: tuple[float, float] | None = None
        """When it was shown, and how many seconds were left."""

    def add(self, line: dict[str, Any], now: float) -> None:
        """A line of speed.jsonl has come. now: seconds of the driver's clock."""
        before, self.last, self.arrived = self.last, line, now
        if line["rows_per_second"]:
            self.speeds.append(line["rows_per_second"])
        if before and line["rows"] > before["rows"]:
            ends = line["epoch"] - before["epoch"]
            stretch = _Stretch(line["time"] - before["time"], line["rows"] - before["rows"], ends)
            (self.pauses if ends else self.stretches).append(stretch)

    def speed(self) -> float | None:
        """Rows per second while steps are taken."""
        return statistics.median(self.speeds) if self.speeds else None

    def left(self, now: float) -> float | None:
        """Seconds until the last epoch's end, None while too little is known; what comes at the end of an epoch is known from the first
        one on."""
        target = self._target(now)
        if target is None:
            return None
        if self.shown is None:
            self.shown = (now, target)
            return target
        before, seconds = self.shown
        counted = max(0.0, seconds - (now - before))
        settled = counted + (target - counted) * -math.expm1((before - now) / min(SETTLING, max(SHARE * target, FASTEST)))
        self.shown = (now, settled)
        return settled

    def _target(self, now: float) -> float | None:
        if self.last is None or len(self.stretches) + len(self.pauses) < FEWEST:
            return None
        step, end = self._costs()
        ends = self.epochs - self.last["epoch"] + 1
        return max(0.0, (self.rows * self.epochs - self.last["rows"]) * step + ends * end - (now - self.arrived))

    def _costs(self) -> tuple[float, float]:
        """Seconds of a row, and of the end of an epoch. Epochs of less than a second are known as a whole alone."""
        stretches = self.stretches or self.pauses
        step = sum(stretch.seconds for stretch in stretches) / sum(stretch.rows for stretch in stretches)
        ends = sum(stretch.ends for stretch in self.pauses)
        return step, sum(stretch.seconds - stretch.rows * step for stretch in self.pauses) / ends if ends else 0.0


def clock(seconds: float) -> str:
    """4:05, 1:02:33, or 2 d 3:04:05."""
    whole = round(seconds)
    minutes, hours, days = whole // 60 % 60, whole // 3600 % 24, whole // 86400
    long = f"{hours}:{minutes:02}:{whole % 60:02}" if whole >= 3600 else f"{minutes}:{whole % 60:02}"
    return f"{days} d {long}" if days else long


def rounded(rows: float) -> str:
    """Three digits of a speed: 12,300, or 0.452."""
    return f"{float(f'{rows:.3g}'):,.0f}" if rows >= 100 else f"{rows:.3g}"
