"""Spikes of the loss."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from dlopt.train.watch.layers import Finding

WINDOW, CALM = 50, 10
"""Losses that a spike is told from, and how few of them are too few."""
SPIKE, DEVIATIONS = 3.0, 8.0
"""A spike is more than SPIKE times the median of the losses before it, and more than so many deviations above it."""


class Spikes:
    """Tells spikes from the losses of some steps, one after the other. What it costs a step is a comparison."""

    def __init__(self) -> None:
        self.load_state_dict({})

    def state_dict(self) -> dict[str, Any]:
        kept = {"start": self.start, "bar": self.bar, "heard": self.heard, "spoke": self.spoke, "step": self.step}
        return {"losses": list(self.losses), **kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses: deque[float] = deque(state.get("losses", ()), maxlen=WINDOW)
        self.start: list[float] = list(state.get("start", ()))
        self.bar: float = state.get("bar", math.inf)
        self.heard, self.spoke, self.step = state.get("heard", 0), state.get("spoke", -WINDOW), state.get("step", 0)

    def new(self, step: int, loss: float) -> Finding | None:
        """A finding if this loss is a spike, and none has been said within the last WINDOW losses."""
        if step <= self.step or not math.isfinite(loss):
            return None
        self.step, spike = step, loss > self.bar and self.heard - self.spoke >= WINDOW
        says = self._says(loss) if spike else ""
        self.spoke = self.heard if loss > self.bar else self.spoke
        self.heard += 1
        self.losses.append(loss)
        if len(self.start) < CALM:
            self.start.append(loss)
        if self.heard % CALM == 0 or spike:
            self.bar = bar(self.losses, statistics.median(self.start))
        return Finding(step, "spike", (), says) if spike else None

    def _says(self, loss: float) -> str:
        usual = statistics.median(self.losses)
        cure = "look for outliers in the data, set train.clip, or lower train.optimizer.lr"
        return f"loss spike: {loss:.3g}, {loss / max(usual, 1e-12):.2g} times the {usual:.3g} of the steps before; {cure}"


def bar(losses: Sequence[float] | deque[float], start: float) -> float:
    """The loss above which the next one is a spike: far above the median of these and their spread, and above where training began,
    since a batch on which the model is worse than an untrained one is no ordinary batch. Infinite while there are few."""
    if len(losses) < CALM:
        return math.inf
    middle = statistics.median(losses)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in losses)  # of a normal distribution, from its middle half
    return max(SPIKE * middle, middle + DEVIATIONS * deviation, start)
