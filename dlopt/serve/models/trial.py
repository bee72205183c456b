"""A version on trial: a canary, which answers a part of the requests, or a shadow, whose answers nobody gets. Either is compared with the
version that serves."""

from __future__ import annotations

import time
from collections import deque

import numpy as np

from dlopt.serve.exchange import Answer
from dlopt.serve.models.lineup import Limits

WINDOW = 1000
"""Requests of each that are looked back at."""
SLACK_SECONDS = 0.005
"""What is slower by less than this is not slower."""
CLOSE = 0.1
"""Numbers that differ by a larger share than this disagree."""
NINE_OF_TEN = 0.9


class Requests:
    """How long the last requests of a version took, and which of them failed; those that still wait count as long as they have waited."""

    def __init__(self) -> None:
        self.done: deque[tuple[float, bool]] = deque(maxlen=WINDOW)
        self.waiting: dict[int, float] = {}
        self.number = 0

    def begin(self) -> int:
        """A request; what `end` takes."""
        self.number += 1
        self.waiting[self.number] = time.monotonic()
        return self.number

    def end(self, number: int, failed: bool) -> None:
        """It was answered, or failed."""
        self.done.append((time.monotonic() - self.waiting.pop(number), failed))

    def drop(self, number: int) -> None:
        """It says nothing of the version: its client was mistaken, or has gone."""
        self.waiting.pop(number, None)

    @property
    def errors(self) -> float:
        """Share of those that failed."""
        return sum(failed for _, failed in self.done) / max(len(self.done), 1)

    def seconds(self) -> float:
        """Within which nine of ten were answered."""
        now = time.monotonic()
        times = [seconds for seconds, failed in self.done if not failed]
        shortest = min(times, default=0.0)
        times += [waited for since in list(self.waiting.values()) if (waited := now - since) > shortest]
        return float(np.quantile(times, NINE_OF_TEN)) if times else 0.0


class Trial:
    """What a canary and the version that serves have done meanwhile."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.canary, self.stable = Requests(), Requests()
        self.agreed: deque[bool] = deque(maxlen=WINDOW)

    def verdict(self) -> str:
        """Why the canary is to be taken back, in a few words; "" for no reason."""
        limits, had = self.limits, len(self.canary.done)
        if had + len(self.canary.waiting) < limits.requests:
            return ""
        if had >= limits.requests and self.canary.errors > self.stable.errors + limits.errors:
            return f"errors: {self.canary.errors:.1%} of its requests failed, {self.stable.errors:.1%} of the others"
        mine, others = self.canary.seconds(), self.stable.seconds()
        if self.stable.done and mine > limits.latency * others + SLACK_SECONDS:
            return f"latency: nine of ten requests took {1e3 * mine:.1f} ms, of the others {1e3 * others:.1f} ms"
        differ = self.agreed.count(False) / max(len(self.agreed), 1)
        if len(self.agreed) >= limits.requests and differ > limits.disagreement:
            return f"disagreement: {differ:.1%} of its answers differ"
        return ""


def agree(one: Answer, other: Answer) -> bool:
    """Whether two versions say the same of all rows: the same labels, or numbers that differ by a tenth at most."""
    if len(one) != len(other) or one.target.kind != other.target.kind:
        return False
    if one.target.kind != "number":
        names, others = one.target.labels, other.target.labels
        return [[names[index] for index in row] for row in one.decided] == [[others[index] for index in row] for row in other.decided]
    if one.outputs.shape != other.outputs.shape:
        return False
    return bool(np.allclose(one.outputs, other.outputs, rtol=CLOSE, atol=1e-6))
